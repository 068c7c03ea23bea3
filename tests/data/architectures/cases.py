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


SMALL = {  # of the second and further models of a family
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def case(name: str, model_type: str, *, config: dict[str, Any], **facts: Any) -> Case:
    sizes = {**SIZES, **SMALL} if "-" in name else SIZES
    config = {"model_type": model_type, **sizes, **config}
    return Case(name, {key: value for key, value in config.items() if value is not ...}, **facts)


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
    "intermediate_size": 48,
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
    ),
    Case(
        "gemma3-vision",
        {
            "model_type": "gemma3",
            "text_config": {**SIZES, **SMALL, **GEMMA3, "rope_parameters": GEMMA3_STRETCHED},
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

MOE = {"moe_intermediate_size": 32, "intermediate_size": 48}
EXPERTS = (
    case(
        "mixtral",
        "mixtral",
        config={"intermediate_size": 32, "num_local_experts": 8, "rope_parameters": rope(base=1e6)},
        top_k=2,
    ),
    case(
        "mixtral-4-experts",
        "mixtral",
        config={"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 3},
        top_k=3,
        older_form=True,
    ),
    case(
        "qwen2moe",
        "qwen2_moe",
        config={
            **MOE,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 64,
            "norm_topk_prob": False,
        },
        top_k=3,
    ),
    case(
        "qwen3moe",
        "qwen3_moe",
        config={
            **MOE,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        top_k=2,
        older_form=True,
    ),
)

BEYOND_ORIGINAL = (1, 7, 32, 80)
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 32}


def longrope(n_pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": 32,
        "rope_parameters": rope(
            "longrope",
            original_max_position_embeddings=32,
            short_factor=[1 + 0.05 * i for i in range(n_pairs)],
            long_factor=[1 + 0.9 * i for i in range(n_pairs)],
            **more,
        ),
    }


PHI3 = (
    case("phi3", "phi3", config={"sliding_window": WINDOW}, lengths=BEYOND_WINDOW),
    case(
        "phi3-longrope",
        "phi3",
        config=longrope(8),
        lengths=BEYOND_ORIGINAL,
        original_context=32,
        older_form=True,
    ),
    case(
        "phi3-partial",  # as Phi-4-mini
        "phi3",
        config={**longrope(6, partial_rotary_factor=0.75), "tie_word_embeddings": True},
        lengths=BEYOND_ORIGINAL,
        original_context=32,
    ),
)

ANCESTORS = (
    Case(
        "gpt2",
        {
            "model_type": "gpt2",
            "vocab_size": VOCAB,
            "n_positions": CONTEXT,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    case("starcoder2", "starcoder2", config={"sliding_window": WINDOW}, lengths=BEYOND_WINDOW),
    case(
        "starcoder2-tied",
        "starcoder2",
        config={"tie_word_embeddings": True, "sliding_window": None},
        older_form=True,
    ),
    case("stablelm", "stablelm", config={"rope_parameters": rope(partial_rotary_factor=0.25)}),
    case(
        "stablelm-biases",
        "stablelm",
        config={
            "use_qkv_bias": True,
            "num_key_value_heads": 2,
            "rope_parameters": rope(partial_rotary_factor=0.5),
        },
        older_form=True,
    ),
    case(
        "stablelm-parallel",  # as StableLM 2 12B
        "stablelm",
        config={
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "rope_parameters": rope(partial_rotary_factor=0.25),
        },
    ),
    case(
        "gptneox",
        "gpt_neox",
        config={"num_key_value_heads": ..., "rope_parameters": rope(partial_rotary_factor=0.25)},
    ),
    case(
        "gptneox-sequential",
        "gpt_neox",
        config={
            "use_parallel_residual": False,
            "num_key_value_heads": ...,
            "rope_parameters": rope(partial_rotary_factor=0.5),
        },
        older_form=True,
    ),
)

MODERN = (
    case("olmo2", "olmo2", config={"rope_parameters": rope(base=5e5)}),
    case(
        "granite",
        "granite",
        config={
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.125,
            "tie_word_embeddings": True,
        },
        older_form=True,
    ),
    case(
        "smollm3",
        "smollm3",
        config={"num_hidden_layers": 5, "tie_word_embeddings": True},  # the fourth without rope
    ),
)

LLAMAS = (
    case("llama", "llama", config={}),
    case("llama-tied", "llama", config={"tie_word_embeddings": True, "head_dim": 32}),
    case(
        "llama-biases",
        "llama",
        config={"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
        older_form=True,
    ),
    case(
        "llama-linear",
        "llama",
        config={"rope_parameters": rope("linear", factor=4.0)},
        lengths=BEYOND_ORIGINAL,
        older_form=True,
    ),
    case(
        "llama-llama3",
        "llama",
        config={
            "rope_parameters": rope(
                "llama3", low_freq_factor=1.0, high_freq_factor=4.0, **STRETCHED
            )
        },
        lengths=BEYOND_ORIGINAL,
        like="llama-linear",
    ),
    case(
        "llama-yarn",
        "llama",
        config={"rope_parameters": rope("yarn", **STRETCHED)},
        lengths=BEYOND_ORIGINAL,
        older_form=True,
        like="llama-linear",
    ),
    case(
        "llama-dynamic",  # beyond its context the base changes, which GGUF does not know
        "llama",
        config={"rope_parameters": rope("dynamic", factor=2.0)},
        lengths=BEYOND_ORIGINAL,
        older_form=True,
        like="llama-linear",
    ),
    case(
        "mistral",
        "mistral",
        config={"head_dim": 32, "sliding_window": WINDOW},
        lengths=BEYOND_WINDOW,
    ),
)

DEEPSEEK = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
LATE = (
    case(
        "gptoss",
        "gpt_oss",
        config={
            "head_dim": 32,
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": rope("yarn", truncate=True, **STRETCHED),
        },
        lengths=(1, 7, 33, 80),
        top_k=2,
    ),
    case(
        "deepseek2",
        "deepseek_v2",
        config={**DEEPSEEK, "q_lora_rank": None, "norm_topk_prob": False},
        top_k=2,
    ),
    case(
        "deepseek3",
        "deepseek_v3",
        config={
            **DEEPSEEK,
            "q_lora_rank": 24,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        top_k=2,
    ),
)

CASES: tuple[Case, ...] = (
    *(*QWEN, *GEMMAS, *EXPERTS, *PHI3, *ANCESTORS, *MODERN),
    *(*LLAMAS, *LATE),
)
