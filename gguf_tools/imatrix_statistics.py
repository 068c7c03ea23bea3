"""What an importance matrix says of each tensor and layer, in figures.

The figures are those of llama-imatrix --show-statistics (tools/imatrix/imatrix.cpp), over the mean
squares of the inputs of all columns, of all experts that have data.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import printable
from gguf_tools.imatrix import Entry

INACTIVE = 1e-5  # a mean square up to this counts as none
NAMED_AT_MOST = 6  # tensors, and experts of each

_LAYER = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class TensorStatistics:
    """Of one tensor."""

    name: str
    layer: int | None  # None outside of layers
    total: float  # sum over columns of the mean squares
    least: float
    most: float
    mean: float
    deviation: float  # standard, of the columns
    active: float  # share of columns above INACTIVE
    columns: int
    entropy: float  # bits, of the shares of the columns in the total
    zd: float  # share of columns more than one deviation above the mean
    similarity: float  # cosine, with the same tensor of the layer before; 0 where there is none
    tokens: tuple[int, int]  # that came to it: the least and the most of all experts

    @property
    def normalized_entropy(self) -> float:
        """1 where all columns are equal."""
        return self.entropy / float(np.log2(self.columns)) if self.columns > 1 else 0.0

    @property
    def kind(self) -> str:
        """The name without layer and end, such as attn_q."""
        return _LAYER.sub("", self.name).removesuffix(".weight")


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer: means over its tensors, each weighted by its columns."""

    layer: int
    total: float
    zd: float
    similarity: float


def tensor_statistics(entries: Mapping[str, Entry]) -> list[TensorStatistics]:
    """Of all tensors that have data, by kind, those with the largest total first."""
    found = [_of_tensor(name, entry, entries) for name, entry in entries.items()]
    known = [each for each in found if each is not None]
    return sorted(known, key=lambda each: (each.kind, -each.total))


def layer_statistics(tensors: Sequence[TensorStatistics]) -> list[LayerStatistics]:
    """Of all layers, in order."""
    inside = sorted(
        ((each.layer, each) for each in tensors if each.layer is not None), key=lambda x: x[0]
    )
    made = []
    for layer, group in groupby(inside, key=lambda pair: pair[0]):
        members = [each for _, each in group]
        weights = np.array([each.columns for each in members], np.float64)
        values = [[each.total, each.zd, each.similarity] for each in members]
        made.append(
            LayerStatistics(layer, *map(float, np.average(values, axis=0, weights=weights)))
        )
    return made


def without_data(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """The experts of each tensor that the text never reached; tensors where it reached all are
    left out."""
    lacking = {name: np.flatnonzero(entry.counts <= 0) for name, entry in entries.items()}
    return {name: tuple(map(int, experts)) for name, experts in lacking.items() if experts.size}


def describe_coverage(entries: Mapping[str, Entry], expected: Sequence[str] = ()) -> Iterator[str]:
    """Sentences about what has no data; `expected` are the tensors that should have some."""
    missing = [name for name in expected if name not in entries]
    if missing:
        yield f"no data for {_some([printable(name) for name in missing], 'tensors')}"
    lacking = without_data(entries)
    if lacking:
        each = [
            f"{printable(name)} (of {len(entries[name].counts)}: {_some(experts, 'experts')})"
            for name, experts in lacking.items()
        ]
        yield (
            "experts that were never chosen, whose columns will all count alike: "
            f"{_some(each, 'tensors')}; a longer or more varied text may reach them"
        )


def _of_tensor(name: str, entry: Entry, entries: Mapping[str, Entry]) -> TensorStatistics | None:
    counts = entry.counts.astype(np.float64)
    reached = counts > 0
    if not reached.any():
        return None
    sums = entry.sums.reshape(len(counts), -1).astype(np.float64)
    values = (sums[reached] / counts[reached, None]).reshape(-1)
    total, mean, deviation = float(values.sum()), float(values.mean()), float(values.std())
    shares = values[values > 0] / total if total > 0 else values[:0]
    found = _LAYER.search(name)
    layer = int(found.group(1)) if found else None
    return TensorStatistics(
        name=name,
        layer=layer,
        total=total,
        least=float(values.min()),
        most=float(values.max()),
        mean=mean,
        deviation=deviation,
        active=float(np.mean(values > INACTIVE)),
        columns=values.size,
        entropy=float(-(shares * np.log2(shares)).sum()),
        zd=float(np.mean(values > mean + deviation)) if deviation > 0 else 0.0,
        similarity=_similarity(entry, entries.get(_before(name, layer))),
        tokens=(int(counts.min()), int(counts.max())),
    )


def _before(name: str, layer: int | None) -> str:
    """The same tensor's name in the layer before."""
    return "" if not layer else _LAYER.sub(f"blk.{layer - 1}.", name, count=1)


def _similarity(entry: Entry, before: Entry | None) -> float:
    if before is None or before.sums.size != entry.sums.size:
        return 0.0
    one, other = (_unit(each.sums.astype(np.float64)) for each in (entry, before))
    return float(one @ other)


def _unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    length = float(np.linalg.norm(values))
    return values / length if length else values


def _some(items: Sequence[object], what: str) -> str:
    named = ", ".join(str(item) for item in items[:NAMED_AT_MOST])
    more = len(items) - NAMED_AT_MOST
    return named + (f" and {more} {what} more" if more > 0 else "")
