"""Lowering products with matrices, and quantising what they are multiplied with."""

from __future__ import annotations

import numpy as np

from gguf_tools.jit import Kernel
from runtime.backends.frame import Batch, Frame
from runtime.backends.table import WHOLE, Table, Units, columns, items, reads, writes
from runtime.kernels import matmul
from runtime.kernels.activations import Activation
from runtime.kernels.formats import FormatKernels
from runtime.kernels.table import FORMATS
from runtime.program import ExpertMatMul, MatMul, Matrix


class Forms:
    """Memory for quantised activations, one piece per form, and what each holds now.

    A form is used as long as no buffer that it was made from is written again.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, ...]] = {}
        self._holds: dict[str, tuple[tuple[str, ...], int]] = {}

    def place(self, form: str) -> tuple[int, ...] | None:
        return self._places.get(form)

    def add(self, form: str, place: tuple[int, ...]) -> tuple[int, ...]:
        self._places[form] = place
        return place

    def holds(self, form: str, buffers: tuple[str, ...], k: int) -> bool:
        """Whether it was made from `buffers`, of rows of k; from now on it is."""
        found = self._holds.get(form) == (buffers, k)
        self._holds[form] = (buffers, k)
        return found

    def written(self, buffer: str) -> None:
        self._holds = {form: held for form, held in self._holds.items() if buffer not in held[0]}

    def clear(self) -> None:
        self._holds.clear()


def lower_product(frame: Frame, forms: Forms, table: Table, step: MatMul) -> None:
    kernels = FORMATS[step.matrix.quant.name]
    if frame.one_token:
        _matvec(frame, forms, table, step, kernels)
    elif frame.batch is Batch.FEW:
        _matvec_few(frame, forms, table, step, kernels)
    elif kernels.group:
        _matmul_bytes(frame, forms, table, step, kernels)
    else:
        _matmul_floats(frame, table, step, kernels)


def _matvec(frame: Frame, forms: Forms, table: Table, step: MatMul, kernels: FormatKernels) -> None:
    matrix, source = step.matrix, frame.places[step.source]
    accesses = frame.access(step.target, columns(matrix.n_rows), written=True)
    # Also where each thread reads bytes of its own, made of it: a late one may not have yet.
    accesses += frame.access(step.source, WHOLE)
    if kernels.activation.quantise is None:
        place: tuple[int, ...] = (source.base, source.thread_stride)
    else:
        place = quantised(frame, forms, table, step.source, kernels.activation, matrix.n_columns)
    arguments = (
        *_matrix(frame, matrix),
        kernels.matvec.address,
        *place,
        frame.places[step.target].base,
    )
    width, n_bytes = matrix.n_rows, matrix.data.size
    frame.add_product(table, matmul.matvec, arguments, accesses, width=width, n_bytes=n_bytes)


def quantised(
    frame: Frame, forms: Forms, table: Table, source: str, form: Activation, k: int
) -> tuple[int, ...]:
    """Each thread's own bytes of the (one) token in `source`, made unless still valid."""
    assert form.quantise is not None
    place = own_form(frame, forms, form)
    if not forms.holds(form.name, (source,), k):
        place_in = frame.places[source].arguments
        arguments = (*place_in, *place, 0, form.quantise.address, k)
        table.add(matmul.quantise, arguments, frame.access(source, WHOLE), Units(fixed=1))
    return place


def _matvec_few(
    frame: Frame, forms: Forms, table: Table, step: MatMul, kernels: FormatKernels
) -> None:
    matrix = step.matrix
    accesses = frame.access(step.target, columns(matrix.n_rows), written=True)
    if kernels.activation.quantise is None:
        source = frame.places[step.source]
        place: tuple[int, ...] = (source.base, source.token_stride)
        accesses += frame.access(step.source, WHOLE)
    else:
        place = _quantised_few(frame, forms, table, step, kernels.activation)
        accesses.append(reads(f"columns {kernels.activation.name}"))
    target = frame.places[step.target]
    arguments = (
        *_matrix(frame, matrix),
        *(k.address for k in few_columns(kernels)),
        *place,
        *(target.base, target.token_stride),
    )
    width, n_bytes = matrix.n_rows, matrix.data.size
    frame.add_product(table, matmul.matvec_few, arguments, accesses, width=width, n_bytes=n_bytes)


def few_columns(kernels: FormatKernels) -> list[Kernel]:
    """A format's matvec for one column, for two, and so on."""
    return [kernels.matvec.for_columns(n) for n in range(1, matmul.MOST_COLUMNS + 1)]


def _quantised_few(
    frame: Frame, forms: Forms, table: Table, step: MatMul, form: Activation
) -> tuple[int, ...]:
    """A row of bytes for each token of the source, made unless still valid: base and stride."""
    assert form.quantise is not None
    place = forms.place(form.name)
    if place is None:
        stride = max(form_bytes(form, k) for k, _ in _shapes(frame))
        base = frame.memory.arena.zeros(matmul.FEW_TOKENS * stride)
        place = forms.add(form.name, (base, stride))
    k = step.matrix.n_columns
    if not forms.holds(form.name, (step.source,), k):
        source = frame.places[step.source].arguments
        arguments = (*source, place[0], 0, place[1], form.quantise.address, k)
        accesses = frame.access(step.source, items(1))
        accesses.append(writes(f"columns {form.name}", items(1)))
        frame.add_items(table, matmul.quantise, arguments, accesses, 1)
    return place


def own_form(frame: Frame, forms: Forms, form: Activation) -> tuple[int, ...]:
    """Memory of each thread for activations in `form`: base and bytes per thread."""
    place = forms.place(form.name)
    if place is None:
        sizes = (slots * form_bytes(form, k) for k, slots in _shapes(frame))
        owned = frame.own(max(sizes))
        place = forms.add(form.name, (owned.base, owned.thread_stride))
    return place


def form_bytes(form: Activation, k: int) -> int:
    """Bytes of one row of k in `form`, in whole cache lines."""
    return (form.size(k) + 63) // 64 * 64


def _shapes(frame: Frame) -> set[tuple[int, int]]:
    """Columns of every matrix, and rows of activations that one token has for it."""
    steps = frame.stage.steps
    dense = {(step.matrix.n_columns, 1) for step in steps if isinstance(step, MatMul)}
    chosen = (step for step in steps if isinstance(step, ExpertMatMul))
    return dense | {(step.experts[0].n_columns, step.n_used) for step in chosen}


def _matmul_floats(frame: Frame, table: Table, step: MatMul, kernels: FormatKernels) -> None:
    target = frame.places[step.target]
    arguments = floats_arguments(
        _matrix(frame, step.matrix),
        kernels,
        step.matrix.quant.block_bytes,
        frame.places[step.source].arguments,
        (target.base, target.token_stride),
    )
    accesses = frame.access(step.target, columns(step.matrix.n_rows), written=True)
    accesses += frame.access(step.source, WHOLE)
    width, n_bytes = step.matrix.n_rows, step.matrix.data.size
    kernel = matmul.matmul_floats
    frame.add_product(table, kernel, arguments, accesses, width=width, n_bytes=n_bytes)


def _matmul_bytes(
    frame: Frame, forms: Forms, table: Table, step: MatMul, kernels: FormatKernels
) -> None:
    k, target = step.matrix.n_columns, frame.places[step.target]
    form = f"{kernels.group}/{kernels.bias}"
    width = max(k for k, _ in _shapes(frame))
    place = byte_columns(frame, forms, form, kernels, width, frame.memory.n_batch)
    if not forms.holds(form, (step.source,), k):
        shape = (k, kernels.group, kernels.bias)
        source = (*frame.places[step.source].arguments, *place, *shape)
        makes = frame.access(step.source, items(1))
        makes.append(writes(f"columns {form}", items(1)))
        frame.add_items(table, matmul.quantise_columns, source, makes, 1)
    arguments = bytes_arguments(
        _matrix(frame, step.matrix), kernels, place, (target.base, target.token_stride)
    )
    accesses = frame.access(step.target, columns(step.matrix.n_rows), written=True)
    accesses.append(reads(f"columns {form}"))
    width, n_bytes = step.matrix.n_rows, step.matrix.data.size
    kernel = matmul.matmul_bytes
    frame.add_product(table, kernel, arguments, accesses, width=width, n_bytes=n_bytes)


def byte_columns(
    frame: Frame, forms: Forms, form: str, kernels: FormatKernels, width: int, n_columns: int
) -> tuple[int, ...]:
    """Room for rows of bytes for the tile: q, scales, corrections, sums, and their strides."""
    place = forms.place(form)
    if place is None:
        q_stride = (width + 63) // 64 * 64 + 64
        meta_stride = (width // kernels.group * 4 + 63) // 64 * 64 + 64
        arena = frame.memory.arena
        metas = [arena.zeros(n_columns * meta_stride) for _ in range(3)]
        q = arena.zeros(n_columns * q_stride)
        place = forms.add(form, (q, *metas, q_stride, meta_stride))
    return place


def bytes_arguments(
    matrix: tuple[int, int, int, int],
    kernels: FormatKernels,
    place: tuple[int, ...],
    target: tuple[int, int],
) -> tuple[int, ...]:
    """The arguments of matmul_bytes."""
    return (
        *matrix,
        kernels.rows.address,
        matmul.tile_for(kernels).address,
        *place,
        *target,
        kernels.group,
        int(kernels.has_offset),
    )


def floats_arguments(
    matrix: tuple[int, int, int, int],
    kernels: FormatKernels,
    weight_bytes: int,
    source: tuple[int, int, int],
    target: tuple[int, int],
) -> tuple[int, ...]:
    """The arguments of matmul_floats."""
    functions = (kernels.rows.address, matmul.tile_floats.address)
    return (*matrix, *functions, weight_bytes, *source, *target)


def _matrix(frame: Frame, matrix: Matrix) -> tuple[int, int, int, int]:
    address = frame.memory.arena.hold(np.asarray(matrix.data))
    return address, matrix.data.shape[1], matrix.n_rows, matrix.n_columns
