"""The models of this folder: what each one's configuration is, and what it is there to show."""

from dataclasses import dataclass
from typing import Any

VOCAB = 288  # the tokenizer has 280
CONTEXT = 128


@dataclass(frozen=True)
class Case:
    """One folder."""

    name: str
    config: dict[str, Any]
    lengths: tuple[int, ...] = (1, 7, 33)  # of its prompts
    original_context: int = 0  # of longrope: prompts within it are answered with it as context
    top_k: int = 0  # experts chosen
    older_form: bool = False  # config.json as transformers 4 wrote it
    omitted: tuple[str, ...] = ()  # from config.json, being what transformers assumes
    like: str = ""  # the case whose weights it has
    gemma: bool = False  # norms are stored less one
    vision: bool = False
    embedding_spread: float = 1.0

    @property
    def weights(self) -> str:
        return self.like or self.name

    def context_for(self, length: int) -> int:
        small = 0 < length <= self.original_context
        return self.original_context if small else CONTEXT


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def case(name: str, model_type: str, *, config: dict[str, Any], **facts: Any) -> Case:
    return Case(name, {"model_type": model_type, **SIZES, **config}, **facts)


def rope(kind: str = "default", base: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": base, **scaling}


QWEN = (
    case("qwen2", "qwen2", config={}),
    case(
        "qwen2-tied",
        "qwen2",
        config={"tie_word_embeddings": True, "rope_parameters": rope(base=1e6)},
        older_form=True,
    ),
    case("qwen3", "qwen3", config={"head_dim": 32}),
    case(
        "qwen3-tied",
        "qwen3",
        config={"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": rope(base=1e6)},
        older_form=True,
    ),
)

WINDOW = 16
BEYOND_WINDOW = (1, 7, 33, 48)
GEMMA = {"tie_word_embeddings": True, "head_dim": 32}
GEMMA3 = {
    **GEMMA,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "num_hidden_layers": 7,  # five of them with a window, one without, one with
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 32,
}
GEMMA3_ROPE = {"sliding_attention": rope(base=1e4), "full_attention": rope(base=1e6)}
GEMMA3_STRETCHED = {
    "sliding_attention": rope(base=1e4),
    "full_attention": rope("linear", base=1e6, factor=8.0),
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}


def gemma(name: str, model_type: str, *, config: dict[str, Any], **facts: Any) -> Case:
    facts = {"lengths": BEYOND_WINDOW, "gemma": True, "embedding_spread": 0.5, **facts}
    return case(name, model_type, config=config, **facts)


GEMMAS = (
    gemma("gemma3", "gemma3_text", config={**GEMMA3, "rope_parameters": GEMMA3_ROPE}),
    gemma(
        "gemma3-linear",
        "gemma3_text",
        config={**GEMMA3, "rope_parameters": GEMMA3_STRETCHED},
        lengths=(1, 7, 33, 80),
        older_form=True,
        like="gemma3",
    ),
    Case(
        "gemma3-vision",
        {
            "model_type": "gemma3",
            "text_config": {**SIZES, **GEMMA3, "rope_parameters": GEMMA3_STRETCHED},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
            "image_token_index": 287,
            "boi_token_index": 285,
            "eoi_token_index": 286,
        },
        lengths=BEYOND_WINDOW,
        older_form=True,
        omitted=("rope_theta", "rope_local_base_freq", "sliding_window_pattern", "rms_norm_eps"),
        gemma=True,
        vision=True,
        embedding_spread=0.5,
    ),
    gemma(
        "gemma2",
        "gemma2",
        config={
            **GEMMA,
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    gemma("gemma", "gemma", config={**GEMMA, "num_key_value_heads": 1}, lengths=(1, 7, 33)),
)

CASES: tuple[Case, ...] = (*QWEN, *GEMMAS)
