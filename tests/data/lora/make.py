"""Make the LoRA adapters of this folder and what PEFT and transformers compute with them.

    pip install torch transformers peft
    python make.py

None of these is needed to use what this makes. Each case is an adapter for a checkpoint of
../architectures, with random weights in bf16:

    adapter_config.json, adapter_model.safetensors     as PEFT saves them
    answers.npz     base (name of the checkpoint); ids (N,); logits (N, vocabulary) in float32 of
                    the model with the adapter beside it, not merged; for each tensor NAME that
                    merge_and_unload gives and the base does not have, every STEP-th row: rows:NAME
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
BASES = HERE.parent / "architectures"
STEP = 5  # of the rows that are kept
WEIGHTS = "adapter_model.safetensors"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|gate)_proj": 3},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 9, "down_proj": 4},
        },
    ),
    "tied-head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-embedding": ("llama-tied", {"target_modules": ["k_proj", "embed_tokens"]}),
    "biases": (
        "qwen2",
        {
            "use_rslora": True,
            "bias": "all",
            "target_modules": ["q_proj", "v_proj", "lm_head"],
        },
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "renamed": ("gpt2-bare", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused-saved": (
        "phi3",
        {"target_modules": ["qkv_proj", "gate_up_proj"], "modules_to_save": ["norm"]},
    ),
    "regrouped": ("gptneox", {"use_rslora": True, "target_modules": "all-linear"}),
    "pieces": (
        "deepseek2",
        {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, (base, options) in CASES.items():
        make(name, base, options)


def make(name: str, base: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    folder = HERE / name
    plain = load(base)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    given = {"r": 4, "lora_alpha": 8, "target_parameters": [], **options}
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **given)).eval()
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.5 / parameter.shape[-1] ** 0.5 if "lora_" in key else 0.1
            noise = spread * torch.randn(parameter.shape, generator=generator)
            noise = noise if "lora_" in key else parameter.data + noise
            parameter.data = noise.to(torch.bfloat16).float()
    model.peft_config["default"].base_model_name_or_path = f"tiny/{base}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    saved = load_file(folder / WEIGHTS)
    save_file(
        {key: t.to(torch.bfloat16).contiguous() for key, t in saved.items()}, folder / WEIGHTS
    )
    (folder / WEIGHTS).chmod(0o644)
    with np.load(BASES / base / "answers.npz") as answers:
        ids = answers["ids_7"]
    with torch.no_grad():
        logits = model(torch.tensor([ids.tolist()])).logits[0].numpy()
    merged = model.merge_and_unload().state_dict()
    rows = {
        f"rows:{key}": value[::STEP].numpy()
        for key, value in merged.items()
        if not torch.equal(value, before[key])
    }
    np.savez_compressed(folder / "answers.npz", base=base, ids=ids, logits=logits, **rows)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:16} {size / 1e3:6.0f} kB  {len(rows)} tensors changed")


def load(base: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        BASES / base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


if __name__ == "__main__":
    main()
