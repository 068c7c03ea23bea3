"""The models of this folder: their configurations, and what each is there to show."""

from typing import Any

from case import BEYOND_WINDOW, CONTEXT, SMALL, VOCAB, WINDOW, Case, case, rope
from gemmas import GEMMAS

QWEN = (
    case("qwen2", "qwen2", config={}),
    case(
        "qwen2-tied",
        "qwen2",
        config={"tie_word_embeddings": True, "rope_parameters": rope(base=1e6)},
        older_form=True,
    ),
    case(
        "qwen2-window",
        "qwen2",
        config={
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,  # the first sees all
        },
        lengths=(1, 7, 33, 48),
    ),
    case("qwen3", "qwen3", config={"head_dim": 32}),
    case(
        "qwen3-tied",
        "qwen3",
        config={"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": rope(base=1e6)},
        older_form=True,
    ),
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
            **SMALL,
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
    Case(
        "gpt2-bare",  # as the published ones
        {
            "model_type": "gpt2",
            "vocab_size": VOCAB,
            "n_positions": CONTEXT,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 96,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        bare="transformer.",
        buffers="h.{layer}.attn.",
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
        buffers="gpt_neox.layers.{layer}.attention.",  # as Pythia's
        older_form=True,
    ),
)

MODERN = (
    case("olmo2", "olmo2", config={"rope_parameters": rope(base=5e5)}),
    case(
        "olmo2-windows",  # which is OLMo 3
        "olmo3",
        config={
            "num_hidden_layers": 5,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "sliding_attention": rope(base=5e5),
                "full_attention": rope("yarn", base=5e5, **STRETCHED),
            },
        },
        lengths=BEYOND_ORIGINAL,
    ),
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
        "smollm3",  # its fourth layer without rope
        "smollm3",
        config={"intermediate_size": 48, "tie_word_embeddings": True, "num_hidden_layers": 4},
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
            "hidden_size": 32,
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
            "hidden_size": 32,
            **DEEPSEEK,
            "q_lora_rank": 24,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        top_k=2,
    ),
)

CASES: tuple[Case, ...] = (
    *(*QWEN, *GEMMAS, *EXPERTS, *PHI3, *ANCESTORS, *MODERN),
    *(*LLAMAS, *LATE),
)
