"""The quality sheet: a finished file against the weights it was made from, on a short text.

While the file is still being written, the source's layers are run, and those of the file as they
come. Then both models' answers to the text are compared. Of the tensors a few are likely to cost
most (likely_costs.py); these are measured, each as the only one that the file has changed. See
gguf_tools/quality_sheet.py for what becomes of the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from gguf_tools.quality_sheet import TEXT as TEXT_NAME
from gguf_tools.quality_sheet import Cost, Sheet
from gguf_tools.recipes import block_number
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.quality.file_run import HEAD, FileRun
from runtime.quality.measures import (
    BandwiseDifferences,
    Differences,
    distance,
    mean_of,
    perplexity,
)
from runtime.quality.overlay import Overlay
from runtime.quality.source_run import SMALL, SourceRun, run_layers
from runtime.sources import Source

TRIED, TRIED_ON_CLIFF = 3, 8  # tensors that are measured alone
TRIED_LARGE = 2  # of a model that is not small


def measure(begun: FileRun, file: Source, *, bits: int, threads: int) -> Sheet:
    """The sheet of `file`, whose type has so many bits; it is whole now.

    More tensors are measured alone where it turns out a cliff.
    """
    run = begun.run
    run.use_threads(threads)
    begun.finish(file)
    parts: list[Differences] = []
    with run.run_as(file) as model:
        for index, found in enumerate(begun.hidden):
            parts.append(_compare(run, index, model, found))
    apart = distance(parts)
    said = perplexity(np.concatenate([part.nll for part in parts]))
    sheet = Sheet(
        text=TEXT_NAME,
        tokens=sum(len(part.nll) for part in parts),
        bits=bits,
        mean_kl=_short(apart.kl.value),
        mean_kl_error=_short(apart.kl.error),
        kl_99=_short(apart.kl_99),
        same_top=_short(apart.same_top.value),
        same_top_error=_short(apart.same_top.error),
        perplexity=_short(said.value),
        perplexity_ratio=_short(apart.perplexity_ratio.value),
        perplexity_ratio_error=_short(apart.perplexity_ratio.error),
    )
    if not begun.names_tensors:
        return sheet
    n_tried = TRIED if run.n_weights <= SMALL else TRIED_LARGE
    if sheet.is_cliff:
        n_tried = TRIED_ON_CLIFF
    kl = np.concatenate([part.kl for part in parts])  # of the first window's tokens first
    everything = mean_of(kl[run.compared_positions() - run.scored.start]).value
    return replace(sheet, costs=costs(begun, file, n_tried, everything))


def costs(begun: FileRun, file: Source, n_tried: int, everything: float) -> tuple[Cost, ...]:
    """What the tensors that are likely to cost most do cost, each alone, the largest first.

    `everything` is the mean divergence of the file, at the compared positions of the first window.
    """
    estimates, run = begun.estimates, begun.run
    likely = sorted(estimates, key=lambda name: (-estimates[name], name))[:n_tried]
    if not likely:
        return ()
    found = []
    for name, divergence in _divergences(run, file, likely):
        share = divergence / max(everything, 1e-12)
        found.append(Cost(name, file.tensors[name].quant.name, _short(share)))
    return tuple(sorted(found, key=lambda cost: -cost.share))


def _compare(run: SourceRun, index: int, model: LayerwiseModel, found: Floats) -> Differences:
    """How the answers to a window differ."""
    differences = BandwiseDifferences(run.windows[index][run.scored.start + 1 :])
    expected = run.model.head_bands(run.ends[index][run.scored])
    for p, q in zip(expected, model.head_bands(found[run.scored]), strict=True):
        differences.add(q, p)
    return differences.result()


def _divergences(run: SourceRun, file: Source, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """For each tensor the mean divergence from the source's answers where only it is the file's."""
    places = run.compared_positions()
    tokens = run.windows[0][places + 1]
    expected = run.states[-1][places]
    waiting: dict[str, Floats] = {}  # hidden states that the source's own head is still to read
    for name in names:
        with _changed(run, file, name) as model:
            hidden = _last_states(run, model, name, places)
            if block_number(name) >= 0:
                waiting[name] = hidden
            else:
                pairs = zip(run.model.head_bands(expected), model.head_bands(hidden), strict=True)
                (divergence,) = _mean_divergences(pairs, tokens, 1)
                yield name, divergence
    some_at_once = max(1, len(run.read[0]) // len(places) - 1)  # as many tokens as a window has
    for first in range(0, len(waiting), some_at_once):
        some = dict(islice(waiting.items(), first, first + some_at_once))
        rows = np.concatenate([expected, *some.values()])
        bands = (np.split(band, len(some) + 1) for band in run.model.head_bands(rows))
        yield from zip(some, _mean_divergences(bands, tokens, len(some)), strict=True)


def _changed(run: SourceRun, file: Source, name: str) -> LayerwiseModel:
    """The source's layers from this tensor's on, with the file's tensor in its place."""
    n_layers = len(run.probes)
    # A program without layers is none: for the head there is one that is not run.
    first = n_layers - 1 if name == HEAD else max(block_number(name), 0)
    return run.run_as(Overlay(run.source, file, {name}), range(first, n_layers))


def _last_states(
    run: SourceRun, model: LayerwiseModel, name: str, places: npt.NDArray[np.intp]
) -> Floats:
    """Hidden states of some tokens at the end of the layers, where a tensor is changed."""
    if name == HEAD:
        return run.states[-1][places]
    layer = block_number(name)
    x = run.states[layer] if layer >= 0 else model.embed(run.read[0])
    return run_layers(model, x[: places[-1] + 1])[places]  # no token sees a later one


def _mean_divergences(
    bands: Iterable[Sequence[Floats]], tokens: npt.NDArray[np.int64], n_candidates: int
) -> Iterator[float]:
    """Of each candidate; a band is a reference's logits, and then theirs."""
    of_each = [BandwiseDifferences(tokens) for _ in range(n_candidates)]
    for p, *candidates in bands:
        for differences, q in zip(of_each, candidates, strict=True):
            differences.add(q, p)
    for differences in of_each:
        yield mean_of(differences.result().kl).value


def _short(value: float) -> float:
    """Four digits: what differs beyond is the order in which threads add."""
    return float(f"{value:.4g}")
