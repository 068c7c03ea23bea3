"""Sliding windows that only some layers have."""

from gguf_tools.archs.architecture import MetadataRule
from gguf_tools.archs.config import MAX_CONTEXT, HFConfig

SLIDING, FULL = "sliding_attention", "full_attention"

WINDOWS = (
    MetadataRule("attention.sliding_window", "u32", "sliding_window"),
    MetadataRule("attention.sliding_window_pattern", "bool", "window_pattern"),
)


def read_window(config: HFConfig, *, default: int | None = None) -> int | None:
    """The tokens that a layer with a window sees; None where config.json says null or 0."""
    if "sliding_window" not in config.values:
        return default
    return config.integer("sliding_window", low=0, high=MAX_CONTEXT, default=0) or None


def read_pattern(config: HFConfig, n_layers: int, *, silent: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers have a window: as `layer_types` says, or `silent` where there is none."""
    types = config.values.get("layer_types")
    if types is None:
        return silent
    known = (SLIDING, FULL)
    if not isinstance(types, list) or len(types) != n_layers or any(t not in known for t in types):
        raise config.refuse(
            "layer_types", f"{SLIDING} or {FULL} for each of the {n_layers} layers", types
        )
    return tuple(layer == SLIDING for layer in types)


def all_but_each(period: int, n_layers: int) -> tuple[bool, ...]:
    """A window in every layer but the last of each `period`."""
    return tuple((layer + 1) % period != 0 for layer in range(n_layers))
