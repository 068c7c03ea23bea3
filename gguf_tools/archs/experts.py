"""What mixtures of experts say alike: how many there are, their sizes, their tensors.

A checkpoint has a tensor for each expert, or one for all of a layer with gate and up together
(transformers calls both by these names); a file has one for all.
"""

from dataclasses import replace

from gguf_tools.archs.architecture import MetadataRule, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig

SEPARATE, STACKED = "separate_experts", "stacked_experts"
LAYOUTS = ((STACKED, ".mlp.experts.gate_up_proj"), (SEPARATE, ""))

MAX_EXPERTS = 1024
MAX_IN_ALL = 1 << 17  # of all layers; a model has a few ten thousand at most

EXPERT_COUNTS = (
    MetadataRule("expert_count", "u32", "n_experts"),
    MetadataRule("expert_used_count", "u32", "n_experts_used"),
)
EXPERT_METADATA = (
    *EXPERT_COUNTS,
    MetadataRule("expert_feed_forward_length", "u32", "expert_ffn_dim"),
    MetadataRule("expert_shared_feed_forward_length", "u32", "shared_ffn_dim"),
    MetadataRule("expert_weights_norm", "bool", "normalizes"),
)

ROUTER = TensorRule("mlp.gate.weight", "ffn_gate_inp.weight", ("experts", "dim"))


def with_experts(
    config: HFConfig,
    facts: ModelFacts,
    *,
    count: tuple[str, ...],
    n_experts: int,
    n_used: int | None,
    ffn_dim: int | None = None,
    shared_ffn_dim: int | None = None,
    normalizes: bool | None = None,
) -> ModelFacts:
    """`facts` with a mixture in every layer.

    `count` are the names that config.json may give the number of experts; `n_experts` and `n_used`
    are what transformers assumes where it is silent. `normalizes` is given where it is not what
    GGUF takes for granted.
    """
    key = next((name for name in count if config.has(name)), count[0])
    n_experts = config.integer(key, high=MAX_EXPERTS, default=n_experts)
    if n_experts * facts.n_layers > MAX_IN_ALL:
        limit = f"at most {MAX_IN_ALL:,} experts in {facts.n_layers:,} layers"
        raise config.refuse(key, limit, n_experts)
    used = config.integer("num_experts_per_tok", default=n_used)
    if used > n_experts:
        raise config.refuse("num_experts_per_tok", f"at most the {n_experts} experts", used)
    more = {
        "n_experts_used": used,
        "expert_ffn_dim": ffn_dim,
        "shared_ffn_dim": shared_ffn_dim,
        "normalizes": normalizes,
    }
    sizes = {"expert_ffn": ffn_dim or facts.ffn_dim, "shared_ffn": shared_ffn_dim or 0}
    return replace(
        facts,
        n_experts=n_experts,
        more={**facts.more, **more},
        more_sizes={**facts.more_sizes, **sizes},
    )


def separate_experts(gate: str, up: str, down: str) -> tuple[TensorRule, ...]:
    """A tensor for each expert, under these names with {expert} in them."""
    return (
        TensorRule(gate, "ffn_gate_exps.weight", ("experts", "expert_ffn", "dim"), when=SEPARATE),
        TensorRule(up, "ffn_up_exps.weight", ("experts", "expert_ffn", "dim"), when=SEPARATE),
        TensorRule(down, "ffn_down_exps.weight", ("experts", "dim", "expert_ffn"), when=SEPARATE),
    )


STACKED_EXPERTS = (
    TensorRule(
        "mlp.experts.gate_up_proj",
        "ffn_gate_exps.weight",
        ("experts", "expert_ffn", "dim"),
        when=STACKED,
        part=(0, 2),
    ),
    TensorRule(
        "mlp.experts.gate_up_proj",
        "ffn_up_exps.weight",
        ("experts", "expert_ffn", "dim"),
        when=STACKED,
        part=(1, 2),
    ),
    TensorRule(
        "mlp.experts.down_proj",
        "ffn_down_exps.weight",
        ("experts", "dim", "expert_ffn"),
        when=STACKED,
    ),
)
EXPERTS = (
    *separate_experts(
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
        "mlp.experts.{expert}.down_proj.weight",
    ),
    *STACKED_EXPERTS,
)
