"""Lowering mixtures of experts (runtime/kernels/experts.py)."""

from __future__ import annotations

import numpy as np

from gguf_tools.jit import Kernel
from runtime.backends.frame import EACH, Frame, row_groups
from runtime.backends.products import (
    Forms,
    byte_columns,
    bytes_arguments,
    floats_arguments,
    form_bytes,
    own_form,
    quantised,
)
from runtime.backends.table import WHOLE, Table, Units, columns, items, reads, writes
from runtime.kernels import experts, matmul
from runtime.kernels.formats import FormatKernels
from runtime.kernels.interpreter import ARGUMENTS, HEADER
from runtime.kernels.table import FORMATS
from runtime.program import ExpertBias, ExpertMatMul, ExpertSum, Route

# The arguments of matmul_bytes and matmul_floats that differ between experts: the target, and the
# columns: the first, and how many follow each other.
BYTES_TARGET, BYTES_COLUMNS = 12, (6, 4)
FLOATS_TARGET, FLOATS_COLUMNS = 10, (7, 1)


class Mixture:
    """Lowers what chooses experts and what they do."""

    def __init__(self, frame: Frame, forms: Forms) -> None:
        self.frame = frame
        self.forms = forms
        self._addresses: dict[int, int] = {}
        self._sorted: dict[str, int] = {}
        steps = frame.stage.steps
        self._summed = {step.source for step in steps if isinstance(step, ExpertSum)}

    def route(self, table: Table, step: Route) -> None:
        frame = self.frame
        n_experts = frame.width(step.scores)
        if not 0 < step.n_used <= n_experts:
            raise ValueError(f"{step.n_used} of {n_experts} experts cannot be chosen")
        if n_experts % step.n_groups or step.n_groups > experts.MAX_GROUPS:
            raise ValueError(f"{n_experts} experts do not lie in {step.n_groups} groups")
        if not (0 < step.n_groups_used <= step.n_groups and step.n_compared in (1, 2)):
            raise ValueError(f"{step.n_groups_used} groups cannot be chosen")
        owned = frame.is_owned(step.routes)
        arguments = (
            *frame.places[step.scores].arguments,
            *frame.places[step.routes].arguments,
            n_experts,
            step.n_used,
            experts.GATINGS[step.gating],
            int(step.normalize),
            float(step.scale),
            frame.vector(step.bias),
            step.n_groups,
            step.n_groups_used,
            step.n_compared,
        )
        accesses = [
            *frame.access(step.scores, WHOLE if owned else items(1)),
            *frame.access(step.routes, items(1), written=True),
        ]
        frame.add_items(table, experts.route, arguments, accesses, 1, owned=owned)

    def product(self, table: Table, step: ExpertMatMul) -> None:
        if self.frame.one_token:
            self._matvec(table, step)
        else:
            self._matmul(table, step)

    def bias(self, table: Table, step: ExpertBias) -> None:
        frame = self.frame
        n_rows = step.biases.shape[1]
        width, wide = self._sharing(step.target, step.n_used, n_rows)
        arguments = (
            *frame.places[step.target].arguments,
            *frame.places[step.routes].arguments,
            step.n_used,
            frame.memory.arena.hold(np.ascontiguousarray(step.biases, np.float32)),
            n_rows,
            int(wide),
        )
        accesses = [
            *frame.access(step.routes, WHOLE),
            *frame.access(step.target, columns(width), written=True),
        ]
        units = Units(row_groups(width), parts=frame.memory.n_threads)
        table.add(experts.expert_bias, arguments, accesses, units, columns(width))

    def sum(self, table: Table, step: ExpertSum) -> None:
        frame = self.frame
        width = frame.width(step.source) // step.n_used
        arguments = (
            *frame.places[step.source].arguments,
            *frame.places[step.routes].arguments,
            step.n_used,
            *frame.places[step.target].arguments,
            width,
        )
        accesses = [
            *frame.access(step.source, columns(width)),
            *frame.access(step.routes, WHOLE),
            *frame.access(step.target, columns(width), written=True),
        ]
        units = Units(row_groups(width), parts=frame.memory.n_threads)
        table.add(experts.expert_sum, arguments, accesses, units, columns(width))

    # --- one token -----------------------------------------------------------------------

    def _matvec(self, table: Table, step: ExpertMatMul) -> None:
        frame, matrix = self.frame, step.experts[0]
        kernels = FORMATS[matrix.quant.name]
        width, wide = self._sharing(step.target, step.n_used, matrix.n_rows)
        accesses = [
            *frame.access(step.routes, WHOLE),
            *frame.access(step.source, WHOLE),
            *frame.access(step.target, columns(width), written=True),
        ]
        if kernels.activation.quantise is None:
            source = frame.places[step.source]
            row = matrix.n_columns * 4 if self._has_slots(step) else 0
            place: tuple[int, ...] = (source.base, source.thread_stride, row)
        else:
            place = self._quantised(table, step, kernels)
        routes = frame.places[step.routes]
        arguments = (
            self._experts(step),
            matrix.data.shape[1],
            matrix.n_rows,
            matrix.n_columns,
            kernels.matvec.address,
            *place,
            frame.places[step.target].base,
            routes.base,
            routes.thread_stride,
            step.n_used,
            int(wide),
        )
        n_bytes = step.n_used * matrix.data.size
        kernel = experts.expert_matvec
        frame.add_product(table, kernel, arguments, accesses, width=width, n_bytes=n_bytes)

    def _quantised(
        self, table: Table, step: ExpertMatMul, kernels: FormatKernels
    ) -> tuple[int, ...]:
        """Each thread's own bytes of the source: base, bytes per thread, bytes per slot."""
        form, k = kernels.activation, step.experts[0].n_columns
        if not self._has_slots(step):
            place = quantised(self.frame, self.forms, table, step.source, form, k)
            return (*place, 0)
        assert form.quantise is not None
        row = form_bytes(form, k)
        place = (*own_form(self.frame, self.forms, form), row)
        if not self.forms.holds(form.name, (step.source,), k):
            source = self.frame.places[step.source].arguments
            arguments = (*source, *place, form.quantise.address, k, step.n_used)
            accesses = self.frame.access(step.source, WHOLE)
            table.add(experts.quantise_slots, arguments, accesses, Units(fixed=1))
        return place

    # --- many tokens ---------------------------------------------------------------------

    def _matmul(self, table: Table, step: ExpertMatMul) -> None:
        frame, matrix = self.frame, step.experts[0]
        kernels = FORMATS[matrix.quant.name]
        pairs = self._pairs(table, step)
        shape = (0, matrix.data.shape[1], matrix.n_rows, matrix.n_columns)
        product = np.zeros(HEADER + ARGUMENTS, np.int64)
        if kernels.group:
            form, place, few = self._byte_columns(table, step, kernels, pairs)
            words = bytes_arguments(shape, kernels, place, (0, 0))
            kernel, target, counted = matmul.matmul_bytes, BYTES_TARGET, BYTES_COLUMNS
            strides = place[4:]
        else:
            form, base, stride = self._float_columns(table, step, pairs)
            words = floats_arguments(
                shape, kernels, matrix.quant.block_bytes, (base, 0, stride), (0, 0)
            )
            kernel, target, counted = matmul.matmul_floats, FLOATS_TARGET, FLOATS_COLUMNS
            strides, few = (stride, 0), (base, stride)
        product[HEADER : HEADER + len(words)] = words
        place_of_target = frame.places[step.target]
        arguments = (
            frame.memory.arena.hold(product),
            kernel.address,
            self._experts(step),
            len(step.experts),
            self._sorted[step.routes],
            step.n_used,
            matrix.n_rows,
            matmul.scratch_bytes(matrix.n_columns),
            place_of_target.base,
            place_of_target.token_stride,
            target,
            *counted,
            *strides,
            kernels.matvec.address,
            *few,
        )
        accesses = [
            reads(f"columns {form}"),
            reads(f"sorted {step.routes}"),
            *frame.access(step.target, columns(matrix.n_rows), written=True),
        ]
        units = Units(row_groups(matrix.n_rows), parts=EACH)
        table.add(experts.expert_matmul, arguments, accesses, units, columns(matrix.n_rows))

    def _pairs(self, table: Table, step: ExpertMatMul) -> int:
        """The address of the pairs of tokens and slots, sorted by expert."""
        frame, routes, n_experts = self.frame, step.routes, len(step.experts)
        if routes not in self._sorted:
            steps = (s for s in frame.stage.steps if isinstance(s, ExpertMatMul))
            same = [s for s in steps if s.routes == routes]
            n_pairs = frame.memory.n_batch * max(s.n_used for s in same)
            most = max(len(s.experts) for s in same)
            size = experts.sorted_bytes(most, n_pairs)
            self._sorted[routes] = frame.memory.arena.zeros(size)
        if not self.forms.holds(f"sorted {routes}", (routes,), n_experts):
            place = (*frame.places[routes].arguments, n_experts, step.n_used, self._sorted[routes])
            accesses = [*frame.access(routes, WHOLE), writes(f"sorted {routes}", WHOLE)]
            table.add(experts.sort_pairs, place, accesses, Units(fixed=1, parts=1))
        return self._sorted[routes] + (n_experts + 1) * 8

    def _byte_columns(
        self, table: Table, step: ExpertMatMul, kernels: FormatKernels, pairs: int
    ) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        """The source's rows as bytes, one for each pair: their form, columns for the tile, and
        rows for matvec, which experts with few pairs have instead (address, bytes per row)."""
        k, activation = step.experts[0].n_columns, kernels.activation
        assert activation.quantise is not None
        form = f"{kernels.group}/{kernels.bias}/{activation.name}/sorted"
        width, n_columns = self._widest()
        place = byte_columns(self.frame, self.forms, form, kernels, width, n_columns)
        room = self.forms.place(f"{form}/few")
        if room is None:
            stride = form_bytes(activation, width)
            base = self.frame.memory.arena.zeros(n_columns * stride)
            room = self.forms.add(f"{form}/few", (base, stride))
        few = (room[0], room[1])
        routes = self.frame.places[step.routes]
        arguments = (
            *self._sources(step, pairs),
            *place,
            *(k, kernels.group, kernels.bias),
            *(self._sorted[step.routes], routes.base, routes.token_stride),
            *(activation.quantise.address, *few),
        )
        self._make_columns(table, step, form, experts.quantise_sorted, arguments)
        return form, place, few

    def _float_columns(self, table: Table, step: ExpertMatMul, pairs: int) -> tuple[str, int, int]:
        """The source's rows, one for each pair: their form, address, bytes per row."""
        form = "floats/sorted"
        place = self.forms.place(form)
        if place is None:
            width, n_columns = self._widest()
            stride = (width * 4 + 63) // 64 * 64 + 64
            place = self.forms.add(
                form, (self.frame.memory.arena.zeros(n_columns * stride), stride)
            )
        arguments = (*self._sources(step, pairs), *place, step.experts[0].n_columns)
        self._make_columns(table, step, form, experts.gather_sorted, arguments)
        return form, place[0], place[1]

    def _make_columns(
        self,
        table: Table,
        step: ExpertMatMul,
        form: str,
        kernel: Kernel,
        arguments: tuple[int, ...],
    ) -> None:
        k = step.experts[0].n_columns
        if self.forms.holds(form, (step.source, step.routes), k):
            return
        accesses = [
            *self.frame.access(step.source, WHOLE),
            *self.frame.access(step.routes, WHOLE),
            reads(f"sorted {step.routes}"),
            writes(f"columns {form}", items(step.n_used)),
        ]
        self.frame.add_items(table, kernel, arguments, accesses, step.n_used)

    def _sources(self, step: ExpertMatMul, pairs: int) -> tuple[int, ...]:
        """Where the rows of sorted pairs are."""
        row = step.experts[0].n_columns if self._has_slots(step) else 0
        return (*self.frame.places[step.source].arguments, step.n_used, row, pairs)

    def _widest(self) -> tuple[int, int]:
        """The most columns of an expert, and the most pairs of a batch and a last tile more."""
        steps = [s for s in self.frame.stage.steps if isinstance(s, ExpertMatMul)]
        n_pairs = self.frame.memory.n_batch * max(step.n_used for step in steps)
        return max(step.experts[0].n_columns for step in steps), n_pairs + matmul.COLUMNS

    # --- helpers -------------------------------------------------------------------------

    def _sharing(self, buffer: str, n_used: int, n_rows: int) -> tuple[int, bool]:
        """Columns that slots are shared out by, and whether they count as one wide row."""
        wide = self.frame.one_token and buffer not in self._summed
        return (n_used * n_rows if wide else n_rows), wide

    def _has_slots(self, step: ExpertMatMul) -> bool:
        """Whether the source has a row for each slot; else it has one for all."""
        k, width = step.experts[0].n_columns, self.frame.width(step.source)
        if width not in (k, step.n_used * k):
            raise ValueError(f"{step.name}: rows of {k} cannot take a source of {width}")
        return width != k

    def _experts(self, step: ExpertMatMul) -> int:
        """The address of the table of addresses."""
        key = id(step.experts)
        if key not in self._addresses:
            arena = self.frame.memory.arena
            table = np.array(
                [arena.hold(np.asarray(expert.data)) for expert in step.experts], np.int64
            )
            self._addresses[key] = arena.hold(table)
        return self._addresses[key]
