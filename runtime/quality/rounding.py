"""Matrices rounded to the blocks of their types, by what is known of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from gguf_tools.errors import CheckpointError, UnsupportedQuantError, printable
from gguf_tools.feedback.moments import Moments
from gguf_tools.feedback.quantising import quantize_with_moments
from gguf_tools.quants import by_name
from gguf_tools.quants.multiples import keep_multiples
from gguf_tools.quants.quanttype import Bytes, QuantType
from runtime.program import Floats
from runtime.quality.channel_scaling import (
    Factors,
    Reader,
    ScaledWeights,
    find_factors,
    find_scale,
    sampled,
)
from runtime.quality.foldable import Group
from runtime.quality.moments import Key
from runtime.sources import Source

BAND = 1 << 20  # weights that a thread quantises at a time


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a matrix's inputs."""

    importance: Floats | None  # (n_columns,); None: no token came
    moments: tuple[Moments, ...] = ()  # each for as many of the rows


@dataclass(frozen=True, eq=False)
class Rounding:
    """How the tensors of a source are rounded."""

    source: Source
    types: Mapping[str, str]  # of the tensors that are
    method: str
    threads: int
    others: Mapping[str, str] = field(default_factory=dict)  # that may be scaled with them
    factors: Mapping[str, Factors] = field(default_factory=dict)  # by which the source is scaled

    @property
    def needs_moments(self) -> bool:
        """Whether more than their diagonal is made use of."""
        return self.method in ("gptq", "best")

    @property
    def scales(self) -> bool:
        """Whether channels are scaled before anything is rounded."""
        return self.method in ("awq", "best")

    def type_of(self, name: str) -> str:
        return self.types[name] if name in self.types else self.others[name]

    def scaled(self, groups: Sequence[Group], importance: Mapping[Key, Floats]) -> Rounding:
        """The same of weights that are scaled, where less is lost then.

        `importance` is that of the matrices whose inputs are known well enough. All `factors` of
        the result must be rounded, others' too: they belong together.
        """
        known = self.types.keys() | self.others.keys()
        chosen = []
        for group in groups:
            keys = [(c.name, c.index) for c in group.multiplied if c.name in self.types]
            keys = [key for key in keys if key in importance]
            if keys and group.names <= known:
                scale = find_scale(group, self._readers(keys, importance), threads=self.threads)
                chosen += [] if scale is None else [(group, scale)]
        factors = find_factors(chosen, self.source.tensors)
        return replace(self, source=ScaledWeights(self.source, factors), factors=factors)

    def round(self, key: Key, known: Known, blocks: dict[str, Bytes]) -> None:
        """Put the blocks of a matrix where they belong in its tensor's.

        CheckpointError where a weight is no number, UnsupportedQuantError where the type cannot
        hold it. `known` is of the inputs that scaled columns have.
        """
        name = key[0]
        tensor, quant = self.source.tensors[name], by_name(self.type_of(name))
        if name not in blocks:
            row_bytes = quant.row_bytes(tensor.row_length)
            blocks[name] = np.zeros((tensor.n_rows, row_bytes), np.uint8)
        first, weights = self._weights(key)
        _check_finite(name, weights, "is no number: the weights are damaged")
        made = self._rounded(quant, weights, known)
        if quant.multiples is not None:  # which a model may have been trained for
            made = keep_multiples(quant, weights, made)
        blocks[name][first : first + len(weights)] = made
        if np.abs(weights).max(initial=0.0) > LARGE:
            _check_finite(name, quant.dequantize(made), f"is more than {quant.name} can hold")

    def divided(self, key: Key, moments: Floats) -> Floats:
        """Moments of a matrix's inputs, or their diagonal, once its columns are multiplied."""
        name, index = key
        if name not in self.factors:
            return moments
        inverse = np.float32(1) / self.factors[name].columns[index or 0]
        if moments.ndim == 1:
            inverse = inverse**2
        divided: Floats = moments * inverse
        if moments.ndim > 1:  # one number after the other: of a wide matrix no more than a copy
            divided *= inverse[:, None]
        return divided

    def _weights(self, key: Key) -> tuple[int, Floats]:
        """A matrix (n_rows, n_columns), and where its tensor has the first row of it."""
        name, index = key
        tensor = self.source.tensors[name]
        height = tensor.n_rows if index is None else tensor.shape[-2]
        first = 0 if index is None else index * height
        rows = self.source.rows(name, first, first + height)
        weights: Floats = tensor.quant.dequantize(rows).reshape(height, tensor.row_length)
        return first, weights

    def _readers(self, keys: Sequence[Key], importance: Mapping[Key, Floats]) -> list[Reader]:
        found = []
        for key in keys:
            _, weights = self._weights(key)
            quant = by_name(self.types[key[0]])
            found.append(Reader(sampled(weights, len(keys)), quant, importance[key]))
        return found

    def _rounded(self, quant: QuantType, weights: Floats, known: Known) -> Bytes:
        if not known.moments or quant.levels is None:
            return self._weighed(quant, weights, known.importance)
        parts = [
            quantize_with_moments(quant, rows, moments, threads=self.threads)
            for rows, moments in zip(
                np.split(weights, len(known.moments)), known.moments, strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _weighed(self, quant: QuantType, weights: Floats, importance: Floats | None) -> Bytes:
        """The type's own search, with the importance of each column."""
        quantize = quant.quantize
        assert quantize is not None
        step = max(1, BAND // weights.shape[1])
        bands = [weights[first : first + step] for first in range(0, len(weights), step)]
        with ThreadPoolExecutor(self.threads) as executor:
            parts = list(executor.map(lambda band: quantize(band, importance), bands))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


LARGE = 60_000.0  # from here on a type with 16-bit scales may not hold a weight (65504)


def _check_finite(name: str, weights: Floats, what: str) -> None:
    if not np.isfinite(weights).all():
        row, column = np.argwhere(~np.isfinite(weights.reshape(-1, weights.shape[-1])))[0]
        error = CheckpointError if "number" in what else UnsupportedQuantError
        raise error(f"tensor {printable(name)}: a weight {what} (row {row}, column {column})")
