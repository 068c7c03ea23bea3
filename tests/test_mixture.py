"""The best types for a size, against all choices that there are."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.mixture import Option, choose, least_size

Options = Mapping[str, Sequence[Option]]


def some_options(seed: int, n_tensors: int, n_types: int = 4) -> Options:
    """Larger types cost less, mostly; sizes are those of blocks."""
    rng = np.random.default_rng(seed)
    options = {}
    for i in range(n_tensors):
        rows = int(rng.integers(1, 20))
        weight = float(rng.lognormal(0, 1.5))
        options[f"t{i}"] = [
            Option(
                f"Q{bits}",
                rows * (32 * bits + 16) // 8,
                weight * rng.uniform(0.6, 1.5) * 4.0**-bits,
            )
            for bits in rng.permutation(np.arange(2, 2 + n_types)).tolist()
        ]
    return options


def size_of(chosen: Mapping[str, Option]) -> int:
    return sum(option.n_bytes for option in chosen.values())


def cost_of(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def best_of_all(options: Options, budget: int) -> float:
    return min(
        sum(option.cost for option in each)
        for each in itertools.product(*options.values())
        if sum(option.n_bytes for option in each) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_the_best_of_all_choices(seed: int) -> None:
    options = some_options(seed, 6)
    least = least_size(options)
    most = sum(max(option.n_bytes for option in each) for each in options.values())
    for budget in np.linspace(least, most, 9).astype(int).tolist():
        chosen = choose(options, budget)
        assert list(chosen) == list(options) and size_of(chosen) <= budget
        assert all(chosen[name] in options[name] for name in options)
        assert cost_of(chosen) == pytest.approx(best_of_all(options, budget), rel=1e-9)


def test_table() -> None:
    options = {
        "a": [Option("Q4_0", 18, 1.0), Option("Q8_0", 34, 0.01)],
        "b": [Option("Q4_0", 18, 3.0), Option("Q8_0", 34, 0.03)],
        "c": [Option("Q4_0", 18, 2.0), Option("Q5_0", 22, 3.0)],  # larger and worse
    }
    types = {
        54: ("Q4_0", "Q4_0", "Q4_0"),
        69: ("Q4_0", "Q4_0", "Q4_0"),
        70: ("Q4_0", "Q8_0", "Q4_0"),
        85: ("Q4_0", "Q8_0", "Q4_0"),
        86: ("Q8_0", "Q8_0", "Q4_0"),
        1000: ("Q8_0", "Q8_0", "Q4_0"),
    }
    for budget, expected in types.items():
        assert tuple(option.type for option in choose(options, budget).values()) == expected


def test_more_bytes_never_cost_more() -> None:
    options = some_options(3, 60, 7)
    least = least_size(options)
    costs = [cost_of(choose(options, budget)) for budget in range(least, 3 * least, least // 50)]
    assert costs == sorted(costs, reverse=True) and costs[0] > 5 * costs[-1]


def test_the_same_every_time_and_of_equals_the_smallest() -> None:
    options = {
        f"t{i}": [Option("A", 2, 1.0), Option("B", 4, 0.5), Option("C", 6, 0.0)] for i in range(40)
    }
    first = choose(options, 120)
    assert first == choose(options, 120) and size_of(first) <= 120
    assert cost_of(first) == pytest.approx(30.0)
    same = {"t": [Option("B", 4, 1.0), Option("A", 4, 1.0), Option("C", 8, 1.0)]}
    assert choose(same, 100)["t"].n_bytes == 4


def test_a_model_of_many_tensors() -> None:
    """As large as models come, within a price of one step of the relaxation's bound."""
    options = some_options(5, 900, 9)
    budget = int(1.7 * least_size(options))
    chosen = choose(options, budget)
    assert 0.999 * budget < size_of(chosen) <= budget


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UnsupportedQuantError, match="18 bytes, more than the 17"):
        choose({"a": [Option("Q4_0", 18, 1.0)]}, 17)
