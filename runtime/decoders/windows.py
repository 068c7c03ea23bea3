"""Which layers see only the last tokens, and how many."""

from __future__ import annotations

import numpy as np

from runtime.config import MAX_LAYERS, ModelConfig

PATTERN = "attention.sliding_window_pattern"


def layer_windows(
    config: ModelConfig, *, period: int, window: int | None = None
) -> tuple[int, ...]:
    """The window of each layer, 0 for those that see all.

    The file says which layers have one (true for each that has), or after how many layers comes
    one without; else it is `period`, the architecture's own. `window` is the model's by default.
    llama.cpp: llama_model_base::load_swa_pattern.
    """
    size = config.sliding_window if window is None else window
    pattern = config.own.values.get(config.own.prefix + PATTERN)
    if not isinstance(pattern, np.ndarray):
        after = config.own.integer(PATTERN, low=0, high=MAX_LAYERS, default=period)
        chosen = [after == 0 or layer % after < after - 1 for layer in range(config.n_layers)]
    elif pattern.shape != (config.n_layers,) or pattern.dtype.kind not in "biu":
        expected = f"true or false for each of the {config.n_layers} layers"
        found = f"{pattern.size} of {pattern.dtype}"
        raise config.own.refuse(PATTERN, expected, found)
    else:
        chosen = [bool(value) for value in pattern]
    return tuple(size if has_window else 0 for has_window in chosen)
