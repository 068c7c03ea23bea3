"""Which neighbouring instructions a GPU runs in one launch. Needs no GPU.

A launch that waits for the one before costs a GPU as much time as reading a megabyte of weights,
and a layer has more than twenty instructions. What is launched together still writes every buffer
that its instructions write one by one, and the same numbers: nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from runtime.backends.cuda_room import is_quantised
from runtime.backends.flow import read_by, width_written, written_by
from runtime.program import (
    Add,
    AddBias,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Instruction,
    KVShape,
    LayerNorm,
    MatMul,
    RMSNorm,
    Rope,
    StoreKV,
)

Group = tuple[Instruction, ...]

# Heads on their way to attention: queries and keys are normed, turned, both, or neither.
HEADS = (
    (RMSNorm, RMSNorm, Rope, Rope, StoreKV),
    (RMSNorm, RMSNorm, StoreKV),
    (Rope, Rope, StoreKV),
)


class Fusion:
    """Finds the steps that go together, given what buffers hold."""

    def __init__(
        self, width: Callable[[str], int], caches: Sequence[KVShape], *, joins_products: bool
    ) -> None:
        """`width` gives the numbers per token in a buffer after the groups given so far."""
        self._width = width
        self._caches = caches
        self._joins_products = joins_products

    def groups(self, steps: Sequence[Instruction]) -> Iterator[tuple[Group, int]]:
        """The steps in order, those together that make one of these; and where the next begins.

            MatMul... AddBias...                  products of one source and their biases
            MatMul [AddBias] Add                  one product, added to another buffer as well
            ExpertMatMul ExpertBias
            RMSNorm, LayerNorm or ExpertSum; Add
            one of HEADS
            any step alone

        Those that begin with a product only if `joins_products`.
        """
        at = 0
        while at < len(steps):
            end = at + self._n_together(steps, at)
            yield tuple(steps[at:end]), end
            at = end

    def _n_together(self, steps: Sequence[Instruction], at: int) -> int:
        """How many steps from step `at` on make a group."""
        match step := steps[at]:
            case MatMul() if self._joins_products:
                return self._n_products(steps, at, step)
            case ExpertMatMul() if self._joins_products:
                return 2 if _is_biased(steps, at + 1, step) else 1
            case LayerNorm() | ExpertSum():
                return 2 if self._is_added(steps, at + 1, step) else 1
            case RMSNorm():
                alone = 2 if self._is_added(steps, at + 1, step) else 1
                return max(alone, self._n_heads(steps, at))
            case Rope():
                return max(1, self._n_heads(steps, at))
            case _:
                return 1

    def _n_products(self, steps: Sequence[Instruction], at: int, first: MatMul) -> int:
        """Products that read one buffer and write others, each its own."""
        if first.target == first.source:
            return 1
        n, unbiased, targets = 1, {first.target: first.matrix.n_rows}, {first.target}
        for step in islice(steps, at + 1, None):
            if isinstance(step, MatMul) and step.source == first.source:
                if step.target in targets or step.target == first.source:
                    break
                targets.add(step.target)
                unbiased[step.target] = step.matrix.n_rows
            elif not isinstance(step, AddBias) or unbiased.get(step.target) != len(step.bias):
                break
            else:
                del unbiased[step.target]
            n += 1
        if len(targets) == 1 and self._is_added(steps, at + n, first):
            n += 1
        return n

    def _is_added(self, steps: Sequence[Instruction], at: int, made: Instruction) -> bool:
        """Whether step `at` adds all of what was made to a buffer that its making doesn't touch."""
        step = steps[at] if at < len(steps) else None
        return (
            isinstance(step, Add)
            and step.source == written_by(made)
            and step.target not in (step.source, *read_by(made))
            and self._width(step.target) == width_written(made, self._width, self._caches)
        )

    def _n_heads(self, steps: Sequence[Instruction], at: int) -> int:
        """The length of the one of HEADS that begins with step `at`; 0 for none."""
        for kinds in HEADS:
            found = steps[at : at + len(kinds)]
            if tuple(map(type, found)) == kinds and self._are_heads(found):
                return len(kinds)
        return 0

    def _are_heads(self, found: Sequence[Instruction]) -> bool:
        """Whether these are the queries and the keys of one attention, in that order."""
        *before, store = found
        assert isinstance(store, StoreKV)
        shape = self._caches[store.layer]
        queries = str(written_by(before[0]))
        if len({queries, store.keys, store.values}) < 3:
            return False
        both = ((queries, shape.n_heads), (store.keys, shape.n_kv_heads))
        sides = (before[::2], before[1::2])
        tables = {id(step.table) for step in before if isinstance(step, Rope)}
        return len(tables) <= 1 and all(
            self._is_of_heads(step, name, n_heads, shape.key_dim)
            for steps, (name, n_heads) in zip(sides, both, strict=True)
            for step in steps
        )

    def _is_of_heads(self, step: Instruction, name: str, n_heads: int, dim: int) -> bool:
        match step:
            case RMSNorm():
                groups = self._width(name) // len(step.weight)
                names, size = (step.source, step.target), (groups, len(step.weight))
                return names == (name, name) and size == (n_heads, dim)
            case Rope():
                return (step.target, step.n_heads, step.head_dim) == (name, n_heads, dim)
            case _:
                return False


def next_int8(steps: Sequence[Instruction], at: int, name: str) -> MatMul | ExpertMatMul | None:
    """The first product of int8 from step `at` on, if it takes the buffer as it is before them."""
    for step in islice(steps, at, None):
        match step:
            case MatMul() if is_quantised(step.matrix):
                return step if step.source == name else None
            case ExpertMatMul() if is_quantised(step.experts[0]):
                return step if step.source == name else None
        if written_by(step) == name:
            return None
    return None


def _is_biased(steps: Sequence[Instruction], at: int, product: ExpertMatMul) -> bool:
    step = steps[at] if at < len(steps) else None
    return (
        isinstance(step, ExpertBias)
        and (step.target, step.routes, step.n_used)
        == (product.target, product.routes, product.n_used)
        and step.biases.shape == (len(product.experts), product.experts[0].n_rows)
        and product.target not in (product.source, product.routes)
    )
