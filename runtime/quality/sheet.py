"""The quality sheet: a finished file against the weights it was made from, on a short text.

The source's layers are run while the file is still being written. Then both models' answers to the
text are compared. Of the tensors a few are likely to cost most (likely_costs.py); these are
measured, each as the only one that the file has changed. See gguf_tools/quality_sheet.py for what
becomes of the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import GGUFError
from gguf_tools.quality_sheet import TEXT as TEXT_NAME
from gguf_tools.quality_sheet import Cost, Sheet
from gguf_tools.recipes import block_number
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.quality.evaluation import Ids, with_bos
from runtime.quality.likely_costs import (
    Probes,
    estimate,
    layer_shares,
    lookup_error,
    probed_positions,
)
from runtime.quality.measures import (
    Differences,
    differ,
    distance,
    log_probabilities,
    mean_of,
    perplexity,
)
from runtime.quality.overlay import Overlay
from runtime.quality.sheet_text import TEXT
from runtime.sources import Source
from runtime.tokenizer import Tokenizer

WINDOW = 256  # tokens
SKIPPED = 32  # at a window's start, after which nobody could say much of what comes
SHORTEST = 64
WIDEST = 4 << 20  # floats of a window, in the widest place of a layer
SMALL = 200_000_000  # weights; models with more read one short window
SHORT_WINDOW = 128  # tokens of it; and where kernels are not compiled
ROWS_BYTES = 16 << 20  # of the rows of logits that are compared at a time
COMPARED = 64  # tokens whose answers to a single tensor's change are compared, at most
COMPARED_BYTES = 16 << 20  # of these answers: fewer tokens where a vocabulary is large
TRIED, TRIED_ON_CLIFF = 3, 8  # tensors that are measured alone
TRIED_LARGE = 2  # of a model that is not small
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


class SourceRun:
    """What the source's weights make of the text. For a `with` block; the source stays open."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, *, threads: int, compiles: bool
    ) -> None:
        """Runs the layers. GGUFError where there is no decoder for the model, or where it knows
        other tokens. Kernels that are missing are compiled if it `compiles` them, and for a model
        that NumPy would take too long for.
        """
        self.source, self._threads = source, threads
        self.n_weights = sum(tensor.n_elements for tensor in source.tensors.values())
        self._compiles = compiles or self.n_weights > SMALL
        self.windows = cut(tokenizer, source, n_windows=2)
        if self.n_weights > SMALL:
            self.windows = self.windows[:1, :SHORT_WINDOW]
        self.model = self.run_as(source)
        try:
            if not self.model.is_compiled:
                self.windows = self.windows[:1, :SHORT_WINDOW]
            bos = tokenizer.bos_id if tokenizer.add_bos else None
            self.read = [with_bos(window, bos).tolist() for window in self.windows]
            if max(map(max, self.read)) >= self.model.config.n_vocab:
                raise GGUFError("its tokenizer has tokens that the model does not know")
            self.positions = probed_positions(len(self.read[0]))
            self.states: list[Floats] = []  # of the first window, before each layer and at the end
            self.probes: list[Probes] = []  # of each layer
            self.ends = [self._run_first(), *map(self._run, self.read[1:])]
        except BaseException:
            self.model.close()
            raise

    def run_as(self, source: Source, layers: Sequence[int] | None = None) -> LayerwiseModel:
        """A model of some weights, all like the source's in shape."""
        return LayerwiseModel(
            source,
            n_tokens=self.windows.shape[1],
            threads=self._threads,
            layers=layers,
            compiles=self._compiles,
        )

    def use_threads(self, threads: int) -> None:
        """Run with so many from now on."""
        self.model.close()
        self._threads = threads
        self.model = self.run_as(self.source)

    def _run_first(self) -> Floats:
        x = self.model.embed(self.read[0])
        for index in range(len(self.model.program.layers)):
            self.states.append(x)
            self.probes.append(Probes(self.positions))
            x = self.model.layer(index, x, self.probes[-1].observe)
        self.states.append(x)
        return x

    def _run(self, ids: list[int]) -> Floats:
        return run_layers(self.model, self.model.embed(ids))

    def __enter__(self) -> SourceRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.model.close()


def cut(tokenizer: Tokenizer, source: Source, *, n_windows: int) -> Ids:
    """The text's windows (n, n_tokens), as long as the model's positions allow."""
    name = source.metadata.get("general.architecture")
    n_ctx = source.metadata.get(f"{name}.context_length")
    ids = np.asarray(tokenizer.encode(TEXT, add_special=False), np.int64)
    widest = max(
        (max(t.shape[-2:]) for name, t in source.tensors.items() if block_number(name) >= 0),
        default=1,
    )
    limit = n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else WINDOW
    width = min(WINDOW, len(ids), limit, WIDEST // widest)
    if width < SHORTEST:
        raise GGUFError(
            f"it takes windows of {SHORTEST} tokens, and {width} are what the text, the model's "
            "positions and the memory for its layers' widths allow"
        )
    n_windows = min(n_windows, len(ids) // width)
    return ids[: n_windows * width].reshape(n_windows, width)


def run_layers(model: LayerwiseModel, x: Floats) -> Floats:
    """The hidden states after all of the model's layers."""
    for index in range(len(model.program.layers)):
        x = model.layer(index, x)
    return x


def measure(
    run: SourceRun, file: Source, *, bits: int, threads: int, names_tensors: bool = True
) -> Sheet:
    """The sheet of `file`, whose type has so many bits.

    More tensors are measured alone where it turns out a cliff.
    """
    run.use_threads(threads)
    parts: list[Differences] = []
    with run.run_as(file) as model:
        for ids, window, expected in zip(run.read, run.windows, run.ends, strict=True):
            found = run_layers(model, model.embed(ids))
            parts += _compare(run.model, expected, model, found, window)
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
    if not names_tensors:
        return sheet
    n_tried = TRIED if run.n_weights <= SMALL else TRIED_LARGE
    if sheet.is_cliff:
        n_tried = TRIED_ON_CLIFF
    kl = np.concatenate([part.kl for part in parts])  # of the first window's tokens first
    places = _compared_positions(run)
    everything = mean_of(kl[places - _first_scored(run.windows[0])]).value
    return replace(sheet, costs=costs(run, file, n_tried, everything))


def costs(run: SourceRun, file: Source, n_tried: int, everything: float) -> tuple[Cost, ...]:
    """What the tensors that are likely to cost most do cost, each alone, the largest first.

    `everything` is the mean divergence of the file, at `_compared_positions` of the first window.
    """
    estimates = dict(_estimates(run, file))
    likely = sorted(estimates, key=lambda name: (-estimates[name], name))[:n_tried]
    if not likely:
        return ()
    places = _compared_positions(run)
    answers = log_probabilities(run.model.head(run.states[-1][places]))
    found = []
    for name in likely:
        share = _divergence(run, file, {name}, answers, places) / max(everything, 1e-12)
        found.append(Cost(name, file.tensors[name].quant.name, _short(share)))
    return tuple(sorted(found, key=lambda cost: -cost.share))


def _compare(
    model: LayerwiseModel, expected: Floats, other: LayerwiseModel, found: Floats, window: Ids
) -> Iterator[Differences]:
    """How the answers to hidden states differ, a few rows of logits at a time."""
    n_vocab = model.config.n_vocab
    step = max(1, ROWS_BYTES // (4 * n_vocab))
    last = len(window) - 1
    for first in range(_first_scored(window), last, step):
        rows = slice(first, min(first + step, last))
        log_p = log_probabilities(model.head(expected[rows]))
        log_q = log_probabilities(other.head(found[rows]))
        yield differ(log_q, log_p, window[first + 1 : rows.stop + 1])


def _estimates(run: SourceRun, file: Source) -> Iterator[tuple[str, float]]:
    """What the changed tensors are likely to cost, in no unit."""
    head = HEAD if HEAD in run.source.tensors else EMBEDDING
    for name, tensor in file.tensors.items():
        before = run.source.tensors.get(name)
        if before is None or len(tensor.shape) < 2 or tensor.quant.name == before.quant.name:
            continue
        layer = block_number(name)
        if 0 <= layer < len(run.probes):
            inputs = run.probes[layer].inputs.get(name)
            if inputs:
                shares = layer_shares(run.states[layer], run.states[layer + 1])[run.positions]
                yield name, estimate(name, inputs, shares, run.source, file)
            continue
        cost = 0.0
        if name == EMBEDDING:
            ids = [run.read[0][position] for position in run.positions]
            cost += lookup_error(name, ids, run.source, file)
        if name == head:
            probes = Probes(np.arange(len(run.positions)))
            run.model.head(run.states[-1][run.positions], probes.observe)
            cost += estimate(name, probes.inputs.get(name, {}), None, run.source, file)
        if cost:
            yield name, cost


def _divergence(
    run: SourceRun, file: Source, names: set[str], answers: Floats, places: npt.NDArray[np.intp]
) -> float:
    """The mean divergence from the source's answers where only these tensors are the file's."""
    layers = [block_number(name) for name in names]
    n_layers = len(run.states) - 1
    first = min(
        layer if layer >= 0 else (n_layers if name == HEAD else -1)
        for layer, name in zip(layers, names, strict=True)
    )
    first = min(first, n_layers - 1)  # a program without layers is none
    mixed = Overlay(run.source, file, names)
    with run.run_as(mixed, range(max(first, 0), n_layers)) as model:
        x = run.states[first] if first >= 0 else model.embed(run.read[0])
        x = x[: places[-1] + 1]  # no token sees a later one
        log_q = log_probabilities(model.head(run_layers(model, x)[places]))
    return _mean_kl(answers, log_q)


def _mean_kl(log_p: Floats, log_q: Floats) -> float:
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    return mean_of(kl).value


def _first_scored(window: Ids) -> int:
    """The first token whose answer is compared."""
    return min(SKIPPED, (len(window) - 1) // 2)


def _compared_positions(run: SourceRun) -> npt.NDArray[np.intp]:
    """Of the scored tokens in the first window's first half as many as are compared."""
    window = run.windows[0]
    first, last = _first_scored(window), max(SHORTEST, len(window) // 2) - 2
    affordable = max(1, COMPARED_BYTES // (4 * run.model.config.n_vocab))
    count = min(COMPARED, affordable, last + 1 - first)
    return np.linspace(first, last, count).astype(np.intp)


def _short(value: float) -> float:
    """Four digits: what differs beyond is the order in which threads add."""
    return float(f"{value:.4g}")
