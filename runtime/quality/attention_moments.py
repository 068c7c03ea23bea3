"""Moments of a layer's values and keys as attention weighs them.

What is wrong with a value reaches the output mixed with others, as often as it is attended to; so
the moments of attn_v for a KV head are those of its inputs mixed by the attention of all the heads
that share it, (A X)^T (A X). What is wrong with a key changes a score; how much that changes what
the query gets grows with A^2 |v - o|^2 |q|^2, where o is what it gets: so much its input counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.backends.reference import ReferenceBackend, attention_weights
from runtime.program import (
    AddBias,
    Attend,
    Floats,
    Instruction,
    MatMul,
    Matrix,
    Program,
    RMSNorm,
    Rope,
    Span,
    Stage,
    StoreKV,
)


@dataclass(frozen=True, eq=False)
class PlainAttention:
    """A layer whose keys and values come from a matrix each."""

    before: tuple[Instruction, ...]  # up to attention
    attend: Attend
    stored: StoreKV
    keys: Matrix
    values: Matrix


def find_attention(program: Program, index: int) -> PlainAttention | None:
    """None where keys and values are made otherwise: fused, from a latent, or with sinks."""
    layer = program.layers[index]
    attends = [i for i, step in enumerate(layer) if isinstance(step, Attend)]
    if len(attends) != 1:
        return None
    before, attend = layer[: attends[0]], layer[attends[0]]
    assert isinstance(attend, Attend)
    stores = [step for step in before if isinstance(step, StoreKV)]
    shape = program.caches[index]
    if len(stores) != 1 or attend.sinks is not None:
        return None
    keys = _made_by(before, stores[0].keys, (AddBias, RMSNorm, Rope))
    values = _made_by(before, stores[0].values, (AddBias,))
    if keys is None or values is None or keys.name == values.name:
        return None
    if keys.n_rows != shape.n_kv_heads * shape.key_dim:
        return None
    if values.n_rows != shape.n_kv_heads * shape.value_dim:
        return None
    return PlainAttention(before, attend, stores[0], keys, values)


class AttentionMoments:
    """Adds up what windows of tokens make of a layer's attention."""

    def __init__(self, program: Program, index: int, found: PlainAttention, *, room: int) -> None:
        """Moments of all KV heads together where those of each would not fit into `room` bytes."""
        self._found = found
        self._shape = shape = program.caches[index]
        widths = program.buffers
        stored, queries = found.stored, found.attend.queries
        kept = {name: widths[name] for name in (queries, stored.keys, stored.values)}
        span = Span(
            tuple(step for step in found.before if not isinstance(step, StoreKV)),
            (),
            {"x": widths["x"]},
            kept,
        )
        self._backend = ReferenceBackend(Stage(widths, (span,), ()), n_ctx=0)
        n_columns = found.values.n_columns
        one_each = 8 * shape.n_kv_heads * n_columns * n_columns <= room
        n_sums = shape.n_kv_heads if one_each else 1
        self.values = [np.zeros((n_columns, n_columns), np.float32) for _ in range(n_sums)]
        self.keys = [np.zeros_like(sum_) for sum_ in self.values]

    def add(self, x: Floats) -> None:
        """x (n_tokens, dim): the hidden states before the layer, of a window from position 0."""
        found, shape, inputs = self._found, self._shape, {}

        def keep(matrix: Matrix, given: Floats) -> None:
            inputs[matrix.name] = given.copy()

        made = self._backend.run(0, {"x": x}, 0, 0, keep)
        queries = made[found.attend.queries]
        n_tokens = len(x)
        keys = made[found.stored.keys].reshape(n_tokens, shape.n_kv_heads, -1)
        values = made[found.stored.values].reshape(n_tokens, shape.n_kv_heads, -1)
        weights = attention_weights(queries, keys, found.attend, n_heads=shape.n_heads, start=0)
        group = shape.n_heads // shape.n_kv_heads
        lengths = np.square(queries.reshape(n_tokens, shape.n_heads, -1)).sum(axis=2)
        x_values, x_keys = (inputs[matrix.name] for matrix in (found.values, found.keys))
        for head in range(shape.n_kv_heads):
            mixes = np.zeros((n_tokens, n_tokens), np.float32)
            counts = np.zeros(n_tokens, np.float32)
            v = values[:, head]
            for one in range(head * group, (head + 1) * group):
                a = weights[one]
                mixes += a.T @ a
                counts += _key_weights(a, v, lengths[:, one])
            place = head if len(self.values) > 1 else 0
            self.values[place] += x_values.T @ (mixes @ x_values)
            scaled = x_keys * np.sqrt(counts)[:, None]
            self.keys[place] += scaled.T @ scaled

    def take(self, name: str) -> list[Floats] | None:
        """The moments for each KV head's rows of a tensor, if it is one of the two.

        They are gone from here.
        """
        taken = None
        if name == self._found.values.name:
            taken, self.values = self.values, []
        elif name == self._found.keys.name:
            taken, self.keys = self.keys, []
        return taken


def _key_weights(weights: Floats, values: Floats, lengths: Floats) -> Floats:
    """(n_tokens,): the sum over queries of A^2 |v - o|^2 |q|^2."""
    outputs = weights @ values
    squares = np.square(weights)
    apart = outputs @ values.T
    apart *= squares
    # |v - o|^2 = |v|^2 + |o|^2 - 2 o v, each summed by a product; rounding may leave it below 0.
    counts = (lengths @ squares) * np.square(values).sum(axis=1)
    counts += (lengths * np.square(outputs).sum(axis=1)) @ squares
    counts -= 2 * (lengths @ apart)
    positive: Floats = np.maximum(counts, 0)
    return positive


def _made_by(
    steps: tuple[Instruction, ...], buffer: str, then: tuple[type[Instruction], ...]
) -> Matrix | None:
    """The whole tensor whose product a buffer holds, if no more than `then` was done to it."""
    made = [step for step in steps if isinstance(step, MatMul) and step.target == buffer]
    others = [s for s in steps if getattr(s, "target", None) == buffer and s not in made]
    if len(made) != 1 or not all(isinstance(step, then) for step in others):
        return None
    matrix = made[0].matrix
    same = [s for s in steps if isinstance(s, MatMul) and s.matrix.name == matrix.name]
    return matrix if len(same) == 1 and matrix.index is None else None
