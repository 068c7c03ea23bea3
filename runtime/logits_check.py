"""Whether a file computes what its source's weights compute: a few tokens, run through both.

Rounding weights costs a model something; a tensor that is swapped, permuted wrongly or read at the
wrong place makes another model of it. Each layer of the file is given what the source's layers have
made so far, so that its own error shows and not that of those before it; a small model is run as a
whole, too, for its logits. How much an error may be depends on the types: see COSTS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import GGUFError
from gguf_tools.self_check import Finding
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.sources import Source

TEXT = (
    "The river rises in the mountains, crosses three countries and reaches the sea near a small "
    "town where, in 1869, the first bridge of iron was built. People say that"
)
N_TOKENS = 24
WHOLE_WEIGHTS = 800_000_000  # of models with more only some layers are run
ENDS = 2  # at either end


@dataclass(frozen=True)
class Cost:
    """What a type may cost, and less is taken for rounding."""

    bits: float  # for types that have so many for a weight, or more
    kl: float  # mean KL divergence of the logits, nats
    error: float  # of what a layer adds to the hidden states, relative


COSTS = (
    Cost(16.0, kl=0.02, error=0.02),  # F16, BF16, F32
    Cost(8.0, kl=0.1, error=0.1),
    Cost(6.0, kl=0.3, error=0.15),
    Cost(5.0, kl=0.6, error=0.3),
    Cost(4.0, kl=1.5, error=0.42),
    Cost(3.0, kl=2.0, error=0.5),
    Cost(0.0, kl=3.0, error=0.7),
)


@dataclass(frozen=True)
class LayerError:
    """A layer of the file against that of the source, given the same hidden states."""

    number: int
    error: float  # of what it adds, relative, of the median token
    lightest: str  # type of its matrices
    limit: float


@dataclass(frozen=True, eq=False)
class Expected:
    """What the source's weights make of some tokens."""

    ids: tuple[int, ...]
    layers: Sequence[int] | None  # that were run; None: all
    states: tuple[Floats, ...]  # hidden states before each layer, and after the last
    logits: Floats


@dataclass(frozen=True)
class Comparison:
    """A file against its source."""

    n_tokens: int
    n_same: int  # tokens after which both have the same first choice
    kl: float  # mean Kullback-Leibler divergence from the source's distributions, nats
    layers: tuple[LayerError, ...]
    whole: bool  # all layers were run, and the logits are those of the whole model


def check_logits(expected: Expected, file: Source, *, threads: int) -> Finding:
    """The file against what its source gives."""
    try:
        found = compare(expected, file, threads=threads)
    except GGUFError as error:
        return Finding("not run", (f"the file cannot be run: {error}",))
    lightest, cost = lightest_type(file, "")
    text = f"logits agree on {found.n_same} of {found.n_tokens} first choices, KL {found.kl:.2g}"
    if not found.whole:
        worst = max(layer.error for layer in found.layers)
        text = f"head and {len(found.layers)} layers agree to {worst:.1%}, KL {found.kl:.2g}"
    wrong = [layer for layer in found.layers if not layer.error <= layer.limit]
    problems = [
        f"layer {layer.number} of the file is not that of the source's weights: what it adds is "
        f"{layer.error:.0%} off, where {layer.lightest} explains {layer.limit:.0%}"
        for layer in wrong[:1]
    ]
    if len(wrong) > 1:
        problems[0] += f"; and {len(wrong) - 1} more (--check-details shows all)"
    if not found.kl <= cost.kl:
        problems.append(
            f"the file's logits are not those of the source's weights: KL {found.kl:.3g}, where "
            f"{lightest} explains {cost.kl:g}, and {found.n_same} of {found.n_tokens} first "
            "choices are the same"
        )
    details = [
        f"layer {layer.number}: {layer.error:.2%} off, {layer.lightest} explains {layer.limit:.0%}"
        for layer in found.layers
    ]
    details.append(f"logits: KL {found.kl:.4g}, {lightest} explains {cost.kl:g}")
    return Finding(text, tuple(problems), tuple(details))


def run_source(
    source: Source,
    ids: Sequence[int],
    *,
    threads: int,
    layers: Sequence[int] | None = None,
) -> Expected:
    """Run the source's own weights; with `layers` only these, and the head.

    UnsupportedModelError where its architecture has no decoder here.
    """
    n_tokens = len(ids)
    with LayerwiseModel(source, n_tokens=n_tokens, threads=threads, layers=layers) as model:
        states = [model.embed(ids)]
        for index in range(len(model.program.layers)):
            states.append(model.layer(index, states[-1]))
        return Expected(tuple(ids), layers, tuple(states), model.head(states[-1]))


def compare(expected: Expected, file: Source, *, threads: int) -> Comparison:
    """Run the file on the same tokens."""
    ids, layers, states = expected.ids, expected.layers, expected.states
    n_tokens = len(ids)
    numbers = layers if layers is not None else range(len(states) - 1)
    errors = []
    with LayerwiseModel(file, n_tokens=n_tokens, threads=threads, layers=layers) as model:
        own = model.embed(ids)
        for index, number in enumerate(numbers):
            before, after = states[index], states[index + 1]
            error = _off(after - before, model.layer(index, before) - before)
            lightest, cost = lightest_type(file, f"blk.{number}.")
            errors.append(LayerError(number, error, lightest, cost.error))
            if layers is None:
                own = model.layer(index, own)
        found = model.head(own if layers is None else states[-1])
    same = int((expected.logits.argmax(axis=1) == found.argmax(axis=1)).sum())
    kl = _divergence(expected.logits, found)
    return Comparison(n_tokens, same, kl, tuple(errors), layers is None)


def choose_layers(source: Source) -> list[int] | None:
    """All (None), or of a large model the first and the last."""
    n_weights = sum(tensor.n_elements for tensor in source.tensors.values())
    numbers = [name.split(".")[1] for name in source.tensors if name.startswith("blk.")]
    n_layers = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    if n_weights <= WHOLE_WEIGHTS or n_layers <= 2 * ENDS:
        return None
    return [*range(ENDS), *range(n_layers - ENDS, n_layers)]


def lightest_type(file: Source, beginning: str) -> tuple[str, Cost]:
    """The type with the fewest bits a weight, of matrices whose names begin so, and its cost."""
    quants = {
        tensor.quant.name: tensor.quant
        for name, tensor in file.tensors.items()
        if name.startswith(beginning) and len(tensor.shape) > 1
    }
    bits = {name: 8 * quant.block_bytes / quant.block_size for name, quant in quants.items()}
    name, least = min(bits.items(), key=lambda item: item[1], default=("F32", 32.0))
    return name, next(cost for cost in COSTS if least >= cost.bits)


def _off(expected: Floats, found: Floats) -> float:
    """The relative error of the median token: the first is often one that dwarfs all others."""
    norms = np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return float(np.median(np.linalg.norm(found - expected, axis=1) / norms))


def _divergence(expected: Floats, found: Floats) -> float:
    """The mean over tokens; infinite where one's is no number."""
    p, q = _log_chances(expected), _log_chances(found)
    with np.errstate(invalid="ignore"):
        kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    return kl if math.isfinite(kl) else math.inf


def _log_chances(logits: Floats) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        x -= x.max(axis=1, keepdims=True)
        log_chances: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return log_chances
