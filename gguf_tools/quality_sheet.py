"""What quantising cost a model: the figures that `convert` measures, tells and keeps in the file.

They are of a short text (gguf_tools/vocab/run_texts.py), read by the source's weights and by the
file's. A file keeps them under the keys `gguf_tools.quality.*` (KEYS), which are not part of what
`gguf verify` makes digests of.

A *cliff* is where a file lost more than rounding to its bits costs models that are well (LIMITS):
a few tensors did not bear it, as a rule, and those can have more bits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from gguf_tools.errors import printable
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.writer import encode_string, encode_value

PREFIX = "gguf_tools.quality."
TEXT = "gguf-tools sheet 1"  # the text's name; another text gets another number
ROOM = 1280  # bytes that are kept free for the sheet in a file's metadata
SHOWN = 4  # tensors that are named
MOST_NAME = 64  # bytes

# By the bits of a file's type: mean KL divergence (nats) and perplexity over the source's, from
# which on it is a cliff.
LIMITS: tuple[tuple[int, float, float], ...] = (
    (8, 0.05, 1.03),
    (6, 0.10, 1.06),
    (5, 0.25, 1.15),
    (4, 0.80, 1.80),
    (3, 1.20, 2.50),
    (0, 3.00, 5.00),
)
STANDS_OUT = 0.05  # the share of the cost from which on a tensor is one of those that cost most


@dataclass(frozen=True)
class Cost:
    """A tensor that was measured alone: all others had the source's weights."""

    name: str
    type: str
    share: float  # of the file's mean KL divergence


@dataclass(frozen=True)
class Sheet:
    """The figures. Errors are one standard deviation of the mean over tokens."""

    text: str
    tokens: int  # that were scored
    bits: int  # of the file's type: Q4_K has 4
    mean_kl: float  # nats
    mean_kl_error: float
    kl_99: float  # 99 of 100 tokens have less
    same_top: float  # share of tokens whose likeliest successor stayed
    same_top_error: float
    perplexity: float
    perplexity_ratio: float  # over the source's
    perplexity_ratio_error: float
    costs: tuple[Cost, ...] = ()  # the largest first

    @property
    def limits(self) -> tuple[float, float]:
        """Of mean KL divergence and of the perplexity ratio, for a file with these bits."""
        return next((kl, ratio) for bits, kl, ratio in LIMITS if self.bits >= bits)

    @property
    def is_cliff(self) -> bool:
        """Whether a figure is beyond its limit by more than twice its error."""
        kl, ratio = self.limits
        kl_low = self.mean_kl - 2 * self.mean_kl_error
        ratio_low = self.perplexity_ratio - 2 * self.perplexity_ratio_error
        return not (kl_low <= kl and ratio_low <= ratio)

    @property
    def outstanding(self) -> tuple[Cost, ...]:
        """The tensors that cost most."""
        return tuple(cost for cost in self.costs if cost.share >= STANDS_OUT)


# The keys after PREFIX, with their types; `costly_*` are arrays of one length.
NUMBERS = (
    ("mean_kl", "f32"),
    ("mean_kl_error", "f32"),
    ("kl_99", "f32"),
    ("same_top", "f32"),
    ("same_top_error", "f32"),
    ("perplexity", "f32"),
    ("perplexity_ratio", "f32"),
    ("perplexity_ratio_error", "f32"),
)
KEYS = (
    *("text", "tokens", "bits", *(name for name, _ in NUMBERS)),
    *("costly_names", "costly_types", "costly_shares"),
)


def fitting(sheet: Sheet) -> dict[str, MetadataValue]:
    """The sheet under its keys, with as many tensors as there is room for."""
    for n_costs in range(len(sheet.costs), -1, -1):
        entries = to_metadata(replace(sheet, costs=sheet.costs[:n_costs]))
        if sum(len(_entry(key, value)) for key, value in entries.items()) <= ROOM:
            return entries
    raise ValueError("the room for a sheet is too small")


def to_metadata(sheet: Sheet) -> dict[str, MetadataValue]:
    """The sheet under its keys."""
    entries: dict[str, MetadataValue] = {
        "text": Value("str", sheet.text),
        "tokens": Value("u32", sheet.tokens),
        "bits": Value("u32", sheet.bits),
        **{name: Value(type_, getattr(sheet, name)) for name, type_ in NUMBERS},
    }
    costs = [cost for cost in sheet.costs if len(cost.name.encode()) <= MOST_NAME]
    if costs:
        entries["costly_names"] = Array("str", [cost.name for cost in costs])
        entries["costly_types"] = Array("str", [cost.type for cost in costs])
        entries["costly_shares"] = Array("f32", [cost.share for cost in costs])
    return {PREFIX + name: entry for name, entry in entries.items()}


def from_metadata(metadata: Mapping[str, Any]) -> Sheet | None:
    """The sheet of a file; None where it has none, or one that is damaged."""
    found = {name: metadata.get(PREFIX + name) for name in KEYS}
    numbers = {name: found[name] for name, _ in NUMBERS}
    counts = {name: found[name] for name in ("tokens", "bits")}
    if not isinstance(found["text"], str) or not all(_is_count(n) for n in counts.values()):
        return None
    if not all(isinstance(n, float) and math.isfinite(n) for n in numbers.values()):
        return None
    columns: list[Any] = [found[f"costly_{name}"] for name in ("names", "types", "shares")]
    lists = [list(column) if _is_list(column) else [] for column in columns]
    costs = tuple(
        Cost(name, type_, float(share))
        for name, type_, share in zip(*lists, strict=False)
        if isinstance(name, str) and isinstance(type_, str)
    )
    values: dict[str, Any] = {"text": found["text"], **counts, **numbers}
    return Sheet(**values, costs=costs)


def describe_sheet(sheet: Sheet) -> dict[str, Any]:
    """The sheet in the types of JSON."""
    kl, ratio = sheet.limits
    verdict = {"mean_kl_limit": kl, "perplexity_ratio_limit": ratio, "is_cliff": sheet.is_cliff}
    return {**asdict(sheet), **verdict}


def sheet_of_json(found: Any) -> Sheet | None:
    """The sheet that `asdict` made JSON of; TypeError or KeyError if it is none."""
    if found is None:
        return None
    return Sheet(**{**found, "costs": tuple(Cost(**cost) for cost in found["costs"])})


def sheet_lines(sheet: Sheet) -> Iterator[str]:
    """Five lines; names are made fit for a terminal."""
    yield (
        f"mean KL divergence {_figure(sheet.mean_kl, sheet.mean_kl_error)} nats, 99 % of "
        f"{sheet.tokens:,} tokens below {sheet.kl_99:.2g}"
    )
    yield (
        f"same first choice as the source's weights after {_percent(sheet.same_top)} "
        f"\N{PLUS-MINUS SIGN} {_percent(sheet.same_top_error)} of tokens"
    )
    ratio = _figure(sheet.perplexity_ratio, sheet.perplexity_ratio_error)
    yield f"perplexity {sheet.perplexity:.4g}, {ratio} times the source's"
    named = sheet.outstanding[:SHOWN] or sheet.costs[:1]
    texts = [f"{printable(c.name, 70)} ({printable(c.type)}) {_share(c.share)}" for c in named]
    yield f"cost most, each alone: {', '.join(texts)}" if texts else "no tensor was measured alone"
    kl, limit = sheet.limits
    beyond = "a cliff: beyond" if sheet.is_cliff else "no cliff: within"
    yield f"{beyond} what {_bits_text(sheet.bits)} may cost, KL {kl:g} and perplexity x {limit:g}"


def cliff_warning(sheet: Sheet) -> str:
    """What to do about a cliff, in one sentence."""
    kl, limit = sheet.limits
    found = (
        f"a precision cliff: KL divergence {sheet.mean_kl:.3g}, perplexity "
        f"{sheet.perplexity_ratio:.3g} times the source's, where {_bits_text(sheet.bits)} may cost "
        f"{kl:g} and {limit:g}"
    )
    if not sheet.outstanding:
        return f"{found}; no single tensor stands out: choose a --type with more bits"
    names = ", ".join(printable(cost.name, 70) for cost in sheet.outstanding[:SHOWN])
    return f"{found}; {names} cost most: give them more bits with --raise-cliff or --tensor-type"


# --- bytes and texts ----------------------------------------------------------------------------


def _zeros(count: int) -> MetadataValue:
    return Array("u8", np.zeros(count, np.uint8))


def _entry(key: str, value: MetadataValue) -> bytes:
    return encode_string(key) + encode_value(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _is_list(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)


def _figure(value: float, error: float) -> str:
    """Both with as many digits as say something."""
    digits = 2 - math.floor(math.log10(max(error, 1e-9))) if math.isfinite(error) else 3
    digits = min(max(digits - 1, 0), 6)
    return f"{value:.{digits}f} \N{PLUS-MINUS SIGN} {error:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(value: float) -> str:
    return f"{100 * min(value, 1.0):.0f} %"


def _bits_text(bits: int) -> str:
    return f"{bits} bits" if bits != 1 else "1 bit"
