"""What lowering any instruction needs: where buffers lie, how wide they are, how work is cut."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from gguf_tools.jit import Kernel
from runtime.backends.flow import owned_buffers
from runtime.backends.memory import Memory, Place
from runtime.backends.table import Access, Table, Units, columns, items
from runtime.kernels.interpreter import ROWS
from runtime.program import Floats, Stage

PART_BYTES = 32768  # of weights, at least, in a part: claiming one costs about 0.1 us
PARTS_PER_THREAD = 4  # at most
EACH = 1 << 30  # parts: claim unit by unit


class Batch(Enum):
    """How many tokens a table is for."""

    ONE = "one"
    FEW = "a few"
    MANY = "many"


class Frame:
    """The memory of a stage as one of its lowerings sees it."""

    def __init__(self, stage: Stage, memory: Memory, batch: Batch, *, owns: bool) -> None:
        """`owns`: threads have buffers of their own for what is cheap to make."""
        self.stage = stage
        self.memory = memory
        self.batch = batch
        self.one_token = batch is Batch.ONE
        self.places = dict(memory.shared)
        self._widths: dict[str, int] = {}  # of what buffers hold now, which may have room for more
        self._vectors: dict[int, int] = {}
        if owns:
            for name in sorted(owned_buffers(stage)):
                self.places[name] = self.own(stage.buffers[name] * 4)

    # --- buffers -------------------------------------------------------------------------

    def width(self, buffer: str) -> int:
        return self._widths.get(buffer, self.stage.buffers[buffer])

    def set_width(self, buffer: str, width: int) -> None:
        assert 0 < width <= self.stage.buffers[buffer], (buffer, width)
        self._widths[buffer] = width

    def access(self, buffer: str, sharing: str, *, written: bool = False) -> list[Access]:
        """What the table must know of a buffer; nothing for a thread's own."""
        return [] if self.is_owned(buffer) else [Access(buffer, sharing, written)]

    def is_owned(self, buffer: str) -> bool:
        return self.places[buffer].thread_stride != 0

    def own(self, n_bytes: int) -> Place:
        """Memory for one token in every thread."""
        stride = (n_bytes + 127) // 64 * 64 + 128
        return Place(self.memory.arena.zeros(stride * self.memory.n_threads), stride, stride)

    def vector(self, values: Floats | None) -> int:
        """The address of a vector (or rows of one) with room for 32 more; 0 for none."""
        if values is None:
            return 0
        if id(values) not in self._vectors:
            self._vectors[id(values)] = self.memory.arena.padded(values.reshape(-1))
        return self._vectors[id(values)]

    # --- operations ----------------------------------------------------------------------

    def add_columns(
        self,
        table: Table,
        kernel: Kernel,
        sources: tuple[str, ...],
        target: str,
        *,
        width: int,
        constants: tuple[int | float, ...] = (),
    ) -> None:
        """An operation on columns, claimed with the product that made them where it can be."""
        places = [a for name in (*sources, target) for a in self.places[name].arguments]
        accesses = [a for name in sources for a in self.access(name, columns(width))]
        accesses += self.access(target, columns(width), written=True)
        units = Units(row_groups(width), parts=self.memory.n_threads)
        table.add(kernel, (*places, *constants, width), accesses, units, columns(width))

    def add_items(
        self,
        table: Table,
        kernel: Kernel,
        arguments: Iterable[int | float],
        accesses: Iterable[Access],
        per_token: int,
        *,
        owned: bool = False,
    ) -> None:
        """An operation on items of tokens; for one token they are too little to share out."""
        parts = 0 if owned else 1 if self.one_token else self.most_parts()
        sharing = "" if owned else items(per_token)
        table.add(kernel, arguments, accesses, Units(per_token=per_token, parts=parts), sharing)

    def add_product(
        self,
        table: Table,
        kernel: Kernel,
        arguments: Iterable[int | float],
        accesses: Iterable[Access],
        *,
        width: int,
        n_bytes: int,
    ) -> None:
        """A product that reads n_bytes of weights, in parts that are worth claiming."""
        n_threads = self.memory.n_threads
        rounds = n_bytes // (n_threads * PART_BYTES)
        parts = n_threads * min(max(rounds, 1), PARTS_PER_THREAD)
        units = Units(row_groups(width), parts=parts)
        table.add(kernel, arguments, accesses, units, columns(width))

    def most_parts(self) -> int:
        return self.memory.n_threads * PARTS_PER_THREAD


def row_groups(width: int) -> int:
    """Units of 32 columns, the last of which may be short."""
    return (width + ROWS - 1) // ROWS
