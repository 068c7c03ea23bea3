"""Which buffers an instruction reads and writes, and what follows from it.

When there is one token, some buffers are filled by every thread for itself, in memory of its own:
that is cheaper than to wait for one that does it for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from runtime.program import (
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    Instruction,
    KVShape,
    LayerNorm,
    MatMul,
    RMSNorm,
    Rope,
    Route,
    Scale,
    Show,
    SigmoidScale,
    SoftCap,
    Stage,
    StoreKV,
)

PARTIALS = "partials"  # attention's, of one token: no buffer of the program

# What may be claimed together with the step before it.
ON_COLUMNS = (AddBias, Activate, Add, ExpertBias, ExpertSum, Gate, Scale, SigmoidScale, SoftCap)


def unknown(step: NoReturn) -> NoReturn:
    """The end of a match: mypy finds what it lacks, and so does who runs it."""
    raise ValueError(f"there is no such instruction: {step!r}")


def read_by(step: Instruction) -> tuple[str, ...]:
    match step:
        case RMSNorm() | LayerNorm() | MatMul() | Show():
            return (step.source,)
        case AddBias() | Rope() | Activate() | Scale() | SoftCap():
            return (step.target,)
        case StoreKV():
            return (step.keys, step.values)
        case Attend():
            return (step.queries,)
        case Gate():
            return (step.gate, step.up)
        case Add():
            return (step.source, step.target)
        case Route():
            return (step.scores,)
        case ExpertMatMul() | ExpertSum():
            return (step.source, step.routes)
        case ExpertBias():
            return (step.target, step.routes)
        case SigmoidScale():
            return (step.gate, step.target)
        case _:
            unknown(step)


def written_by(step: Instruction) -> str | None:
    """The buffer that an instruction writes; None for those that write to the KV cache, or not."""
    match step:
        case StoreKV() | Show():
            return None
        case Route():
            return step.routes
        case _:
            return step.target


def width_written(
    step: Instruction, width: Callable[[str], int], caches: Sequence[KVShape]
) -> int | None:
    """The numbers per token in the buffer that was written; None: as many as before.

    `width` gives those of the other buffers, which may have room for more.
    """
    match step:
        case MatMul():
            return step.matrix.n_rows
        case ExpertMatMul():
            return step.n_used * step.experts[0].n_rows
        case ExpertSum():
            return width(step.source) // step.n_used
        case RMSNorm() | LayerNorm() | Gate():
            return width(read_by(step)[0])
        case Attend():
            shape = caches[step.layer]
            return shape.n_heads * shape.value_dim
        case _:
            return None


def owned_buffers(stage: Stage) -> set[str]:
    """Buffers that every thread fills for itself when there is one token.

    They are written by whole-row norms, routing and attention's last step only. A thread that
    comes late may find their sources changed: what it makes of them is wrong, but its claims come
    too late as well, as long as nothing reads the buffer after its sources have changed, nor while
    they are: what reads the buffer, and what may be claimed with that, leaves its sources alone.
    """
    steps = stage.steps
    owned = {written_by(step) for step in steps if _is_cheap(step, stage)}
    owned -= {written_by(step) for step in steps if not _is_cheap(step, stage)}
    owned -= {name for step in steps if isinstance(step, StoreKV) for name in read_by(step)}
    crossing = {name for span in stage.spans for name in (*span.inputs, *span.outputs)}
    names = {name for name in owned if name is not None} - crossing - {"x", "logits"}
    made_from: dict[str, set[str]] = {}
    stale: set[str] = set()
    together: set[str] = set()  # what is read by steps that may be claimed together with this one
    for step in steps:
        names -= stale & set(read_by(step))
        together = (together if isinstance(step, ON_COLUMNS) else set()) | set(read_by(step))
        target = written_by(step)
        if target is None:
            continue
        changed = {target, PARTIALS} if isinstance(step, Attend) else {target}
        names -= {name for name in together if made_from.get(name, set()) & changed}
        stale |= {name for name, sources in made_from.items() if sources & changed}
        sources = set(read_by(step)) | ({PARTIALS} if isinstance(step, Attend) else set())
        for name in sources & names:
            sources = sources | made_from.get(name, set())
        made_from[target] = sources - {target}
        stale.discard(target)
    return names


def _is_cheap(step: Instruction, stage: Stage) -> bool:
    """Whether each thread may as well do it for itself, given one token."""
    if isinstance(step, (RMSNorm, LayerNorm)):
        return int(step.weight.shape[-1]) == stage.buffers[step.target]
    return isinstance(step, (Attend, Route))
