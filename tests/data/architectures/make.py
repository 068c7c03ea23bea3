"""Make the checkpoints of this folder and what transformers computes with them.

    pip install torch transformers tokenizers
    python make.py            # all cases of cases.py and gemmas.py
    python make.py gemma3     # those whose names begin so

Neither torch nor transformers is needed to use what this makes. Each case becomes a folder:

    config.json           as transformers writes it, or in the older form of most published ones
    model.safetensors     random weights in bf16
    tokenizer.json        280 tokens; the embedding's rows beyond them are padding
    answers.npz           logits in float32 of those bf16 weights, eager attention

answers.npz has four arrays for each prompt, called after the prompt's length N: ids_N (N,),
positions_N (those whose logits are kept), logits_N (positions, vocabulary) and n_ctx_N, the context
to load the model with (longrope chooses its factors by it).
"""

import hashlib
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from case import VOCAB, Case
from cases import CASES
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

HERE = Path(__file__).resolve().parent
N_TOKENS = 280
CANDIDATES = 24  # tokens to choose from when a router must not be near a tie
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESTATED = {"architectures", "dtype", "transformers_version", "_name_or_path"}
TEXT = (
    "Once upon a time, there was a little girl named Lily. She liked to play outside in the park.",
    "One day she saw a big, red ball! \"Can I play with it?\" It's 10 or 12345 steps away.",
)  # fmt: skip


def main(*prefixes: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [case for case in CASES if not prefixes or case.name.startswith(prefixes)]
    if not chosen:
        raise SystemExit(f"no case begins with {' or '.join(prefixes)}")
    for case in chosen:
        make(case, HERE / case.name)


def make(case: Case, folder: Path) -> None:
    """Write one folder anew and print its size and how far float32 is from float64."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)  # for parts that no answer depends on
    config = transformers.AutoConfig.for_model(**case.config)
    model = model_class(case).from_config(config, attn_implementation="eager")
    randomise(model, case)
    model.to(torch.bfloat16).save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    rewrite_weights(folder / "model.safetensors", case)
    rewrite_config(folder / "config.json", case)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    model = load(case, folder, torch.float32)
    assert says(config).items() <= says(model.config).items(), "config.json is read differently"
    exact = load(case, folder, torch.float64)
    answers: dict[str, np.ndarray] = {}
    noise = 0.0
    rng = np.random.default_rng(seed_of(case.name))
    for length in case.lengths:
        ids = choose_prompt(model, case, length, rng)
        logits, precise = logits_of(model, ids), logits_of(exact, ids)
        noise = max(noise, float(np.abs(logits - precise).max() / np.abs(precise).max()))
        kept = positions(length)
        answers[f"ids_{length}"] = np.asarray(ids, np.int32)
        answers[f"positions_{length}"] = np.asarray(kept, np.int32)
        answers[f"logits_{length}"] = logits[kept].astype(np.float32)
        answers[f"n_ctx_{length}"] = np.int32(case.context_for(length))
    np.savez_compressed(folder / "answers.npz", **answers)
    size = sum(file.stat().st_size for file in folder.iterdir())
    spread = float(answers[f"logits_{case.lengths[-1]}"].std())
    print(f"{case.name:24} {size / 1e3:6.0f} kB  logits +-{spread:5.2f}  float32 {noise:.1e}")


def model_class(case: Case) -> Any:
    if case.vision:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def load(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return model_class(case).from_pretrained(folder, dtype=dtype, **plain).eval()


def says(config: Any) -> dict[str, str]:
    """What the computation follows from, whatever form config.json has."""
    values = config.get_text_config().to_dict()
    return {
        key: json.dumps(value, sort_keys=True)
        for key, value in values.items()
        if key not in RESTATED
    }


# --- weights


def randomise(model: Any, case: Case) -> None:
    """Weights that make attention uneven, logits distinct, and every vector count."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            middle, spread = distribution(name, tensor, case)
            if spread is None:
                continue
            rng = np.random.default_rng([*seed_of(case.weights), *seed_of(name)])
            values = rng.normal(middle, spread, tuple(tensor.shape)).astype(np.float32)
            tensor.copy_(torch.from_numpy(values).to(torch.bfloat16).to(tensor.dtype))


def distribution(name: str, tensor: torch.Tensor, case: Case) -> tuple[float, float | None]:
    """Mean and deviation of a tensor's values; no deviation for what is no weight."""
    last = name.rsplit(".", 1)[-1]
    if last == "e_score_correction_bias":
        return 0.0, 0.1
    if last not in ("weight", "bias", "sinks") and not last.endswith(("_proj", "_proj_bias")):
        return 0.0, None  # a buffer
    if "norm" in name or ".ln_" in name:
        if last == "bias":
            return 0.0, 0.3
        middle = 0.0 if case.gemma else 1.0
        return middle - 0.8 * (case.deep and "post_" in name), 0.25 - 0.15 * case.deep
    if last == "sinks":
        return 0.0, 1.0
    if last.endswith("bias"):
        return 0.0, 0.3
    if "wpe" in name:
        return 0.0, 0.5
    if any(part in name for part in ("embed_tokens", "wte", "embed_in")):
        return 0.0, case.embedding_spread
    inwards = tensor.shape[-1]
    conv1d = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
    if conv1d or (case.config["model_type"] == "gpt_oss" and "experts" in name):
        inwards = tensor.shape[-2]
    if tensor.ndim > 3:  # a vision model's patches
        inwards = tensor[0].numel()
    gain = 1.0
    if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn")):
        gain = 1.6
    elif name.endswith(("gate.weight", "router.weight")):
        gain = 2.0
    return 0.0, gain / inwards**0.5


def seed_of(name: str) -> list[int]:
    return list(hashlib.sha256(name.encode()).digest()[:8])


# --- prompts and answers


def positions(length: int) -> list[int]:
    """All of a short prompt; six of a long one, the last among them."""
    if length <= 7:
        return list(range(length))
    return np.linspace(3, length - 1, 6).round().astype(int).tolist()


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def choose_prompt(model: Any, case: Case, length: int, rng: np.random.Generator) -> list[int]:
    """Random ids; with experts each is the one that leaves the routers furthest from a tie.

    Otherwise rounding, which differs between any two programs, would choose another expert.
    """
    if not case.top_k:
        return rng.integers(0, N_TOKENS, length).tolist()
    routed: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda m, _, out: routed.append(scores_of(m, out)))
        for name, module in model.named_modules()
        if name.endswith((".gate", ".router")) and "shared" not in name
    ]
    ids: list[int] = []
    for _ in range(length):
        candidates = rng.integers(0, N_TOKENS, CANDIDATES)
        batch = np.column_stack([np.tile(ids, (CANDIDATES, 1)), candidates]).astype(np.int64)
        routed.clear()
        with torch.no_grad():
            model(torch.from_numpy(batch), use_cache=False)
        margins = [
            margin(scores.reshape(CANDIDATES, len(ids) + 1, -1)[:, -1], case) for scores in routed
        ]
        ids.append(int(candidates[int(torch.stack(margins).amin(0).argmax())]))
    for hook in hooks:
        hook.remove()
    return ids


def scores_of(router: Any, output: Any) -> torch.Tensor:
    """What experts are chosen by: (tokens, experts)."""
    logits = output[0] if isinstance(output, tuple) else output
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek V3
        return logits.sigmoid() + router.e_score_correction_bias
    return logits


def margin(scores: torch.Tensor, case: Case) -> torch.Tensor:
    """How far the last expert chosen is from the first left out: (candidates,)."""
    ranked = scores.sort(-1, descending=True).values
    return ranked[:, case.top_k - 1] - ranked[:, case.top_k]


# --- files


def rewrite_weights(path: Path, case: Case) -> None:
    tensors = load_file(path)
    tensors = {name.removeprefix(case.bare): values for name, values in tensors.items()}
    if case.buffers:
        for layer in range(2):
            place = case.buffers.format(layer=layer)
            tensors[f"{place}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"{place}masked_bias"] = torch.tensor(-1e9)
            if not case.bare:  # GPT-2 has no rotary positions
                tensors[f"{place}rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def rewrite_config(path: Path, case: Case) -> None:
    config = json.loads(path.read_text())
    if case.older_form:
        config = older_form(config)
    text = config.get("text_config", config)
    for key in case.omitted:
        del text[key]
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def older_form(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 wrote: rope_theta and rope_scaling, no layer_types, torch_dtype."""
    config = {key: value for key, value in config.items() if key != "layer_types"}
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if "text_config" in config:
        config["text_config"] = older_form(config["text_config"])
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    rope = config.pop("rope_parameters", None)
    if not rope:
        return config
    if "full_attention" in rope:  # gemma3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    rope = dict(rope)
    kind = rope.pop("rope_type")
    part = rope.pop("partial_rotary_factor", None)
    base = rope.pop("rope_theta")
    if config["model_type"] == "gpt_neox":
        return {**config, "rotary_emb_base": base, "rotary_pct": part}
    if part is not None:
        config["partial_rotary_factor"] = part
    if kind == "longrope":
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    return {**config, "rope_theta": base, "rope_scaling": scaling}


def tokenizer_json() -> str:
    """A byte-level tokenizer with Qwen2's split, always the same."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=["<|bos|>", "<|eos|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    assert tokenizer.get_vocab_size() == N_TOKENS < VOCAB
    return tokenizer.to_str() + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
