"""Which files get a quality sheet, the room for it, and more bits for tensors beyond a cliff.

See gguf_tools/quality_sheet.py for what a sheet is.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gguf_tools.errors import printable
from gguf_tools.plan import NOTHING_TO_WEIGH, PLAIN, Plan, TensorPlan
from gguf_tools.quality_sheet import ROOM, Sheet
from gguf_tools.quants import by_name
from gguf_tools.quants.quanttype import QuantType
from gguf_tools.recipes import Choice, block_number
from gguf_tools.self_check import SheetRequest
from gguf_tools.values import RESERVE_KEY, Array

ATTEMPTS = 3  # a file beyond a cliff is made again twice
ROOM_IN_FILE = ROOM + 96  # bytes at most, with its key and the padding behind it
LARGEST = 1_000_000_000  # parameters of models whose sheet is made unasked
LADDER = ("Q3_K", "Q4_K", "Q5_K", "Q5_0", "Q6_K", "Q8_0", "F16")  # by bits; to raise to


def request_sheet(
    plan: Plan, *, asked: bool | None, checks: bool, compiles: bool = False, is_scaled: bool = False
) -> SheetRequest | None:
    """Whether a file gets a sheet: where something is rounded, if `asked`, or unasked (None) of
    small models that are checked anyhow.

    Where channels are scaled no tensor of the file makes sense among those of the source.
    """
    unasked = checks and plan.n_parameters < LARGEST
    if not (unasked if asked is None else asked) or not is_measurable(plan):
        return None
    return SheetRequest(bits=type_bits(plan), compiles=compiles, names_tensors=not is_scaled)


def is_measurable(plan: Plan) -> bool:
    """Whether the file loses anything of its source: some tensor is rounded to a block type."""
    return any(_is_rounded(tensor) for tensor in plan.tensors)


def type_bits(plan: Plan) -> int:
    """The bits of the type that most of the layers' rounded weights have: 4 of Q4_0 and Q4_K."""
    counts: dict[str, int] = {}
    rounded = [tensor for tensor in plan.tensors if _is_rounded(tensor)]
    in_layers = [tensor for tensor in rounded if block_number(tensor.name) >= 0]
    for tensor in in_layers or rounded:
        counts[tensor.quant.name] = counts.get(tensor.quant.name, 0) + tensor.source.n_elements
    return _bits(by_name(max(counts, key=lambda name: counts[name])))


def with_room(plan: Plan) -> Plan:
    """The plan, with room for a sheet at the end of the metadata."""
    kept = {key: value for key, value in plan.metadata.items() if key != RESERVE_KEY}
    return replace(plan, metadata={**kept, RESERVE_KEY: Array("u8", np.zeros(ROOM, np.uint8))})


def raised_types(sheet: Sheet, plan: Plan, *, steps: int = 0) -> dict[str, str]:
    """The types with which the tensors that cost most should bear it; empty where none does.

    KL divergence goes with the square of errors, which a bit more halves: as many bits more as
    bring it below half its limit, and `steps` in addition.
    """
    limit = sheet.limits[0] / 2
    more = max(1, math.ceil(math.log(max(sheet.mean_kl, limit) / limit, 4))) + steps
    found = {}
    for tensor in plan.tensors:
        if all(cost.name != tensor.name for cost in sheet.outstanding):
            continue
        higher = _higher(tensor, _bits(tensor.quant) + more)
        if higher:
            found[tensor.name] = higher
    return found


def raising_lines(sheet: Sheet, plan: Plan, types: Mapping[str, str]) -> list[str]:
    """What is raised, and what for; one line for each tensor."""
    before = {tensor.name: tensor.quant.name for tensor in plan.tensors}
    why = f"KL divergence was {sheet.mean_kl:.3g}"
    return [f"{printable(n, 70)} from {before[n]} to {type_}: {why}" for n, type_ in types.items()]


def with_types(plan: Plan, types: Mapping[str, str]) -> Plan:
    """The plan with other types for some tensors; those of the others stay what they are."""
    tensors = tuple(
        _with_type(tensor, types[tensor.name]) if tensor.name in types else tensor
        for tensor in plan.tensors
    )
    return replace(plan, tensors=tensors)


def _is_rounded(tensor: TensorPlan) -> bool:
    return tensor.quant.name not in (*PLAIN, tensor.source.dtype)


def _bits(quant: QuantType) -> int:
    """Whole bits of a weight, without its share of the scales."""
    return int(8 * quant.block_bytes / quant.block_size)


def _higher(tensor: TensorPlan, bits: int) -> str:
    """The first type with so many bits that holds the tensor's rows, else the last; or nothing."""
    width = tensor.source.row_length
    fit = [quant for quant in map(by_name, LADDER) if width % quant.block_size == 0]
    above = [quant for quant in fit if _bits(quant) > _bits(tensor.quant)]
    enough = [quant for quant in above if _bits(quant) >= bits]
    return (enough[0] if enough else above[-1]).name if above else ""


def _with_type(tensor: TensorPlan, type_: str) -> TensorPlan:
    importance = None if type_ in NOTHING_TO_WEIGH else tensor.importance
    return replace(
        tensor,
        quant=by_name(type_),
        choice=Choice(type_, type_),
        importance=importance,
        ready=None,
    )
