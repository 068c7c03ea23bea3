"""`convert --target-size` and `--target-bpw`: the types that cost least at a size, measured.

What each type of each tensor costs is measured on the model itself (gguf_tools/type_trials.py), and
the best choice of all that fit is found (gguf_tools/mixture.py). It is then held against the file
type that llama-quantize would have made at this size, on other windows of the text; where that is
as good, it is what is written. The choice is a list of --tensor-type options, which are stored in
the file: with them it is made again without measuring.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from gguf_tools.describe import short_size
from gguf_tools.errors import printable
from gguf_tools.file_types import FileType
from gguf_tools.overrides import Overrides
from gguf_tools.plan import Plan, TensorPlan, kind_of_name
from gguf_tools.target_choices import Choices, Mixture, expected, prefixed
from gguf_tools.target_options import Target
from gguf_tools.type_trials import Doing, Measured, TypeTrials
from gguf_tools.values import Value

BEFORE = "Q4_K_M"  # the file type of a plan before types are chosen

PlanFor = Callable[[FileType, Overrides], Plan]


@dataclass(frozen=True)
class Settled:
    """A plan of the size asked for, and what is to be told about it."""

    plan: Plan
    lines: tuple[str, ...]  # the choice as a table
    line: str  # for the closing table


def settle(
    target: Target,
    base: Plan,
    overrides: Overrides,
    plan_for: PlanFor,
    trials: TypeTrials,
    *,
    room: int = 0,
    others: Sequence[str] = (),
) -> Generator[Doing, None, Settled]:
    """Measure, choose, compare; returns the plan.

    `base` is the plan of any file type with these overrides, `plan_for` makes that of others;
    `room` are bytes that the file will need besides, `others` the options that decide bytes and
    not types, as the command that makes the file again has them.
    GGUFError where the target is too small, too large, or the model cannot be measured.
    """
    task = Choices(target, base, overrides, room, others)
    task.check()
    with trials:
        measured = yield from trials.measure(task.types, task.tried())
        mixture = task.solve(measured)
        recipe = task.best_recipe(measured)
        asked = [mixture.types] if recipe is None else [mixture.types, recipe.types]
        kl, n_tokens = yield from trials.compare(asked)
    if recipe is not None and kl[0] >= kl[1]:
        line = (
            f"{recipe.file_type.name}: on {n_tokens:,} tokens the mixture that was chosen has a "
            f"mean KL of {kl[0]:.5f}, {recipe.file_type.name} {kl[1]:.5f}"
        )
        return Settled(plan_for(recipe.file_type, overrides), (), line)
    made = plan_for(mixture.file_type, replace(overrides, patterns=mixture.patterns))
    found = {"kl": Value("f32", kl[0]), "kl_tokens": Value("u32", n_tokens)}
    if recipe is not None:
        found["file_type_kl"] = Value("f32", kl[1])
    metadata = {**made.metadata, **mixture.metadata, **prefixed(found)}
    plan = replace(made, metadata=metadata)
    line = f"mean KL {kl[0]:.5f} on {n_tokens:,} tokens"
    if recipe is not None:
        line += (
            f"; {recipe.file_type.name}, {short_size(recipe.n_bytes)}: {kl[1]:.5f}, so this is "
            f"{kl[0] / kl[1]:.2f} of it"
        )
    return Settled(plan, tuple(_table(plan, mixture, measured)), line)


def _table(plan: Plan, mixture: Mixture, measured: Measured) -> Iterator[str]:
    """For each kind of tensor: how many of each type, bits per weight, and share of the cost."""
    whole = expected(mixture.types, measured)
    kinds: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if tensor.name in mixture.types:
            kinds.setdefault(kind_of_name(tensor.name), []).append(tensor)
    rows = [("tensors", "bits", "cost", "types")]
    for kind, tensors in kinds.items():
        n_weights = sum(tensor.source.n_elements for tensor in tensors)
        bits = 8 * sum(tensor.nbytes for tensor in tensors) / n_weights
        types = {tensor.name: tensor.quant.name for tensor in tensors}
        share = expected(types, measured) / whole if whole else 0.0
        counts = Counter(types.values()).most_common()
        texts = ", ".join(f"{count} {type_}" for type_, count in counts)
        rows.append((printable(kind), f"{bits:.2f}", f"{share:.1%}", texts))
    width = max(len(row[0]) for row in rows)
    for kind, bits_text, share_text, texts in rows:
        yield f"{kind:<{width}}  {bits_text:>5}  {share_text:>6}  {texts}"
