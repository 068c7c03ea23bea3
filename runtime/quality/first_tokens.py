"""Sequences of one token, many at a time: what every first token of a sequence makes of itself.

A token that sees only itself takes its own value from attention, whatever its query and key are.
So a layer is run without positions and without a cache, for as many tokens as there are.
"""

from __future__ import annotations

import numpy as np

from runtime.backends.observing import Observe
from runtime.backends.reference import ReferenceBackend
from runtime.program import (
    Attend,
    Floats,
    Instruction,
    KVShape,
    Program,
    Rope,
    Span,
    Stage,
    StoreKV,
)


class FirstTokens:
    """A program's layers for tokens at position 0, by the reference backend."""

    def __init__(self, program: Program) -> None:
        """`program`: from build_program(..., stream=True)."""
        self._program = program

    def can_run(self, index: int) -> bool:
        """Whether a token that is alone takes all of its own value: not beside learned sinks."""
        attends = [step for step in self._program.layers[index] if isinstance(step, Attend)]
        return len(attends) == 1 and attends[0].sinks is None

    def layer(self, index: int, x: Floats, observe: Observe | None = None) -> Floats:
        """The hidden states (n_tokens, dim) after a layer, each token by itself."""
        program, layer = self._program, self._program.layers[index]
        place = next(i for i, step in enumerate(layer) if isinstance(step, Attend))
        attend = layer[place]
        assert isinstance(attend, Attend)
        before = tuple(step for step in layer[:place] if not isinstance(step, (Rope, StoreKV)))
        stored = next(step for step in layer[:place] if isinstance(step, StoreKV))
        widths = dict(program.buffers)
        kept = {name: widths[name] for name in written(before) | {"x"}}
        halves = (
            Span(before, (), {"x": widths["x"]}, kept),
            Span(layer[place + 1 :], (), kept, {"x": widths["x"]}),
        )
        stage = ReferenceBackend(Stage(widths, halves, ()), n_ctx=0)
        values = stage.run(0, {"x": x}, 0, 0, observe)
        shape = program.caches[index]
        values[attend.target] = _spread(values[stored.values], shape)
        return stage.run(1, values, 0, 0, observe)["x"]


def written(steps: tuple[Instruction, ...]) -> set[str]:
    """The buffers that these instructions write."""
    names = {getattr(step, "target", None) for step in steps}
    names |= {getattr(step, "routes", None) for step in steps}
    return {name for name in names if name is not None}


def _spread(values: Floats, shape: KVShape) -> Floats:
    """Each KV head's value for all the query heads that share it."""
    heads = values.reshape(len(values), shape.n_kv_heads, shape.value_dim)
    spread = np.repeat(heads, shape.n_heads // shape.n_kv_heads, axis=1)
    return np.ascontiguousarray(spread.reshape(len(values), -1))
