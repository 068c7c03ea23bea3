"""The launches of products, and of what makes their activations int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.backends.cuda_draft import Constants, Draft
from runtime.backends.cuda_formats import WHOLE, blocks_held, kept_as
from runtime.backends.cuda_fusion import Group
from runtime.backends.cuda_room import is_quantised
from runtime.kernels.cuda.products import MOST_TOGETHER, PRODUCTS, WARPS, matvecs_of, quantise
from runtime.kernels.cuda.products import ROWS as ROWS_OF_BLOCK
from runtime.kernels.cuda.tiles import ROWS, THREADS, TILES, TOKENS, Tiles, sort_slots
from runtime.program import Add, AddBias, ExpertBias, ExpertMatMul, Floats, MatMul, Matrix

FEW_TOKENS = 8  # up to here a warp for two rows and a token; more share tiles


class Products:
    """Drafts products; knows whose activations are int8 now, and whose slots are sorted."""

    def __init__(self, draft: Draft, constants: Constants, tiles: Mapping[str, Tiles]) -> None:
        self._draft = draft
        self._constants = constants
        self._tiles = tiles
        self._quantised: tuple[str, int] | None = None  # the buffer and width that are int8
        self._sorted: str | None = None  # the routes whose slots are sorted

    def forget(self, name: str) -> None:
        """A buffer was written."""
        if self._quantised is not None and self._quantised[0] == name:
            self._quantised = None
        if self._sorted == name:
            self._sorted = None

    def quantised(self, name: str, width: int) -> None:
        """A kernel has made int8 of what it wrote to a buffer."""
        self._quantised = name, width

    def matmuls(self, group: Group) -> None:
        """MatMul... AddBias... [Add], of one source."""
        steps = [step for step in group if isinstance(step, MatMul)]
        if self._draft.n > FEW_TOKENS:
            (step,) = group
            assert isinstance(step, MatMul)
            self._tile(step)
            return
        biases = {step.target: step.bias for step in group if isinstance(step, AddBias)}
        total = group[-1].target if isinstance(group[-1], Add) else None
        alike: dict[tuple[str, int], list[MatMul]] = {}
        for step in steps:
            key = kept_as(step.matrix.quant), step.matrix.n_columns
            alike.setdefault(key, []).append(step)
        runs = [
            parts[first : first + MOST_TOGETHER]
            for parts in alike.values()
            for first in range(0, len(parts), MOST_TOGETHER)
        ]
        if len(runs) == 2 and _go_together(*runs):
            self._rows(runs[0], runs[1], biases, total)
            return
        for run in runs:
            self._rows(run, [], biases, total)

    def experts(self, group: Group) -> None:
        """ExpertMatMul [ExpertBias]"""
        step = group[0]
        assert isinstance(step, ExpertMatMul)
        draft, matrix, n_experts = self._draft, step.experts[0], len(step.experts)
        width = taken(step, draft.width(step.source))
        slot_stride = matrix.n_columns if width > matrix.n_columns else 0
        activations = self._activations(step.source, matrix, width)
        size = (matrix.n_rows, matrix.n_columns, blocks_held(matrix))
        arguments = (
            *(self._constants.weights(*step.experts), *activations, slot_stride),
            *(*draft.places(step.target), *size),
        )
        routes = draft.places(step.routes)
        if draft.n <= FEW_TOKENS:
            biases = next((each.biases for each in group if isinstance(each, ExpertBias)), None)
            grid = (-(-matrix.n_rows // ROWS_OF_BLOCK), draft.n, step.n_used)
            kernel = PRODUCTS[kept_as(matrix.quant)].expert_matvec
            draft.add(kernel, grid, (32, WARPS), (*arguments, *routes, *self._bias(biases)))
            return
        room = draft.room
        if self._sorted != step.routes:
            lists = (*routes, draft.n, step.n_used, n_experts, room.order, room.starts)
            draft.add(sort_slots, (1, 1, 1), (THREADS, 1), lists, 4 * n_experts)
            self._sorted = step.routes
        # No expert gets a token twice.
        grid = (-(-matrix.n_rows // ROWS), -(-draft.n // TOKENS), n_experts)
        lists = (room.order, room.starts, step.n_used)
        draft.add(self._kernels(matrix).expert_matmul, grid, (THREADS, 1), (*arguments, *lists))

    # --- helpers ---------------------------------------------------------------------------

    def _activations(self, source: str, matrix: Matrix, width: int) -> tuple[Any, ...]:
        """xq, xd, xs and a token's stride, as the products of the matrix's format read them."""
        buffer = self._draft.buffer(source)
        if not is_quantised(matrix):
            nothing = self._draft.room.nothing
            return buffer.array, nothing, nothing, buffer.stride
        room = self._draft.room.quantised
        if self._quantised != (source, width):
            arguments = (buffer.array, buffer.stride, room.values, room.scales, room.sums, width)
            grid = (-(-width // (32 * WARPS)), self._draft.n, 1)
            self._draft.add(quantise, grid, (32, WARPS), arguments)
            self._quantised = source, width
        return room.values, room.scales, room.sums, width

    def _rows(
        self,
        first: Sequence[MatMul],
        second: Sequence[MatMul],
        biases: Mapping[str, Floats],
        total: str | None,
    ) -> None:
        """A warp for two rows of any of these, of one format and of another.

        One alone may be added to a total.
        """
        draft, parts = self._draft, [*first, *second]
        matrix, name = parts[0].matrix, kept_as(parts[0].matrix.quant)
        activations = self._activations(parts[0].source, matrix, matrix.n_columns)
        each = [
            (
                *(self._constants.weights(part.matrix), blocks_held(part.matrix)),
                *(*draft.places(part.target), part.matrix.n_rows),
                *self._bias(biases.get(part.target)),
            )
            for part in parts
        ]
        grid = (sum(-(-part.matrix.n_rows // ROWS_OF_BLOCK) for part in parts), draft.n, 1)
        arguments = (*activations, matrix.n_columns)
        if len(parts) == 1:
            arguments = (*arguments, *each[0], *draft.total(total))
            draft.add(PRODUCTS[name].matvec, grid, (32, WARPS), arguments)
            return
        kernel = matvecs_of(name, kept_as(parts[-1].matrix.quant))
        # Places that are empty get what is there, of the same types; no block comes to them.
        each += each[:1] * (MOST_TOGETHER - len(each))
        arguments = (*arguments, len(first), *(value for part in each for value in part))
        draft.add(kernel, grid, (32, WARPS), arguments)

    def _tile(self, step: MatMul) -> None:
        """A tile of rows and tokens for each block."""
        draft, matrix = self._draft, step.matrix
        activations = self._activations(step.source, matrix, matrix.n_columns)
        size = (matrix.n_rows, matrix.n_columns, blocks_held(matrix), draft.n)
        weights = self._constants.weights(matrix)
        arguments = (weights, *activations, *draft.places(step.target), *size)
        grid = (-(-matrix.n_rows // ROWS), -(-draft.n // TOKENS), 1)
        draft.add(self._kernels(matrix).matmul, grid, (THREADS, 1), arguments)

    def _kernels(self, matrix: Matrix) -> Tiles:
        tiles = TILES if matrix.n_columns % WHOLE else self._tiles
        return tiles[kept_as(matrix.quant)]

    def _bias(self, bias: Floats | None) -> tuple[Any, bool]:
        return self._constants.vector(bias), bias is not None


def _go_together(first: Sequence[MatMul], second: Sequence[MatMul]) -> bool:
    """Whether one launch may do products of two formats: few, of activations of one kind."""
    a, b = first[0].matrix, second[0].matrix
    fit = len(first) + len(second) <= MOST_TOGETHER and a.n_columns == b.n_columns
    return fit and is_quantised(a) == is_quantised(b)


def taken(step: MatMul | ExpertMatMul, width: int) -> int:
    """The numbers per token that a product takes of a source that holds `width`."""
    if isinstance(step, MatMul):
        return step.matrix.n_columns
    n_columns = step.experts[0].n_columns
    each = step.n_used * n_columns
    return each if width == each else n_columns
