"""From a checkpoint to a GGUF file in one pass, a band of rows at a time.

Each band is read, checked, transformed and quantised by one of the threads, and written in order.
No more than a few bands are in memory, however large a tensor is.
"""

import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_tools import archs
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.transforms import transformed
from gguf_tools.checkpoint import CONFIG_NAME, open_checkpoint
from gguf_tools.errors import (
    CheckpointError,
    GGUFError,
    OutputError,
    UnsupportedQuantError,
    printable,
)
from gguf_tools.file_types import FileType
from gguf_tools.imatrix import ImportanceMatrix
from gguf_tools.journal import SUFFIX, Journal
from gguf_tools.lora_merging import Scaled, with_adapters
from gguf_tools.losses import Loss, measure
from gguf_tools.matching import MatchedModel, match_tensors
from gguf_tools.memory import return_memory
from gguf_tools.overrides import NO_OVERRIDES, Overrides
from gguf_tools.plan import Plan, TensorPlan, build_plan
from gguf_tools.quants.multiples import keep_multiples
from gguf_tools.safetensors_file import READABLE, Floats, LazyTensor
from gguf_tools.values import MetadataValue
from gguf_tools.vocab import read_vocab
from gguf_tools.vocab.trial import RunningTrial
from gguf_tools.writer import GGUFWriter

BAND = 1 << 20  # weights that are read and quantised together
LARGE = 60_000.0  # from here on a type with 16-bit scales may not hold a weight (65504)


@dataclass(frozen=True)
class Band:
    """Rows of a tensor as they are written."""

    blocks: npt.NDArray[np.uint8]
    loss: Loss | None = None

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the blocks."""
        return zlib.crc32(np.ascontiguousarray(self.blocks).reshape(-1).data)


@dataclass(frozen=True)
class Progress:
    """A band has been written."""

    tensor: TensorPlan
    index: int  # of the tensor in the plan
    n_rows: int  # of the tensor written so far
    n_bytes: int  # in this band
    kept: bool = False  # by an earlier run, that this one goes on from
    loss: Loss | None = None  # where it was measured: see losses.py

    @property
    def finished(self) -> bool:
        return self.n_rows == self.tensor.source.n_rows


def plan_conversion(
    folder: str | os.PathLike[str],
    file_type: FileType,
    adapters: Sequence[Scaled] = (),
    *,
    overrides: Overrides = NO_OVERRIDES,
    matrix: ImportanceMatrix | None = None,
    calibrates: bool = False,
    trial: RunningTrial | None = None,
) -> Plan:
    """Read everything but the weights, and say what the file will hold.

    The adapters are merged into the weights. A file that is to be calibrated is planned with
    `calibrates`: see `build_plan`. The tokenizer may be in a `trial` already: see
    `begin_trial`.
    """
    model, merged = match_checkpoint(folder, adapters)
    checkpoint = model.checkpoint
    vocab = read_vocab(
        checkpoint.folder, checkpoint.config, n_vocab=model.facts.n_vocab, trial=trial
    )
    plan = build_plan(
        model,
        file_type=file_type,
        vocab_metadata=vocab.metadata,
        sampling=vocab.sampling,
        overrides=overrides,
        matrix=matrix,
        calibrates=calibrates,
    )
    notes = (*merged, *plan.notes, *vocab.warnings)
    return replace(plan, notes=notes, encodings=vocab.encodings)


def match_checkpoint(
    folder: str | os.PathLike[str], adapters: Sequence[Scaled] = ()
) -> tuple[MatchedModel, tuple[str, ...]]:
    """The tensors that the file is made from, with the adapters merged, and notes on those."""
    checkpoint = open_checkpoint(folder)
    where = printable(checkpoint.folder / CONFIG_NAME, limit=1000)
    architecture = archs.find(HFConfig(checkpoint.config, where))
    checkpoint, merged = with_adapters(checkpoint, architecture, adapters)
    return match_tensors(checkpoint, architecture), merged


def convert(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    threads: int,
    force: bool = False,
    begun: Callable[[Path], None] | None = None,
    check: Callable[[Path], Mapping[str, MetadataValue]] | None = None,
    journal: Journal | None = None,
) -> Generator[Progress, None, None]:
    """Write the file; what is yielded has been written. The file appears when all is done.

    `begun` is called with the file as soon as its metadata is there, which do not change any more;
    `check` with the finished file before it gets its name: it gives what is put into the room that
    the metadata has (RESERVE_KEY); if one raises, no file is left.
    With a journal, what an earlier run with the same inputs wrote is kept, and what this one wrote
    is kept for the next if it is stopped; an error then says so.
    """
    if threads < 1:
        raise ValueError(f"expected at least one thread, got {threads}")
    try:
        with GGUFWriter(
            path, metadata=plan.metadata, tensors=plan.specs, force=force, journal=journal
        ) as writer:
            if begun is not None:
                begun(writer.part)
            yield from _kept_bands(plan, writer.position)
            for progress, band in _quantised_bands(plan, threads, writer.position):
                writer.write(progress.tensor.name, band.blocks, band.checksum)
                loss = band.loss
                del band
                yield replace(progress, loss=loss)
            if journal is not None:
                journal.confirm_inputs()
            if check is not None:
                return_memory()  # what checks it needs some
                found = check(writer.part)
                if found:
                    writer.fill_room(found)
    except GGUFError as error:
        if journal is None or not journal.kept:
            raise
        raise type(error)(f"{error}; {journal.kept}") from error


def protect_input(path: Path, output: Path) -> None:
    """Refuse to write over what is being read: a file, or one of those in a checkpoint's folder.

    Before it is complete the output lies in NAME.part, beside its journal.
    """
    if not path.is_dir():
        files, what = [path], "the file that is being read"
    else:
        names = [] if output.suffix == ".gguf" else os.listdir(path)
        files, what = [path / name for name in names], "a file of the checkpoint itself"
    written = [output.parent / (output.name + end) for end in ("", ".part", ".part" + SUFFIX)]
    for file, name in product(files, written):
        with suppress(OSError):  # one of them is not there: nothing to protect
            if os.path.samefile(file, name):
                shown = printable(name, limit=1000)
                if name != output:
                    shown += f", as which {printable(output.name)} begins,"
                raise OutputError(f"{shown} is {what}; choose another name")


def refuse_output(plan: Plan, path: Path, *, force: bool) -> None:
    """Raise now what writing the plan to `path` would raise before it begins."""
    GGUFWriter(path, metadata=plan.metadata, tensors=plan.specs, force=force)


def _kept_bands(plan: Plan, position: tuple[int, int]) -> Iterator[Progress]:
    """What there is before `position`: a tensor index, and how many bytes of that tensor."""
    index, n_bytes = position
    for i, tensor in enumerate(plan.tensors[:index]):
        yield Progress(tensor, i, tensor.source.n_rows, tensor.nbytes, kept=True)
    if n_bytes:
        yield Progress(plan.tensors[index], index, _n_rows(plan, position), n_bytes, kept=True)


def _n_rows(plan: Plan, position: tuple[int, int]) -> int:
    """How many rows of its tensor lie before `position`."""
    index, n_bytes = position
    if not n_bytes:
        return 0
    tensor = plan.tensors[index]
    return n_bytes // tensor.quant.row_bytes(tensor.source.row_length)


def _quantised_bands(
    plan: Plan, threads: int, position: tuple[int, int]
) -> Iterator[tuple[Progress, Band]]:
    """All bands from `position` on in the order of the file, at most a few made in advance."""
    start = position[0]
    executor = ThreadPoolExecutor(threads, thread_name_prefix="quantise")
    waiting: deque[tuple[Progress, Future[Band]]] = deque()
    try:
        for index, tensor in enumerate(plan.tensors[start:], start):
            step = rows_per_band(tensor)
            begin = _n_rows(plan, position) if index == start else 0  # whole bands
            for first in range(begin, tensor.source.n_rows, step):
                last = min(first + step, tensor.source.n_rows)
                n_bytes = (last - first) * tensor.quant.row_bytes(tensor.source.row_length)
                future = executor.submit(_checked_band, tensor, first, last)
                waiting.append((Progress(tensor, index, last, n_bytes), future))
                if len(waiting) > threads + 1:
                    progress, done = waiting.popleft()
                    yield progress, done.result()
        while waiting:
            progress, done = waiting.popleft()
            yield progress, done.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _checked_band(tensor: TensorPlan, first: int, last: int) -> Band:
    """What `quantise_band` gives, its checksum taken by the thread that made it."""
    band = quantise_band(tensor, first, last)
    band.checksum  # noqa: B018 - takes it
    return band


def rows_per_band(tensor: TensorPlan) -> int:
    """Rows of a band: about BAND weights, and whole groups of the transform."""
    step = max(1, BAND // tensor.source.row_length)
    if tensor.transform is None or len(tensor.shape) < 2:
        return step
    group = tensor.transform.group
    return max(group, step - step % group)


def quantise_band(tensor: TensorPlan, first: int, last: int) -> Band:
    """The blocks of rows `first` to `last` (exclusive), which are whole groups."""
    source, quant = tensor.source, tensor.quant
    if tensor.ready is not None:
        return Band(tensor.ready(first, last))
    if source.raw is not None and source.dtype == quant.name and quant.name not in READABLE:
        return Band(source.raw(first, last))
    rows = source.load(first, last)
    peak = _check_finite(source, rows, first)
    original = rows
    if tensor.transform is not None:
        rows = transformed(rows, tensor.transform, len(tensor.shape))
    if quant.quantize is None:
        raise UnsupportedQuantError(
            f"tensor {printable(tensor.name)}: type {quant.name} can be read but not written"
        )
    blocks = made = _quantise(tensor, rows, first)
    if quant.multiples is not None and (quant.multiples.trained or source.scheme):
        blocks = keep_multiples(quant, rows, made)
    if peak > LARGE and quant.name != "F32" and not np.isfinite(quant.dequantize(blocks)).all():
        worst = int(np.argmax(np.abs(original)))
        raise UnsupportedQuantError(
            f"{_position(source, first, worst)} is {original.reshape(-1)[worst]:g}, more than "
            f"type {quant.name} can hold; convert to F32 or BF16"
        )
    if tensor.is_second or blocks is not made:
        return Band(blocks, measure(quant, rows, blocks))
    return Band(blocks)


def _quantise(tensor: TensorPlan, rows: Floats, first: int) -> npt.NDArray[np.uint8]:
    """The blocks of the rows from `first` on; each expert has an importance of its own."""
    quantize = tensor.quant.quantize
    assert quantize is not None
    if tensor.importance is None:
        return quantize(rows)
    height = tensor.shape[-2]
    last = first + len(rows)
    parts = []
    for matrix in range(first // height, -(-last // height)):
        begin, end = max(first, matrix * height), min(last, (matrix + 1) * height)
        of_matrix = rows[begin - first : end - first]
        parts.append(quantize(of_matrix, tensor.importance.of_matrix(matrix)))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_finite(source: LazyTensor, rows: Floats, first: int) -> float:
    """The largest magnitude; an error that names the place if one is no number."""
    if rows.size == 0:
        return 0.0
    peak = max(abs(float(rows.min())), abs(float(rows.max())))  # both are NaN if one weight is
    if np.isfinite(peak):
        return peak
    flat = rows.reshape(-1)
    worst = int(np.flatnonzero(~np.isfinite(flat))[0])
    raise CheckpointError(
        f"{_position(source, first, worst)} is {flat[worst]:g}: expected a number that 32 bits "
        "can hold; the checkpoint is damaged"
    )


def _position(source: LazyTensor, first: int, offset: int) -> str:
    """`tensor NAME[row, column]`, `offset` weights after the start of row `first`."""
    element = first * source.row_length + offset
    index = np.unravel_index(element, source.shape) if source.shape else ()
    return f"tensor {printable(source.name)}[{', '.join(str(int(i)) for i in index)}]"
