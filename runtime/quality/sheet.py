"""The quality sheet: a finished file against the weights it was made from, on a short text.

While the file is still being written, the source's layers are run, and those of the file as they
come. Then both models' answers to the text are compared. Of the tensors a few are likely to cost
most (likely_costs.py); these are measured, each as the only one that the file has changed. See
gguf_tools/quality_sheet.py for what becomes of the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from gguf_tools.quality_sheet import TEXT as TEXT_NAME
from gguf_tools.quality_sheet import Cost, Sheet
from gguf_tools.recipes import block_number
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.quality.file_run import HEAD, FileRun
from runtime.quality.measures import (
    Differences,
    differ,
    distance,
    divergences,
    log_probabilities,
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
            parts += _compare(run, index, model, found)
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
    everything = mean_of(kl[run.compared_positions() - run.first_scored]).value
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


def _compare(
    run: SourceRun, index: int, model: LayerwiseModel, found: Floats
) -> Iterator[Differences]:
    """How the answers to a window differ."""
    for rows in run.scored(index):
        log_q = log_probabilities(model.head(found[rows]))
        tokens = run.windows[index][rows.start + 1 : rows.stop + 1]
        yield differ(log_q, run.answers(index, rows), tokens)


def _divergences(run: SourceRun, file: Source, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """For each tensor the mean divergence from the source's answers where only it is the file's."""
    places = run.compared_positions()
    answers = run.answers_at(places)
    waiting: dict[str, Floats] = {}  # hidden states that the source's head is still to read
    for name in names:
        first = len(run.probes) if name == HEAD else block_number(name)  # -1: before all layers
        # A program without layers is none: for the head there is one that is not run.
        layers = range(min(max(first, 0), len(run.probes) - 1), len(run.probes))
        with run.run_as(Overlay(run.source, file, {name}), layers) as model:
            x = run.states[first] if first >= 0 else model.embed(run.read[0])
            x = x[: places[-1] + 1]  # no token sees a later one
            x = x[places] if name == HEAD else run_layers(model, x)[places]
            if 0 <= first < len(run.probes):
                waiting[name] = x
            else:
                yield name, _mean_divergence(model.head(x), answers)
    step = max(1, len(run.read[0]) // len(places))  # as many tokens as are read together
    for some in (list(waiting)[first : first + step] for first in range(0, len(waiting), step)):
        logits = run.model.head(np.concatenate([waiting[name] for name in some]))
        for name, part in zip(some, np.split(logits, len(some)), strict=True):
            yield name, _mean_divergence(part, answers)


def _mean_divergence(logits: Floats, answers: Floats) -> float:
    return mean_of(divergences(log_probabilities(logits), answers)).value


def _short(value: float) -> float:
    """Four digits: what differs beyond is the order in which threads add."""
    return float(f"{value:.4g}")
