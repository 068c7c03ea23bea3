"""What `convert` tells about a plan: its tensors, and the closing table. Lines of text.

Names come from the checkpoint and are made fit for a terminal here.
"""

from collections.abc import Iterator
from pathlib import Path

from gguf_tools.describe import short_size
from gguf_tools.errors import printable
from gguf_tools.plan import Plan
from gguf_tools.vocab.agreement import Agreement

Row = tuple[str, str]  # label and text


def plan_lines(plan: Plan) -> Iterator[str]:
    """Every tensor with its shape, type and bytes."""
    name_width = max(len(printable(tensor.name)) for tensor in plan.tensors)
    shapes = [" x ".join(map(str, tensor.shape)) for tensor in plan.tensors]
    shape_width = max(map(len, shapes))
    for tensor, shape in zip(plan.tensors, shapes, strict=True):
        choice = tensor.choice
        why = f"  instead of {choice.wanted}: {choice.reason}" if choice.reason else ""
        yield (
            f"{printable(tensor.name):<{name_width}}  {shape:>{shape_width}}  "
            f"{tensor.quant.name:<5} {tensor.nbytes:>14,}{why}"
        )


def closing_rows(
    plan: Plan, output: Path, seconds: float | None, agreement: Agreement | None = None
) -> Iterator[Row]:
    """The table at the end; without `seconds` nothing was written."""
    size = plan.total_size
    yield "file", printable(output, limit=1000) + ("" if seconds is not None else " (not written)")
    yield "size", f"{size:,} bytes ({short_size(size)})"
    yield "parameters", f"{plan.n_parameters:,}"
    yield "bits per weight", f"{plan.bits_per_weight:.4f}"
    types = ", ".join(f"{count} {name}" for name, count in plan.types.most_common())
    yield "tensors", f"{len(plan.tensors)}: {types}"
    label = "fallbacks"
    for fallback in plan.fallbacks:
        count = f" ({fallback.count} tensors)" if fallback.count > 1 else ""
        yield (
            label,
            f"{printable(fallback.pattern)}{count}: {fallback.type} instead of {fallback.wanted}: "
            f"{fallback.reason}",
        )
        label = ""
    if not plan.fallbacks:
        yield label, "none"
    if agreement is not None:
        yield "tokenizer", agreement.describe()
    if seconds is not None:
        yield "time", f"{seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):,.0f} MB/s)"
