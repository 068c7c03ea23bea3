"""Where the channels of a decoder may be scaled without changing what it computes.

Dividing what feeds a buffer by a number per channel, and multiplying the columns of every matrix
that reads it, cancels out exactly. Three places of a decoder allow that:

    norm -> products            the norm's weight and bias | the columns of all that read it
    v -> attention -> products  v's rows and bias | one scale for a channel of a KV head: the
                                columns of all query heads that read it
    up -> gate -> down          up's rows and bias | down's columns; each expert for itself

They are found in a program's instructions: by what reads what is written, and nothing else. In the
last there must be nothing between but what is linear in `up`, or keeps positive factors (ReLU).
Scaling rows of q and k against each other would be possible, too; a row is quantised for itself,
so nothing is gained by that.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime.backends.flow import read_by, written_by
from runtime.program import (
    Activate,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Matrix,
    Program,
    RMSNorm,
    Show,
    StoreKV,
)
from runtime.streamed_rows import StreamedRows

LINEAR_IN_UP = ("silu", "gelu", "gelu_erf", "relu")  # gates that are an activation times up
HOMOGENEOUS = ("relu",)  # a positive factor before is the same factor after


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix as its file counts them: channel i is row first + i."""

    name: str
    first: int


@dataclass(frozen=True)
class Elements:
    """Elements of a vector, or of a row of a table: channel i is element first + i."""

    name: str
    first: int
    row: int = 0


@dataclass(frozen=True)
class Columns:
    """All columns of a matrix, or of one in a stack."""

    name: str
    index: int | None


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can be scaled: what is divided, and what is multiplied."""

    layer: int  # the number of layers for the head
    n_channels: int
    divided: tuple[Rows | Elements, ...]
    multiplied: tuple[Columns, ...]
    channels: npt.NDArray[np.intp]  # (n_columns,) of each column of what is multiplied

    @property
    def names(self) -> set[str]:
        """The tensors that are changed."""
        return {part.name for part in (*self.divided, *self.multiplied)}


def foldable_groups(program: Program) -> list[Group]:
    """All groups, in the order of the program.

    It must have been built with `stream=True`: a matrix that is not streamed is another form of
    what the file has (deepseek2's keys), and nothing can be said of its rows and columns.
    """
    flow = _Flow(program)
    groups: list[Group] = []
    for place in range(len(flow.steps)):
        groups += flow.groups_at(place)
    return groups


# --- what reads what is written -------------------------------------------------------------------


@dataclass(eq=False)
class _Value:
    """What an instruction writes: a buffer until it is written again."""

    producer: int | None  # the number of the instruction; None for what is there at first
    readers: list[int] = field(default_factory=list)


class _Flow:
    """The values of a program: which instruction makes each, which read it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Instruction] = program.steps
        ends = np.cumsum([len(layer) for layer in program.layers])
        self._layer_of = np.searchsorted(ends, np.arange(len(self.steps)), side="right")
        self._read: list[dict[str, _Value]] = []  # of each instruction, by buffer
        self._written: list[_Value | None] = []
        self._stores: dict[int, list[int]] = defaultdict(list)  # by layer of the KV cache
        self._attends: dict[int, list[int]] = defaultdict(list)
        self._users: dict[str, list[int]] = defaultdict(list)  # of each tensor
        self._follow()

    def groups_at(self, place: int) -> Iterator[Group]:
        """Those whose scales would take effect with this instruction."""
        step = self.steps[place]
        if isinstance(step, (RMSNorm, LayerNorm)):
            yield from self._after_norm(place, step)
        elif isinstance(step, Attend):
            yield from self._after_attention(place, step)
        elif isinstance(step, Gate) and step.activation in LINEAR_IN_UP:
            yield from self._after_feed_forward(place, self._read[place][step.up])
        elif isinstance(step, Activate) and step.activation in HOMOGENEOUS:
            yield from self._after_feed_forward(place, self._read[place][step.target])

    # --- the three kinds -----------------------------------------------------------------

    def _after_norm(self, place: int, step: RMSNorm | LayerNorm) -> Iterator[Group]:
        readers = self._columns_of_readers(place)
        divided = [Elements(step.name, 0)]
        if isinstance(step, LayerNorm) and step.bias is not None:
            divided.append(Elements(step.bias_name, 0))
        if readers is None or step.weight.ndim != 1 or not self._only(place, *divided):
            return
        columns, width = readers
        if width == len(step.weight):
            yield self._group(place, width, divided, columns)

    def _after_attention(self, place: int, step: Attend) -> Iterator[Group]:
        stores = self._stores[step.layer]
        readers = self._columns_of_readers(place)
        if len(stores) != 1 or len(self._attends[step.layer]) != 1 or readers is None:
            return
        store = self.steps[stores[0]]
        assert isinstance(store, StoreKV)
        values = self._read[stores[0]][store.values]
        divided = None if store.keys == store.values else self._rows_before(values, stores[0])
        shape = self.program.caches[step.layer]
        columns, width = readers
        n_channels = shape.n_kv_heads * shape.value_dim
        if divided is None or width != shape.n_heads * shape.value_dim:
            return
        if divided.n_rows != n_channels or len(divided.matrices) != 1:
            return
        heads = np.arange(n_channels, dtype=np.intp).reshape(shape.n_kv_heads, -1)
        channels = np.repeat(heads, shape.n_heads // shape.n_kv_heads, axis=0).reshape(-1)
        yield self._group(place, n_channels, divided.parts(0), columns, channels)

    def _after_feed_forward(self, place: int, up: _Value) -> Iterator[Group]:
        """One group, or one of each expert where there are some."""
        divided = self._rows_before(up, place)
        after = self._written[place]
        if divided is None or after is None:
            return
        if divided.routes is None:
            readers = self._columns_of_readers(place)
            if readers is not None and readers[1] == divided.n_rows:
                yield self._group(place, divided.n_rows, divided.parts(0), readers[0])
            return
        for number, matrix in enumerate(self._experts_after(after, divided)):
            columns = [Columns(matrix.name, matrix.index)]
            yield self._group(place, divided.n_rows, divided.parts(number), columns)

    # --- what they are made of -----------------------------------------------------------

    def _columns_of_readers(self, place: int) -> tuple[list[Columns], int] | None:
        """The matrices that multiply what is written here, and how many columns they have.

        None if anything else reads it, or if they multiply something else as well.
        """
        value = self._written[place]
        if value is None or not value.readers:
            return None
        found: dict[Columns, None] = {}
        widths = set()
        for reader in value.readers:
            step = self.steps[reader]
            if not isinstance(step, (MatMul, ExpertMatMul)):
                return None
            if self._read[reader][step.source] is not value or not self._are_apart(step, value):
                return None
            if isinstance(step, ExpertMatMul) and self._read[reader].get(step.routes) is value:
                return None
            for matrix in _matrices(step):
                found[Columns(matrix.name, matrix.index)] = None
                widths.add(matrix.n_columns)
        return (list(found), widths.pop()) if len(widths) == 1 else None

    def _experts_after(self, value: _Value, up: _Divided) -> Sequence[Matrix]:
        """The experts that multiply `value`, each its own slot; none if anything else reads it."""
        if len(value.readers) != 1:
            return ()
        reader = value.readers[0]
        step = self.steps[reader]
        if not isinstance(step, ExpertMatMul) or not self._are_apart(step, value):
            return ()
        same = self._read[reader][step.routes] is up.routes
        fits = len(step.experts) == len(up.matrices) and step.experts[0].n_columns == up.n_rows
        return step.experts if same and fits else ()

    def _rows_before(self, value: _Value, reader: int) -> _Divided | None:
        """The product that `value` is, with its bias; None if it is more, or read elsewhere."""
        biases: list[AddBias | ExpertBias] = []
        while value.readers == [reader] and value.producer is not None:
            reader = value.producer
            step = self.steps[reader]
            if isinstance(step, (AddBias, ExpertBias)):
                if not self._is_once(step.name, reader):
                    return None
                biases.append(step)
                value = self._read[reader][step.target]
            elif isinstance(step, (MatMul, ExpertMatMul)):
                routes = self._read[reader][step.routes] if isinstance(step, ExpertMatMul) else None
                source = self._read[reader][step.source]
                apart = self._are_apart(step, source)
                once = all(self._is_once(matrix.name, reader) for matrix in _matrices(step))
                return _Divided(_matrices(step), tuple(biases), routes) if apart and once else None
            else:
                return None
        return None

    def _are_apart(self, step: MatMul | ExpertMatMul, value: _Value) -> bool:
        """Whether the file's matrices are these, and multiply nothing but `value`."""
        for matrix in _matrices(step):
            if not isinstance(matrix.data, StreamedRows):
                return False
            for user in self._users[matrix.name]:
                other = self.steps[user] if user >= 0 else None
                if not isinstance(other, (MatMul, ExpertMatMul)):
                    return False
                if self._read[user][other.source] is not value:
                    return False
        return True

    def _is_once(self, name: str, place: int) -> bool:
        """Whether what an instruction uses of a tensor is used by no other."""
        mine = _ranges(self.steps[place], name)
        others = [_ranges(self.steps[user], name) for user in self._users[name] if user != place]
        overlaps = (a < d and c < b for a, b in mine for other in others for c, d in other)
        return bool(name) and not any(overlaps)

    def _only(self, place: int, *parts: Elements) -> bool:
        """Whether these vectors are known, and nothing but this instruction uses them."""
        return all(part.name and self._users[part.name] == [place] for part in parts)

    def _group(
        self,
        place: int,
        n_channels: int,
        divided: Sequence[Rows | Elements],
        multiplied: Sequence[Columns],
        channels: npt.NDArray[np.intp] | None = None,
    ) -> Group:
        each = np.arange(n_channels, dtype=np.intp) if channels is None else channels
        layer = int(self._layer_of[place])
        return Group(layer, n_channels, tuple(divided), tuple(multiplied), each)

    def _follow(self) -> None:
        now: dict[str, _Value] = defaultdict(lambda: _Value(None))
        for place, step in enumerate(self.steps):
            read = {name: now[name] for name in read_by(step)}
            for value in read.values():
                value.readers.append(place)
            self._read.append(read)
            target = written_by(step)
            written = _Value(place) if target is not None else None
            if target is not None and written is not None:
                now[target] = written
            self._written.append(written)
            if isinstance(step, StoreKV):
                self._stores[step.layer].append(place)
            elif isinstance(step, Attend):
                self._attends[step.layer].append(place)
            for name in _tensors(step):
                self._users[name].append(place)
        for matrix in (self.program.embedding, self.program.positions):
            if matrix is not None:
                self._users[matrix.name].append(-1)


@dataclass(frozen=True, eq=False)
class _Divided:
    """A product whose rows are to be divided, of one matrix or of each expert's."""

    matrices: tuple[Matrix, ...]
    biases: tuple[AddBias | ExpertBias, ...]
    routes: _Value | None  # of experts

    @property
    def n_rows(self) -> int:
        return self.matrices[0].n_rows

    def parts(self, number: int) -> list[Rows | Elements]:
        """What is divided of one of the matrices."""
        data = self.matrices[number].data
        assert isinstance(data, StreamedRows)
        found: list[Rows | Elements] = [Rows(self.matrices[number].name, data.first)]
        for bias in self.biases:
            if isinstance(bias, AddBias):
                found.append(Elements(bias.name, bias.first))
            else:
                found.append(Elements(bias.name, 0, number))
        return found


def _matrices(step: MatMul | ExpertMatMul) -> tuple[Matrix, ...]:
    return (step.matrix,) if isinstance(step, MatMul) else step.experts


def _ranges(step: Instruction, name: str) -> list[tuple[int, int]]:
    """The rows of a matrix, or elements of a bias, that an instruction uses; all if unknown."""
    if isinstance(step, (MatMul, ExpertMatMul)):
        data = [matrix.data for matrix in _matrices(step) if matrix.name == name]
        return [(d.first, d.last) for d in data if isinstance(d, StreamedRows)]
    if isinstance(step, AddBias):
        return [(step.first, step.first + len(step.bias))]
    return [(0, sys.maxsize)]


def _tensors(step: Instruction) -> set[str]:
    """Names of the tensors that an instruction uses."""
    match step:
        case MatMul() | ExpertMatMul():
            return {matrix.name for matrix in _matrices(step)}
        case Show():
            return {matrix.name for matrix in step.matrices}
        case RMSNorm() | AddBias() | ExpertBias():
            return {step.name}
        case LayerNorm():
            return {step.name, step.bias_name}
        case _:
            return set()
