"""How much a model's answers change when its tensors are quantised, measured one by one.

A tensor, or the tensors of one kind in a few layers, is quantised while all others keep the
source's weights, and the model is run from there on: the mean Kullback-Leibler divergence of its
next-token distributions from the source's own is what that costs. It is measured for one type. For
small errors it goes with their square, so that for the other types it follows from how large their
errors are in the tensor's products with what it is really multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.plan import kind_of_name
from gguf_tools.recipes import block_number
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.quality.answers import Answers
from runtime.quality.product_errors import Inputs, ProductErrors, product_errors
from runtime.quality.trial_types import TrialTypes

WINDOW = 128  # tokens: texts differ more than places in one, so that many short ones say more
# What measuring may take, about: tokens times weights that they are multiplied with.
WORK = 20e12
LEAST_TOKENS, MOST_TOKENS = 256, 2048
LEAST_GROUPS = 4  # of the layers, however large the model is
ANSWER_BYTES = 384 << 20  # of the source's answers that are kept to be held against
STATE_BYTES = 1 << 30  # of hidden states

Ids = npt.NDArray[np.int64]
Types = Mapping[str, str]  # of tensors, by name


@dataclass(frozen=True)
class Step:
    """So much is done of what was asked for."""

    done: int
    total: int


@dataclass(frozen=True)
class Costs:
    """What each type of each tensor is expected to cost: mean KL divergence, nats."""

    by_name: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Divergences:
    """Mean KL divergence of whole mixtures, in the order asked for."""

    kl: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """Tensors that are quantised together for one measurement."""

    layer: int  # the first of theirs; -1: before the layers, n_layers: behind
    names: tuple[str, ...]


@dataclass(frozen=True)
class Effort:
    """How finely, and on how many windows, a model is measured."""

    together: int  # layers whose tensors of a kind are quantised together
    n_windows: int


class Sensitivity:
    """Measures the tensors of one source; `model` runs `trial`."""

    def __init__(self, model: LayerwiseModel, trial: TrialTypes) -> None:
        self._model, self._trial = model, trial
        self._n_layers = len(model.program.layers)

    def measure(
        self, types: Mapping[str, Sequence[str]], tried: Types, windows: Ids, *, together: int = 1
    ) -> Iterator[Step | Costs]:
        """The costs come at the end.

        `types` are those that each tensor can have, `tried` the ones among them that are measured;
        windows (n, n_ctx).
        """
        groups = make_groups(list(types), self._n_layers, together)
        scored = self._scored(windows)
        yield Step(0, 1 + len(groups))
        states, errors = self._run_source(types, windows, scored)
        answers = [Answers(self._model.head(x[scored])) for x in states[-1]]
        yield Step(1, 1 + len(groups))
        costs: dict[str, dict[str, float]] = {}
        for number, group in enumerate(groups, 2):
            self._trial.types = {name: tried[name] for name in group.names}
            hidden = states[max(group.layer, 0)]
            if group.layer < 0:
                hidden = [self._model.embed(ids.tolist()) for ids in windows]
            for layer in range(max(group.layer, 0), self._n_layers):
                hidden = [self._model.layer(layer, x) for x in hidden]
            kl = [
                answer.divergences(self._model.head(x[scored])).mean()
                for answer, x in zip(answers, hidden, strict=True)
            ]
            self._trial.forget()
            costs |= shared_costs(group, float(np.mean(kl)), tried, errors)
            yield Step(number, 1 + len(groups))
        self._trial.types = {}
        yield Costs(costs)

    def compare(self, mixtures: Sequence[Types], windows: Ids) -> Iterator[Step | Divergences]:
        """Whole mixtures against the source; the divergences come at the end."""
        scored = self._scored(windows)
        runs: list[Types] = [{}, *mixtures]
        total = self._n_layers + 1
        yield Step(0, total)
        hidden = []
        for types in runs:
            self._trial.types = types
            hidden.append([self._model.embed(ids.tolist()) for ids in windows])
        self._trial.forget()
        for layer in range(self._n_layers):
            for i, types in enumerate(runs):
                self._trial.types = types
                hidden[i] = [self._model.layer(layer, x) for x in hidden[i]]
            self._trial.forget()
            yield Step(layer + 1, total)
        sums = np.zeros(len(mixtures))
        answers: list[Answers] = []
        for i, types in enumerate(runs):
            self._trial.types = types
            for window, x in enumerate(hidden[i]):
                logits = self._model.head(x[scored])
                if i:
                    sums[i - 1] += answers[window].divergences(logits).mean()
                else:
                    answers.append(Answers(logits))
            self._trial.forget()
        self._trial.types = {}
        yield Step(total, total)
        yield Divergences(tuple((sums / len(windows)).tolist()))

    def _scored(self, windows: Ids) -> npt.NDArray[np.int64]:
        """The positions whose answers are compared: of the last three quarters of a window."""
        n_windows, n_ctx = windows.shape
        room = ANSWER_BYTES // (8 * self._model.config.n_vocab * n_windows)
        first = n_ctx // 4
        count = max(1, min(n_ctx - first, room))
        return np.linspace(first, n_ctx - 1, count).astype(np.int64)

    def _run_source(
        self, types: Mapping[str, Sequence[str]], windows: Ids, scored: npt.NDArray[np.int64]
    ) -> tuple[list[list[Floats]], dict[str, ProductErrors]]:
        """Hidden states of all windows before each layer and after the last; and the errors."""
        self._trial.types = {}
        states = [[self._model.embed(ids.tolist()) for ids in windows]]
        errors: dict[str, ProductErrors] = {}
        for layer in range(self._n_layers + 1):
            inputs = Inputs(types.keys(), len(windows))
            if layer < self._n_layers:
                run = self._model.layer
                states.append([run(layer, x, inputs.observe) for x in states[-1]])
            else:
                for x in states[-1]:
                    self._model.head(x[scored], inputs.observe)
            for name, sampled in inputs.by_name.items():
                errors[name] = product_errors(self._trial, name, types[name], sampled)
        for name in types.keys() - errors.keys():  # looked up, not multiplied with
            errors[name] = product_errors(self._trial, name, types[name], {})
        return states, errors


def make_groups(names: Sequence[str], n_layers: int, together: int) -> list[Group]:
    """The tensors of a kind in `together` layers each; those outside layers alone."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        layer = block_number(name)
        groups.setdefault((kind_of_name(name), layer // together), []).append(name)
    return [Group(_begin(members, n_layers), tuple(members)) for members in groups.values()]


def choose_effort(
    layer_weights: Sequence[int], head_weights: int, n_kinds: int, *, n_tokens: int, dim: int
) -> Effort:
    """As fine as WORK allows, then as many windows; `n_tokens` are those that there are.

    A measurement of a layer runs all layers from there on, and the head.
    """
    n_layers = len(layer_weights)
    after = np.cumsum(layer_weights[::-1])[::-1]  # weights from each layer on
    coarsest = max(1, -(-n_layers // LEAST_GROUPS))
    most = min(MOST_TOKENS, STATE_BYTES // (4 * dim * (n_layers + 1)), n_tokens)
    for together in range(1, coarsest + 1):
        per_token = float(n_kinds * (after[::together] + head_weights).sum())
        tokens = WORK / max(per_token, 1.0)
        if tokens >= LEAST_TOKENS or together == coarsest:
            break
    n_windows = int(max(min(tokens, most), LEAST_TOKENS) // WINDOW)
    return Effort(together, max(1, n_windows))


def shared_costs(
    group: Group, kl: float, tried: Types, errors: Mapping[str, ProductErrors]
) -> dict[str, dict[str, float]]:
    """What was measured of a group, divided among its tensors and carried over to other types.

    A tensor's share is that of the relative error of its products.
    """
    shares = {
        name: errors[name].by_type[tried[name]] / errors[name].size if errors[name].size else 0.0
        for name in group.names
    }
    whole = sum(shares.values())
    costs = {}
    for name in group.names:
        own, by_type = shares[name], errors[name].by_type
        factor = kl * own / whole / by_type[tried[name]] if own else 0.0
        costs[name] = {type_: factor * error for type_, error in by_type.items()}
    return costs


def _begin(names: Sequence[str], n_layers: int) -> int:
    """The first layer of these; before all layers is the embedding, which may be the head, too."""
    if names[0] == "output.weight":
        return n_layers
    return min(block_number(name) for name in names)
