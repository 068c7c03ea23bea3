"""A model's matrices rounded by what a text makes of them, layer by layer.

All windows of the text go through a layer of the source's weights before the next. Meanwhile the
moments of what its matrices are multiplied with are added up, and then the matrices are rounded and
their blocks put into the work file. Memory holds the hidden states of all windows, the moments of
one layer (or of some of its matrices, where even that is too much) and one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gguf_tools.calibration_file import CalibrationFile
from gguf_tools.feedback.moments import Moments
from gguf_tools.quants.quanttype import Bytes
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.quality.attention_moments import AttentionMoments, find_attention
from runtime.quality.evaluation import Ids, with_bos
from runtime.quality.first_tokens import FirstTokens
from runtime.quality.foldable import Group, foldable_groups
from runtime.quality.moments import (
    FEW,
    SHRINK,
    Collector,
    Inputs,
    Key,
    Sums,
    in_passes,
    shared_inputs,
    shrink,
)
from runtime.quality.rounding import Known, Rounding

MOMENTS_BYTES = 3 << 30  # of moments that are added up in one run of a layer
ATTENTION_WINDOWS = 16  # whose attention is looked at
FIRST_TOKENS = 512  # sequences of one token, where no bos stands in front of all


@dataclass(frozen=True)
class Step:
    """So much of the work is done."""

    done: float  # in layers
    total: int


@dataclass(eq=False)
class _Layer:
    """What has been made of a layer so far."""

    index: int
    blocks: dict[str, Bytes] = field(default_factory=dict)  # tensor -> (n_rows, row_bytes)
    unseen: list[str] = field(default_factory=list)  # experts that no token came to
    few: list[str] = field(default_factory=list)  # of which only the diagonal is believed


class Calibration:
    """A model, the windows it reads, and what its matrices are to become."""

    def __init__(
        self,
        model: LayerwiseModel,
        windows: Ids,  # (n_windows, n_tokens)
        rounding: Rounding,
        *,
        bos: int | None,
    ) -> None:
        self._model, self._rounding = model, rounding
        self._n_layers = len(model.program.layers)
        self._hidden = [model.embed(with_bos(window, bos).tolist()) for window in windows]
        self._n_tokens = windows.size
        every = max(1, len(windows) // ATTENTION_WINDOWS)
        self._attended = set(range(0, len(windows), every))
        # First tokens are the same in all windows of a model with bos.
        chosen = windows.reshape(-1)[:: -(-windows.size // FIRST_TOKENS)] if bos is None else [bos]
        self._firsts = np.concatenate([model.embed([token]) for token in chosen])
        self._alone = FirstTokens(model.program)
        self._foldable: list[Group] = foldable_groups(model.program) if rounding.scales else []

    def run(self, work: CalibrationFile) -> Iterator[Step]:
        """Add to the work file the layers that it has not yet."""
        for index in range(self._n_layers):
            if index < len(work.parts):
                for share in self._read(index, self._collector([]), None, onward=True):
                    yield Step(index + share, self._n_layers)
                continue
            layer = _Layer(index)
            for share in self._calibrate(layer):
                yield Step(index + share, self._n_layers)
            type_of = self._rounding.type_of
            tensors = [(name, type_of(name), blocks) for name, blocks in layer.blocks.items()]
            work.append(tensors, {"unseen": layer.unseen, "few": layer.few})

    def _calibrate(self, layer: _Layer) -> Iterator[float]:
        """Round the layer's matrices, and let the hidden states pass; gives the share done."""
        groups = [
            group
            for group in shared_inputs(self._model.program.layers[layer.index])
            if any(name in self._rounding.types for name, _ in group.members)
        ]
        whole = self._rounding.needs_moments
        passes = list(in_passes(groups, MOMENTS_BYTES)) if whole and groups else [groups]
        rounding = self._rounding
        if len(passes) > 1 and rounding.scales:  # no pass knows all that scales depend on
            collector = self._collector(groups)
            yield from (0.0 for _ in self._read(layer.index, collector, None, onward=False))
            rounding = self._scaled(layer, groups, collector)
        for number, chosen in enumerate(passes):
            collector = self._collector(chosen, whole=whole)
            attention = self._attention(layer.index, chosen) if whole else None
            onward = number == len(passes) - 1
            for share in self._read(layer.index, collector, attention, onward=onward):
                yield (number + share / 2) / len(passes)
            if len(passes) == 1 and rounding.scales:
                rounding = self._scaled(layer, groups, collector)
            for place, group in enumerate(chosen, 1):
                sums = collector.sums.pop(group.members[0])
                self._round(layer, rounding, group, sums, attention)
                yield (number + 0.5 + place / len(chosen) / 2) / len(passes)
        for name in sorted(rounding.factors.keys() - rounding.types.keys()):  # norms, biases...
            rounding.round((name, None), Known(None), layer.blocks)

    def _scaled(self, layer: _Layer, groups: Sequence[Inputs], collector: Collector) -> Rounding:
        """How the layer is rounded, its channels scaled."""
        importance: dict[Key, Floats] = {}
        for group in groups:
            sums = collector.sums[group.members[0]]
            if sums.importance is not None and sums.n_tokens >= FEW:
                importance |= dict.fromkeys(group.members, sums.importance)
        foldable = [group for group in self._foldable if group.layer == layer.index]
        return self._rounding.scaled(foldable, importance)

    def _read(
        self,
        index: int,
        collector: Collector,
        attention: AttentionMoments | None,
        *,
        onward: bool,
    ) -> Iterator[float]:
        """Run a layer for all windows, to go on from there or not; gives the share done."""
        for place, x in enumerate(self._hidden):
            if attention is not None and place in self._attended:
                attention.add(x)
            after = self._model.layer(index, x, collector.observe)
            if onward:
                self._hidden[place] = after
            yield (place + 1) / len(self._hidden)
        if self._alone.can_run(index):
            firsts = self._alone.layer(index, self._firsts, collector.observe_first)
            if onward:
                self._firsts = firsts
        collector.finish()

    def _collector(self, groups: Sequence[Inputs], *, whole: bool = False) -> Collector:
        n_first = len(self._firsts)
        return Collector(groups, n_tokens=self._n_tokens, n_first=n_first, whole=whole)

    def _attention(self, index: int, groups: Sequence[Inputs]) -> AttentionMoments | None:
        """What is to add up the layer's attention, if these are the inputs of its values."""
        found = find_attention(self._model.program, index)
        members = {name for group in groups for name, _ in group.members}
        if found is None or found.values.name not in members or found.keys.name not in members:
            return None
        return AttentionMoments(self._model.program, index, found, room=MOMENTS_BYTES)

    def _round(
        self,
        layer: _Layer,
        rounding: Rounding,
        group: Inputs,
        sums: Sums,
        attention: AttentionMoments | None,
    ) -> None:
        """Round the matrices that have these inputs."""

        def moments_of(sum_: Floats) -> Moments:
            return Moments(rounding.divided(group.members[0], sum_))

        def moments_of_head(sum_: Floats) -> Moments:
            shrink(sum_, SHRINK)
            return moments_of(sum_)

        importance, moments = sums.importance, None
        if importance is not None:
            importance = rounding.divided(group.members[0], importance)
        for name, index in group.members:
            if name not in rounding.types:
                continue
            if index is not None and sums.n_tokens < FEW:
                told = layer.few if sums.n_tokens else layer.unseen
                told.append(f"{name}[{index}]")
            known = Known(importance)
            by_heads = attention.take(name) if attention is not None else None
            if by_heads is not None:
                known = Known(importance, tuple(moments_of_head(h) for h in by_heads))
            else:
                if (taken := sums.take_moments()) is not None:
                    moments = moments_of(taken)
                if moments is not None:
                    known = Known(importance, (moments,))
            rounding.round((name, index), known, layer.blocks)
