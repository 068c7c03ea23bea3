"""The best types for a size: one for each tensor, of the least cost together.

Each tensor has options, each with its bytes and what it costs (how much it is expected to change
the model's answers); one of each is chosen so that the bytes fit and the costs are as small as they
can be together. This is the multiple-choice knapsack problem. Its linear relaxation gives a price
of a byte, and with it a bound on what can still become of a partial choice; what is left after
dropping all partial choices that the bound or a better one rules out is small enough to be searched
whole (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Pure: nothing here
knows a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import UnsupportedQuantError

MOST_STATES = 1 << 18  # partial choices that are kept; beyond it the least promising are dropped

Sizes = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """A type that a tensor can have."""

    type: str
    n_bytes: int
    cost: float  # at least 0


@dataclass(frozen=True)
class _Step:
    """From one option of a tensor on its lower convex hull to the next larger."""

    tensor: int
    option: int  # that it leads to
    n_bytes: int  # more
    gain: float  # of cost

    @property
    def rate(self) -> float:
        return self.gain / self.n_bytes


def least_size(options: Mapping[str, Sequence[Option]]) -> int:
    """The bytes of the smallest choice."""
    return sum(min(option.n_bytes for option in each) for each in options.values())


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for each tensor, of least cost within `budget` bytes; of equals the smallest.

    More bytes never give a larger cost. UnsupportedQuantError if nothing fits.
    """
    least = least_size(options)
    if least > budget:
        raise UnsupportedQuantError(
            f"the smallest types take {least:,} bytes, more than the {budget:,} that there are"
        )
    tensors = [_useful(each) for each in options.values()]
    steps = _steps(tensors)
    price, picked = _relax(tensors, steps, budget)
    picked = _search(tensors, budget, price, picked)
    chosen = zip(options, tensors, picked, strict=True)
    return {name: useful[index] for name, useful, index in chosen}


def _useful(options: Sequence[Option]) -> list[Option]:
    """Those that cost less than every smaller one, the smallest first."""
    useful: list[Option] = []
    for option in sorted(options, key=lambda option: (option.n_bytes, option.cost)):
        if not useful or option.cost < useful[-1].cost:
            useful.append(option)
    return useful


def _steps(tensors: Sequence[Sequence[Option]]) -> list[_Step]:
    """The steps of all hulls, the best first. In one tensor each gains less than the one before."""
    steps: list[_Step] = []
    for tensor, options in enumerate(tensors):
        at = 0
        while at + 1 < len(options):
            here = options[at]
            ahead = [
                _Step(tensor, i, options[i].n_bytes - here.n_bytes, here.cost - options[i].cost)
                for i in range(at + 1, len(options))
            ]
            best = max(ahead, key=lambda step: (step.rate, step.option))
            steps.append(best)
            at = best.option
    return sorted(steps, key=lambda step: (-step.rate, step.tensor, step.option))


def _relax(
    tensors: Sequence[Sequence[Option]], steps: Sequence[_Step], budget: int
) -> tuple[float, list[int]]:
    """The price of a byte where the budget ends, and a choice made of whole steps that fit."""
    picked = [0] * len(tensors)
    left = budget - sum(options[0].n_bytes for options in tensors)
    price = 0.0
    stopped: set[int] = set()
    for step in steps:
        if step.tensor in stopped:
            continue
        if step.n_bytes <= left:
            left -= step.n_bytes
            picked[step.tensor] = step.option
        else:
            price = price or step.rate
            stopped.add(step.tensor)
    return price, picked


def _search(
    tensors: Sequence[Sequence[Option]], budget: int, price: float, picked: list[int]
) -> list[int]:
    """The best choice of all; `picked` is one to begin with.

    States are partial choices of the first tensors, the smallest first, each cheaper than all
    smaller ones. What the rest takes at least is known at `price`.
    """
    smallest = _sums_after([min(option.n_bytes for option in options) for options in tensors])
    bounds = _sums_after(
        [min(option.cost + price * option.n_bytes for option in options) for options in tensors]
    )
    best = sum(options[i].cost for options, i in zip(tensors, picked, strict=True))
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for place, options in enumerate(tensors):
        more = np.array([option.n_bytes for option in options], np.int64)
        cost = np.array([option.cost for option in options])
        all_sizes, all_costs = np.add.outer(sizes, more).ravel(), np.add.outer(costs, cost).ravel()
        bound = all_costs + price * (all_sizes - budget) + bounds[place + 1]
        # A bound is a sum of rounded numbers: what may be as good is kept.
        alive = (all_sizes + smallest[place + 1] <= budget) & (bound <= best * (1 + 1e-12))
        states = np.flatnonzero(alive)
        states = states[np.lexsort((all_costs[states], all_sizes[states]))]
        falling = np.minimum.accumulate(all_costs[states])
        states = states[np.concatenate([[True], falling[1:] < falling[:-1]])[: len(states)]]
        if len(states) > MOST_STATES:
            states = np.sort(states[np.argsort(bound[states], kind="stable")[:MOST_STATES]])
            states = states[np.argsort(all_sizes[states], kind="stable")]
        if not len(states):  # only `picked` is as good
            return picked
        history.append(np.divmod(states, len(options)))
        sizes, costs = all_sizes[states], all_costs[states]
    if costs[-1] > best:
        return picked
    state = len(costs) - 1
    for place in range(len(tensors) - 1, -1, -1):
        parents, chosen = history[place]
        picked[place] = int(chosen[state])
        state = int(parents[state])
    return picked


def _sums_after(numbers: Sequence[float]) -> list[float]:
    """At i the sum of numbers[i:]."""
    sums = [0.0]
    for number in reversed(numbers):
        sums.append(sums[-1] + number)
    return sums[::-1]
