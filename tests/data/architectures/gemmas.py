"""The Gemmas among the models of this folder."""

from typing import Any

from case import BEYOND_WINDOW, SIZES, SMALL, WINDOW, Case, case, rope

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
WIDE = {  # as the 27B models, whose heads are not hidden_size / num_attention_heads wide
    **GEMMA,
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 16,
    "sliding_window": WINDOW,
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
    gemma(
        "gemma3-pattern",  # and a scale of queries that nothing else tells
        "gemma3_text",
        config={
            **GEMMA3,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 50,
            "final_logit_softcapping": 5.0,
            "rope_parameters": GEMMA3_ROPE,
        },
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
    gemma(
        "gemma2-27b",  # the queries' scale follows from the number of layers
        "gemma2",
        config={**WIDE, "num_hidden_layers": 46, "query_pre_attn_scalar": 16},
        deep=True,
    ),
    gemma(
        "gemma3-27b",
        "gemma3_text",
        config={
            **WIDE,
            "num_hidden_layers": 62,
            "query_pre_attn_scalar": 16,
            "rope_parameters": GEMMA3_STRETCHED,
        },
        deep=True,
    ),
    gemma("gemma", "gemma", config={**GEMMA, "num_key_value_heads": 1}, lengths=(1, 7, 33)),
)
