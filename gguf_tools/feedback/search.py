"""How scales and minima are searched.

A group of weights has a smallest, a largest and a mean. Each range tried is a part of the way from
the mean to either end (beyond it, too: what is past the last level is cut off), divided into
steps. Formats without a minimum have one end, the weight of largest magnitude.
"""

from dataclasses import dataclass

import numpy as np

from gguf_tools.quants.levels import Levels
from gguf_tools.quants.quanttype import Floats

N_REFITS = 3  # times that scale and minimum are fitted to the levels that came out
N_MOVES = 1  # rounds of single steps up and down, where scales are multiples of d
FACTORS = (1.0, 1.03, 0.97)  # tried of the d and dmin that make the largest multiple the highest


@dataclass(frozen=True, eq=False)
class Search:
    """What is tried for one format."""

    ranges: Floats  # (n, 3), n even: part of the way down, part of the way up, 1 / steps between
    factors: Floats  # (n,): of d and dmin; empty where scales are numbers


def search_for(levels: Levels) -> Search:
    """Thirty ranges or so, most of which cut a little off.

    Chosen by measuring the loss on three layers of SmolLM2-135M: more change it by less than 1 %.
    """
    low, high = levels.lowest, levels.highest
    ranges: list[tuple[float, float, float]]
    if levels.has_minimum:
        ranges = [(part, part, 1 / high) for part in np.linspace(0.6, 1.05, 12)]
        ranges += [(1, 1, 1 / (high + more)) for more in np.linspace(-0.9, 0.9, 10)]
        ranges += [(part, 1, 1 / high) for part in np.linspace(0.75, 0.95, 4)]
        ranges += [(1, part, 1 / high) for part in np.linspace(0.75, 0.95, 4)]
    elif low == -high:
        ranges = [(0, part, 1 / high) for part in np.linspace(0.8, 1.02, 12)]
    else:  # the lowest level or the highest may meet the largest magnitude
        ranges = [(0, part, 1 / low) for part in np.linspace(0.65, 1.08, 24)]
        ranges += [(0, part, 1 / high) for part in np.linspace(0.8, 1.08, 12)]
    factors = FACTORS if levels.n_groups > 1 else ()
    return Search(np.array(ranges, np.float32), np.array(factors, np.float32))
