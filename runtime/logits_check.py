"""Whether a file computes what its source's weights compute: a few tokens, run through both.

Rounding weights costs a model something; a tensor that is swapped, permuted wrongly or read at the
wrong place makes another model of it. Each layer of the file is given what the source's layers have
made so far, so that its own error shows and not that of those before it: how much that may be
depends on the types alone (LIMITS), whatever the model makes of it. A small model is run as a
whole, too: how far its logits are from the source's is told, and judged by nobody. Of a large one
only the ends are run; in the layers between a few rows of each tensor are compared. Nothing is
compiled for this: NumPy takes the place of kernels that are not there, for the first and the last
layers of the file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.calibration import SCALING
from gguf_tools.describe import CALIBRATION
from gguf_tools.errors import GGUFError
from gguf_tools.recipes import block_number
from gguf_tools.self_check import Finding
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.sources import Source

N_TOKENS = 16
WHOLE_WEIGHTS = 300_000_000  # of models with more only some layers are run
NUMPY_WEIGHTS = 30_000_000  # the same where kernels are not compiled
ENDS = 2  # at either end
SAMPLED = 4  # rows of each tensor in the other layers, at two places
RUN, EVERY = 64, 512  # of the rows of such a model's head: a run of so many, in every so many


# Types by the bits they have for a weight (or more), and the error that is taken for rounding: of
# what a part of the model makes, relative, of the median token. Measured were a third to two
# thirds of that on real models; a wrong tensor makes 0.3 to 2.
LIMITS = (
    (16.0, 0.02),  # F16, BF16, F32
    (8.0, 0.10),
    (6.0, 0.15),
    (5.0, 0.30),
    (4.0, 0.42),
    (3.0, 0.50),
    (0.0, 0.70),
)


@dataclass(frozen=True)
class PartError:
    """A part of the file against that of the source, given the same input.

    Of a layer that is not run it is a tensor, whose rows are compared.
    """

    name: str  # "layer 3", or "blk.3.attn_q.weight"
    error: float  # relative
    lightest: str  # type of its matrices
    limit: float

    @property
    def what(self) -> str:
        return "a sample of its rows" if self.name.startswith("blk.") else "what it makes"

    @property
    def is_wrong(self) -> bool:
        return not self.error <= self.limit  # so is what is no number


@dataclass(frozen=True, eq=False)
class Expected:
    """What the source's weights make of some tokens."""

    ids: tuple[int, ...]
    layers: Sequence[int] | None  # that were run; None: all
    states: tuple[Floats, ...]  # hidden states before each layer, and after the last
    logits: Floats
    source: Source


@dataclass(frozen=True)
class Agreement:
    """Of the logits of two whole models."""

    n_same: int  # tokens after which both have the same first choice
    kl: float  # mean Kullback-Leibler divergence from the source's distributions, nats


@dataclass(frozen=True)
class Comparison:
    """A file against its source."""

    n_tokens: int
    parts: tuple[PartError, ...]  # embedding, layers, head
    logits: Agreement | None = None  # where all was run


def check_logits(comparing: Comparing, file: Source, *, threads: int) -> Finding:
    """The whole file against what its source gives; some of it may have been compared before."""
    try:
        comparing.look(file, file.tensors.keys(), threads=threads)
        found = comparing.result()
    except GGUFError as error:
        return Finding("not run", (f"the file cannot be run: {error}",))
    n_tokens, logits = found.n_tokens, found.logits
    if logits is not None:
        text = f"logits agree on {logits.n_same} of {n_tokens} first choices, KL {logits.kl:.2g}"
    else:
        run = [part for part in found.parts if not part.name.startswith("blk.")]
        worst = max(part.error for part in run)
        text = f"head and {len(run) - 2} layers agree to {worst:.1%}"
        if len(found.parts) > len(run):
            text += f", rows of {len(found.parts) - len(run)} more"
    wrong = [part for part in found.parts if part.is_wrong]
    more = f"; and {len(wrong) - 1} more parts (--check-details)" if len(wrong) > 1 else ""
    problems = [
        f"the {part.name} of the file is not that of the source's weights: {part.what} is "
        f"{part.error:.0%} off, where {part.lightest} explains {part.limit:.0%}{more}"
        for part in wrong[:1]
    ]
    details = [
        f"{part.name}: {part.error:.2%} off, {part.lightest} explains {part.limit:.0%}"
        for part in found.parts
    ]
    if logits is not None:
        details.append(f"logits: {n_tokens} tokens, mean KL divergence {logits.kl:.4g} nats")
    return Finding(text, tuple(problems), tuple(details))


def run_source(
    source: Source,
    ids: Sequence[int],
    *,
    threads: int,
    layers: Sequence[int] | None = None,
) -> Expected:
    """Run the source's own weights; with `layers` only these, and some rows of the head.

    UnsupportedModelError where its architecture has no decoder here.
    """
    n_tokens = len(ids)
    with LayerwiseModel(
        source,
        n_tokens=n_tokens,
        threads=threads,
        layers=layers,
        head_rows=_head_rows(source, layers),
        compiles=False,
    ) as model:
        states = [model.embed(ids)]
        for index in range(len(model.program.layers)):
            states.append(model.layer(index, states[-1]))
        logits = model.head(states[-1])
        return Expected(tuple(ids), layers, tuple(states), logits, source)


def compare(expected: Expected, file: Source, *, threads: int) -> Comparison:
    """Run the file on the same tokens."""
    comparing = Comparing(expected)
    comparing.look(file, file.tensors.keys(), threads=threads)
    return comparing.result()


class Comparing:
    """A file against what its source gives, each part as soon as its tensors are there."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._run: dict[str, PartError] = {}  # embedding, layers, head
        self._sampled: dict[int, PartError] = {}  # layers of which rows are compared
        self._chosen: list[int] | None = None  # the layers to run where not all are
        self._whole = False  # whether the model is run as a whole, too
        self._own: list[Floats] = []  # the file's own states, as far as it has been run
        self._logits: Floats | None = None  # its own

    def look(self, file: Source, there: Collection[str], *, threads: int = 1) -> bool:
        """Compare what is there by now. False: nothing is left to do until more of it is.

        A GGUFError where the file cannot be run. `there` are the tensors of `file` that are; what
        no layer alone has is looked at first. One thread is for while the file is being written.
        """
        missing = {block_number(name) for name in file.tensors if name not in there}
        if -1 in missing:
            return False
        numbers = [n for n in range(count_layers(file)) if n not in missing]
        fresh = [n for n in numbers if f"layer {n}" not in self._run and n not in self._sampled]
        if not self._run or any(self._is_run(n) for n in fresh):
            self._run_parts(file, fresh, threads)
        if file.metadata.get(f"{CALIBRATION}method") not in SCALING:  # else its weights are others
            for number in fresh:
                if not self._is_run(number):
                    self._sampled[number] = sample_layer(self._expected.source, file, number)
        return False

    def result(self) -> Comparison:
        """What came of it, when all of the file has been there."""
        expected, n_tokens = self._expected, len(self._expected.ids)
        numbers = [f"layer {number}" for number in self._numbers]
        names = ("embedding", *(name for name in numbers if name in self._run), "head")
        sampled = (self._sampled[number] for number in sorted(self._sampled))
        parts = (*(self._run[name] for name in names), *sampled)
        if self._logits is None:
            return Comparison(n_tokens, parts)
        same = int((expected.logits.argmax(axis=1) == self._logits.argmax(axis=1)).sum())
        kl = _divergence(expected.logits, self._logits)
        return Comparison(n_tokens, parts, Agreement(same, kl))

    @property
    def _numbers(self) -> Sequence[int]:
        """The layers that the source has been run with."""
        expected = self._expected
        return range(len(expected.states) - 1) if expected.layers is None else expected.layers

    def _is_run(self, number: int) -> bool:
        return number in self._numbers and (self._chosen is None or number in self._chosen)

    def _run_parts(self, file: Source, fresh: Sequence[int], threads: int) -> None:
        """Run these layers, and what is run before any layer is there."""
        expected = self._expected
        ids, layers, states = expected.ids, expected.layers, expected.states
        with LayerwiseModel(
            file,
            n_tokens=len(ids),
            threads=threads,
            layers=layers,
            head_rows=_head_rows(file, layers),
            compiles=False,
        ) as model:
            begins = not self._run
            if begins:
                if not model.is_compiled:
                    self._chosen = choose_layers(file, most=NUMPY_WEIGHTS)
                self._whole = layers is None and self._chosen is None
                self._own = [model.embed(ids)]
                self._add(file, "embedding", "token_embd.", states[0], self._own[0])
            # Layers are given the source's states: NumPy can run several at a time.
            with ThreadPoolExecutor(1 if model.is_compiled else threads) as executor:
                head = executor.submit(model.head, states[-1]) if begins else None
                made = [
                    (number, index, executor.submit(model.layer, index, states[index]))
                    for index, number in enumerate(self._numbers)
                    if number in fresh and self._is_run(number)
                ]
                for number, index, layer in made:
                    before, after = states[index], states[index + 1]
                    found = layer.result() - before
                    self._add(file, f"layer {number}", f"blk.{number}.", after - before, found)
                if head is not None:
                    name = "output." if "output.weight" in file.tensors else "token_embd."
                    self._add(file, "head", name, expected.logits, head.result())
            if self._whole:
                self._run_on(model)

    def _run_on(self, model: LayerwiseModel) -> None:
        """Go on with the file's own states: layers come in order."""
        while f"layer {len(self._own) - 1}" in self._run:
            self._own.append(model.layer(len(self._own) - 1, self._own[-1]))
        if len(self._own) == len(self._expected.states):
            self._logits = model.head(self._own[-1])

    def _add(self, file: Source, name: str, tensors: str, made: Floats, found: Floats) -> None:
        lightest, limit = lightest_type(file, tensors)
        self._run[name] = PartError(name, _off(made, found), lightest, limit)


def choose_layers(source: Source, *, most: int | None = None) -> list[int] | None:
    """All (None), or of a model with more weights than `most` the first and the last."""
    most = WHOLE_WEIGHTS if most is None else most
    n_weights = sum(tensor.n_elements for tensor in source.tensors.values())
    n_layers = count_layers(source)
    if n_weights <= most or n_layers <= 2 * ENDS:
        return None
    return [*range(ENDS), *range(n_layers - ENDS, n_layers)]


def count_layers(source: Source) -> int:
    numbers = [name.split(".")[1] for name in source.tensors if name.startswith("blk.")]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def sample_layer(source: Source, file: Source, layer: int) -> PartError:
    """The worst tensor of a layer that is not run: a few of its rows against the source's."""
    found = []
    for name in (name for name in file.tensors if name.startswith(f"blk.{layer}.")):
        expected, made = (_sample(where, name) for where in (source, file))
        lightest, limit = lightest_type(file, name)
        found.append(PartError(name, _off(expected, made), lightest, limit))
    # What is no number is neither more nor less than another: it is wrong, and comes first.
    return max(found, key=lambda part: (part.is_wrong, part.error / part.limit))


def _sample(source: Source, name: str) -> Floats:
    """A few rows from the start of a tensor, and from its middle, as one."""
    tensor = source.tensors[name]
    starts = {0, tensor.n_rows // 2}
    blocks = [source.rows(name, row, min(row + SAMPLED, tensor.n_rows)) for row in sorted(starts)]
    return tensor.quant.dequantize(np.concatenate(blocks)).reshape(1, -1)


def _head_rows(source: Source, layers: Sequence[int] | None) -> npt.NDArray[np.intp] | None:
    """All (None), or where only some layers are run a sample of them."""
    if layers is None:
        return None
    rows = np.arange(source.tensors["token_embd.weight"].shape[0])
    return rows[rows % EVERY < RUN]


def lightest_type(file: Source, beginning: str) -> tuple[str, float]:
    """The type with the fewest bits a weight, of matrices whose names begin so, and its limit."""
    quants = {
        tensor.quant.name: tensor.quant
        for name, tensor in file.tensors.items()
        if name.startswith(beginning) and len(tensor.shape) > 1
    }
    bits = {name: 8 * quant.block_bytes / quant.block_size for name, quant in quants.items()}
    name, least = min(bits.items(), key=lambda item: item[1], default=("F32", 32.0))
    return name, next(limit for bound, limit in LIMITS if least >= bound)


def _off(expected: Floats, found: Floats) -> float:
    """The relative error of the median token: the first is often one that dwarfs all others."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = [
            np.linalg.norm(other - one) / max(float(np.linalg.norm(one)), 1e-30)
            for one, other in zip(expected, found, strict=True)
        ]
        return float(np.median(errors))


def _divergence(expected: Floats, found: Floats) -> float:
    """The mean over tokens; infinite where one's is no number. Token by token: a row is large."""
    total = 0.0
    for one, other in zip(expected, found, strict=True):
        with np.errstate(invalid="ignore", over="ignore"):
            p, q = _log_chances(one), _log_chances(other)
            total += float(np.exp(p) @ (p - q))
    return total / len(expected) if math.isfinite(total) else math.inf


def _log_chances(logits: Floats) -> npt.NDArray[np.float64]:
    """Of one token."""
    x = logits.astype(np.float64)
    x -= x.max()
    log_chances: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum())
    return log_chances
