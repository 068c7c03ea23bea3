"""Compare two GGUF files: metadata, tensors, and how far their weights are apart.

How a model is split into files is no difference: `split.*` is not compared.

The first file is what the second is measured by: the relative error of a tensor is the root mean
square of the differences over that of the first file's weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import Any

import numpy as np

from gguf_tools.describe import show_value, to_json
from gguf_tools.errors import printable
from gguf_tools.reader import GGUFFile, TensorInfo

SPLIT = "split."
SHOWN_TENSORS = 12
SHOWN_KEYS = 12


@dataclass(frozen=True)
class KeyDifference:
    """A key that is in one of the files only, or whose values or types differ."""

    key: str
    a: Any | None
    b: Any | None
    a_type: str | None  # None: not in that file
    b_type: str | None
    first: int | None = None  # of two arrays: the first place where they differ


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is in one of the files only, or that differs in type, shape or bytes."""

    name: str
    a: TensorInfo | None
    b: TensorInfo | None
    relative_rms: float | None = None  # None where the shapes differ, or one is missing
    largest: float | None = None  # difference of two weights
    n_not_finite: int = 0  # weights that are NaN or infinite in one of the files

    @property
    def compared(self) -> bool:
        return self.relative_rms is not None


@dataclass(frozen=True)
class Difference:
    """All that differs; nothing does in files that mean the same."""

    keys: tuple[KeyDifference, ...]
    tensors: tuple[TensorDifference, ...]
    n_keys_same: int
    n_tensors_same: int
    order: bool  # the same tensors come in another order

    @property
    def equal(self) -> bool:
        return not (self.keys or self.tensors or self.order)


def compare(a: GGUFFile, b: GGUFFile) -> Difference:
    """What differs between two files. Weights are read in bands."""
    names = [
        key
        for key in (*a.metadata, *(key for key in b.metadata if key not in a.metadata))
        if not key.startswith(SPLIT)
    ]
    keys = tuple(_compare_keys(a, b, names))
    tensors = tuple(_compare_tensors(a, b))
    common = [name for name in a.tensors if name in b.tensors]
    changed = sum(1 for item in tensors if item.a and item.b)
    return Difference(
        keys,
        tensors,
        n_keys_same=len(names) - len(keys),
        n_tensors_same=len(common) - changed,
        order=common != [name for name in b.tensors if name in a.tensors],
    )


def describe_difference(found: Difference) -> dict[str, Any]:
    """What `gguf diff --json` prints."""
    return {
        "equal": found.equal,
        "metadata": {
            "same": found.n_keys_same,
            "only_a": {item.key: to_json(item.a) for item in found.keys if not item.b_type},
            "only_b": {item.key: to_json(item.b) for item in found.keys if not item.a_type},
            "changed": {
                item.key: _describe_key(item) for item in found.keys if item.a_type and item.b_type
            },
        },
        "tensors": {
            "same": found.n_tensors_same,
            "other_order": found.order,
            "only_a": [item.name for item in found.tensors if not item.b],
            "only_b": [item.name for item in found.tensors if not item.a],
            "changed": [_describe_tensor(item) for item in _worst_first(found)],
        },
    }


def difference_lines(found: Difference, *, everything: bool = False) -> Iterator[str]:
    """What `gguf diff` prints, one screen of it unless `everything` is asked for."""
    if found.equal:
        yield (
            f"equal: {found.n_keys_same:,} metadata keys and {found.n_tensors_same:,} tensors are "
            "the same"
        )
        return
    yield f"metadata: {found.n_keys_same:,} keys the same, {len(found.keys):,} differ"
    shown = found.keys if everything else found.keys[:SHOWN_KEYS]
    for item in shown:
        yield "  " + _key_line(item)
    if len(shown) < len(found.keys):
        yield f"  ... and {len(found.keys) - len(shown):,} more (--all)"
    order = ", and they come in another order" if found.order else ""
    yield f"tensors: {found.n_tensors_same:,} the same, {len(found.tensors):,} differ{order}"
    single = [item for item in found.tensors if not (item.a and item.b)]
    changed = _worst_first(found)
    for tensor in single if everything else single[:SHOWN_TENSORS]:
        yield f"  {'+' if tensor.a is None else '-'} {_tensor_name(tensor)}"
    if len(single) > SHOWN_TENSORS and not everything:
        yield f"  ... and {len(single) - SHOWN_TENSORS:,} more (--all)"
    yield from _tensor_table(changed if everything else changed[:SHOWN_TENSORS])
    if len(changed) > SHOWN_TENSORS and not everything:
        yield f"  ... and {len(changed) - SHOWN_TENSORS:,} with smaller errors (--all)"


# --- metadata


def _compare_keys(a: GGUFFile, b: GGUFFile, names: list[str]) -> Iterator[KeyDifference]:
    for key in names:
        types = a.metadata_types.get(key), b.metadata_types.get(key)
        first, second = a.metadata.get(key), b.metadata.get(key)
        if None in types or types[0] != types[1]:
            yield KeyDifference(key, first, second, *types)
        elif a.encoded(key) != b.encoded(key):
            yield KeyDifference(key, first, second, *types, _first_difference(first, second))


def _first_difference(a: Any, b: Any) -> int | None:
    """Where two arrays begin to differ; the shorter one's length if it is the longer's start."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        n = min(len(a), len(b))
        places = np.flatnonzero(a[:n] != b[:n])
        return int(places[0]) if places.size else n
    if isinstance(a, list) and isinstance(b, list):
        pairs = enumerate(zip(a, b, strict=False))
        return next((i for i, (x, y) in pairs if repr(x) != repr(y)), min(len(a), len(b)))
    return None


def _describe_key(item: KeyDifference) -> dict[str, Any]:
    facts: dict[str, Any] = {"a_type": item.a_type, "b_type": item.b_type}
    if item.first is None:
        return {**facts, "a": to_json(item.a), "b": to_json(item.b)}
    assert item.a is not None and item.b is not None
    facts |= {"a_count": len(item.a), "b_count": len(item.b), "first_difference": item.first}
    for name, values in (("a", item.a), ("b", item.b)):
        if item.first < len(values):
            facts[f"{name}_there"] = to_json(values[item.first : item.first + 1])[0]
    return facts


def _key_line(item: KeyDifference) -> str:
    key = printable(item.key)
    if item.a_type is None or item.b_type is None:
        sign, value = ("+", item.b) if item.a_type is None else ("-", item.a)
        return f"{sign} {key} = {show_value(value)}"
    if item.first is None:
        types = f" ({item.a_type} -> {item.b_type})" if item.a_type != item.b_type else ""
        texts = show_value(item.a), show_value(item.b)
        if texts[0] == texts[1] and isinstance(item.a, str) and isinstance(item.b, str):
            place = _first_difference(list(item.a), list(item.b)) or 0
            texts = (
                f"{len(item.a):,} characters",
                f"{len(item.b):,}, which differ from place {place:,}",
            )
        return f"~ {key}: {texts[0]} -> {texts[1]}{types}"
    assert item.a is not None and item.b is not None
    there = [
        show_value(values[item.first : item.first + 1]) if item.first < len(values) else "its end"
        for values in (item.a, item.b)
    ]
    return (
        f"~ {key}: {len(item.a):,} values -> {len(item.b):,}, the first difference at "
        f"{item.first:,}: {there[0]} -> {there[1]}"
    )


# --- tensors


def _compare_tensors(a: GGUFFile, b: GGUFFile) -> Iterator[TensorDifference]:
    for name in (*a.tensors, *(name for name in b.tensors if name not in a.tensors)):
        ours, theirs = a.tensors.get(name), b.tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            yield TensorDifference(name, ours, theirs)
        else:
            found = _compare_weights(a, b, name)
            if found is not None:
                yield found


def _compare_weights(a: GGUFFile, b: GGUFFile, name: str) -> TensorDifference | None:
    """None for two tensors of one type and the same bytes."""
    ours, theirs = a.tensors[name], b.tensors[name]
    pairs = zip(a.bands(name), b.bands(name), strict=True)
    if ours.quant == theirs.quant and all(np.array_equal(*pair) for pair in pairs):
        return None
    squares = errors = largest = 0.0
    n_not_finite = 0
    for first, second in zip(a.bands(name), b.bands(name), strict=True):
        x = ours.quant.dequantize(first).astype(np.float64)
        y = theirs.quant.dequantize(second)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            n_not_finite += int(finite.size - np.count_nonzero(finite))
            x, y = x[finite], y[finite]
        squares += float(x @ x)
        x -= y
        errors += float(x @ x)
        largest = max(largest, float(np.abs(x).max(initial=0.0)))
    relative = sqrt(errors / squares) if squares else (inf if errors else 0.0)
    return TensorDifference(name, ours, theirs, relative, largest, n_not_finite)


def _worst_first(found: Difference) -> list[TensorDifference]:
    """Tensors of both files: those of different shapes, then those that are not finite, then by
    their error."""

    def badness(item: TensorDifference) -> tuple[bool, int, float]:
        relative = nan if item.relative_rms is None else item.relative_rms
        return item.compared, -item.n_not_finite, -relative if item.compared else 0.0

    return sorted((item for item in found.tensors if item.a and item.b), key=badness)


def _describe_tensor(item: TensorDifference) -> dict[str, Any]:
    assert item.a is not None and item.b is not None
    return {
        "name": item.name,
        "a_type": item.a.quant.name,
        "b_type": item.b.quant.name,
        "a_shape": list(reversed(item.a.shape)),
        "b_shape": list(reversed(item.b.shape)),
        "relative_rms": to_json(item.relative_rms),
        "largest": to_json(item.largest),
        "not_finite": item.n_not_finite,
    }


def _tensor_table(items: list[TensorDifference]) -> Iterator[str]:
    if not items:
        return
    width = max(20, *(len(printable(item.name)) for item in items))
    yield f"  {'tensor, the worst first':<{width}}  {'type':<16}  relative RMS  largest error"
    for item in items:
        assert item.a is not None and item.b is not None
        types = item.a.quant.name
        if item.b.quant != item.a.quant:
            types += f" -> {item.b.quant.name}"
        line = f"  {printable(item.name):<{width}}  {types:<16}"
        if item.relative_rms is None or item.largest is None:
            shapes = (" x ".join(map(str, reversed(info.shape))) for info in (item.a, item.b))
            yield f"{line}  shape {' -> '.join(shapes)}"
            continue
        bad = f"  {item.n_not_finite:,} not finite" if item.n_not_finite else ""
        yield f"{line}  {item.relative_rms:>12.3e}  {item.largest:>13.3e}{bad}"


def _tensor_name(item: TensorDifference) -> str:
    info = item.a or item.b
    assert info is not None
    shape = " x ".join(map(str, reversed(info.shape)))
    return f"{printable(item.name)} {info.quant.name} {shape}"
