"""What `convert` tells about a plan: its tensors, and the closing table. Lines of text.

Names come from the checkpoint and are made fit for a terminal here.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf_tools.describe import short_size
from gguf_tools.errors import printable
from gguf_tools.imatrix import ImportanceMatrix
from gguf_tools.losses import Losses
from gguf_tools.plan import Plan, TensorPlan, kind_of_name
from gguf_tools.quality_sheet import sheet_lines
from gguf_tools.self_check import SelfCheck, SheetRequest

Row = tuple[str, str]  # label and text


def plan_lines(plan: Plan) -> Iterator[str]:
    """Every tensor with its shape, type and bytes."""
    name_width = max((len(printable(tensor.name)) for tensor in plan.tensors), default=0)
    shapes = [" x ".join(map(str, tensor.shape)) for tensor in plan.tensors]
    shape_width = max(map(len, shapes), default=0)
    for tensor, shape in zip(plan.tensors, shapes, strict=True):
        choice = tensor.choice
        why = f"  instead of {choice.wanted}: {choice.reason}" if choice.reason else ""
        if plan.matrix is not None:
            why = f"  {_coverage(tensor):<22}{why}".rstrip()
        yield (
            f"{printable(tensor.name):<{name_width}}  {shape:>{shape_width}}  "
            f"{tensor.quant.name:<5} {tensor.nbytes:>14,}{why}"
        )


def closing_rows(
    plan: Plan,
    output: Path,
    seconds: float | None,
    self_check: str = "",
    *,
    calibration: str = "",
) -> Iterator[Row]:
    """The table at the end; without `seconds` nothing was written."""
    # The plan's size would take the whole header encoded once more, vocabulary and all.
    size = plan.total_size if seconds is None else output.stat().st_size
    yield "file", printable(output, limit=1000) + ("" if seconds is not None else " (not written)")
    yield "size", f"{size:,} bytes ({short_size(size)})"
    yield "parameters", f"{plan.n_parameters:,}"
    yield "bits per weight", f"{plan.bits_per_weight:.4f}"
    types = ", ".join(f"{count} {name}" for name, count in plan.types.most_common())
    yield "tensors", f"{len(plan.tensors)}: {types}" if types else "none: a vocabulary alone"
    yield from _fallback_rows(plan)
    if plan.matrix is not None:
        yield from _importance_rows(plan, plan.matrix)
    if calibration:
        yield "calibration", calibration
    if self_check:
        yield "self-check", self_check
    if seconds is not None:
        yield "time", f"{seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):,.0f} MB/s)"


def aligned(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table of labels and texts."""
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        yield f"{label:<{width}}  {text}"


def quality_rows(
    checked: SelfCheck | None, wanted: SheetRequest | None, raised: Sequence[str]
) -> Iterator[Row]:
    """The quality sheet, or why there is none where it was wanted; and what was raised for it."""
    if checked is None or wanted is None:
        return
    if checked.sheet is None:
        yield "quality", f"not measured: {checked.no_sheet}"
        return
    for number, line in enumerate(sheet_lines(checked.sheet)):
        yield "" if number else "quality", line
    for number, line in enumerate(raised):
        yield "" if number else "raised", line


def loss_notes(plan: Plan, losses: Losses) -> Iterator[str]:
    """What quantising cost where it was measured: see losses.py."""
    second = [tensor for tensor in plan.tensors if tensor.is_second]
    cost = losses.describe(tensor.name for tensor in second)
    if cost:
        schemes = ", ".join(sorted({tensor.source.scheme for tensor in second}))
        n_weights = sum(tensor.source.n_elements for tensor in second)
        names = {tensor.name for tensor in second}
        measured = sum(loss.n_weights for name, loss in losses.tensors.items() if name in names)
        left = n_weights - measured
        rest = f"; of {left:,} weights an earlier run wrote it is not known" if left else ""
        yield f"second quantisation ({printable(schemes)}): it cost {cost}{rest}"
    trained = losses.tensors.keys() - {tensor.name for tensor in second}
    if trained:
        yield (
            "trained for their type: blocks of multiples of one number were found, and kept; their "
            f"quantisation cost {losses.describe(trained)}"
        )


def _fallback_rows(plan: Plan) -> Iterator[Row]:
    """What did not get the type asked for: a table within the table."""
    if not plan.fallbacks:
        yield "fallbacks", "none"
        return
    cells = [("tensors", "asked", "got", "bytes", "why")]
    for fallback in plan.fallbacks:
        count = f" ({fallback.count} tensors)" if fallback.count > 1 else ""
        cells.append(
            (
                printable(fallback.pattern) + count,
                *(fallback.wanted, fallback.type, f"{fallback.nbytes:,}", fallback.reason),
            )
        )
    width, asked, got, size = (max(len(row[i]) for row in cells) for i in range(4))
    for i, row in enumerate(cells):
        yield (
            "" if i else "fallbacks",
            f"{row[0]:<{width}}  {row[1]:<{asked}}  {row[2]:<{got}}  {row[3]:>{size}}  {row[4]}",
        )


def _importance_rows(plan: Plan, matrix: ImportanceMatrix) -> Iterator[Row]:
    """How much of what is quantised the importance matrix covers."""
    weighable = plan.weighable
    covered = [tensor for tensor in weighable if tensor.importance is not None]
    made = f", {matrix.n_chunks:,} chunks" if matrix.n_chunks else ""
    made += f" of {printable(matrix.dataset)}" if matrix.dataset else ""
    yield (
        "importance",
        f"{len(covered):,} of {len(weighable):,} tensors that can make use of it; "
        f"{len(matrix.entries):,} {'entry' if len(matrix.entries) == 1 else 'entries'}{made}",
    )
    missing = Counter(kind_of_name(t.name) for t in weighable if t.importance is None)
    for name, count in missing.items():
        yield "", f"missing: {printable(name)}" + (f" ({count} tensors)" if count > 1 else "")
    for tensor in covered:
        if tensor.importance is not None and tensor.importance.without_counts:
            yield "", f"{printable(tensor.name)}: {_coverage(tensor)}, which count as without it"


def _coverage(tensor: TensorPlan) -> str:
    """`importance`, `no importance`, or the experts that the text never reached."""
    if tensor.importance is None:
        return "no importance"
    never = tensor.importance.without_counts
    if not never:
        return "importance"
    n_matrices = len(tensor.importance.counts)
    if n_matrices == 1:
        return "never reached"
    few = ", ".join(map(str, never[:8])) + (", ..." if len(never) > 8 else "")
    return f"{len(never)} of {n_matrices} experts never reached ({few})"
