"""Each sampler on four tokens, then the chain, then scores no model should give."""

from collections import Counter

import numpy as np
import pytest

from gguf_tools.errors import GGUFError
from runtime.sampling import (
    Sampler,
    SamplingOptions,
    draw,
    likeliest,
    min_p,
    penalise_repeats,
    temperature,
    top_k,
    top_p,
    usable,
)

NO = -np.inf
HALF_QUARTER_EIGHTHS = np.log(np.array([0.25, 0.125, 0.5, 0.125]))  # probabilities, shuffled


def test_top_k_keeps_the_largest():
    assert top_k(np.array([1.0, 4.0, 2.0, 3.0]), 2).tolist() == [NO, 4.0, NO, 3.0]


@pytest.mark.parametrize("k", [0, 4, 5])
def test_top_k_keeps_all(k):
    logits = np.array([1.0, 4.0, 2.0, 3.0])
    assert top_k(logits, k).tolist() == logits.tolist()


def test_top_k_keeps_the_first_of_equals():
    assert top_k(np.array([2.0, 1.0, 2.0, 2.0]), 2).tolist() == [2.0, NO, 2.0, NO]


def test_top_p_keeps_the_likeliest_that_reach_it():
    for p, kept in [
        (0.4, {2}),
        (0.6, {2, 0}),
        (0.75, {2, 0}),
        (0.8, {2, 0, 1}),
        (1.0, {0, 1, 2, 3}),
    ]:
        result = top_p(HALF_QUARTER_EIGHTHS, p)
        assert set(np.flatnonzero(result > NO)) == kept, p


def test_top_p_keeps_one_token_at_least():
    assert np.flatnonzero(top_p(HALF_QUARTER_EIGHTHS, 0.0) > NO).tolist() == [2]


def test_top_p_of_a_flat_vocabulary():
    kept = top_p(np.zeros(5000), 0.9) > NO
    assert np.flatnonzero(kept).tolist() == list(range(4500))


def test_min_p_compares_with_the_likeliest():
    assert np.flatnonzero(min_p(HALF_QUARTER_EIGHTHS, 0.3) > NO).tolist() == [0, 2]
    assert np.flatnonzero(min_p(HALF_QUARTER_EIGHTHS, 1.0) > NO).tolist() == [2]
    assert min_p(HALF_QUARTER_EIGHTHS, 0.0) is HALF_QUARTER_EIGHTHS


def test_temperature_divides_differences():
    result = temperature(np.array([1.0, 2.0, NO, 4.0]), 0.5)
    assert result.tolist() == [-6.0, -4.0, NO, 0.0]


def test_the_smallest_temperature_leaves_the_best():
    result = temperature(np.array([1.0, 2.0]), 5e-324)
    assert result.tolist() == [NO, 0.0]


def test_repeat_penalty_divides_above_zero_and_multiplies_below():
    logits = np.array([2.0, -2.0, 0.0, 4.0], np.float32)
    result = penalise_repeats(logits, [0, 1, 2, 0], penalty=2.0)
    assert result.tolist() == [1.0, -4.0, 0.0, 4.0]
    assert logits.tolist() == [2.0, -2.0, 0.0, 4.0]  # the argument is as it was


def test_repeat_penalty_takes_any_number():
    logits = np.array([3e38, -3e38, NO, 1.0], np.float32)
    result = penalise_repeats(logits, [0, 1, 2, 99, -5], penalty=1e-3)
    assert np.isfinite(result[:2]).all() and result[2] == NO and result[3] == 1.0


def test_repeat_window():
    logits = np.array([1.0, 0.9, 0.0, 0.0], np.float32)
    greedy = {"temp": 0.0, "repeat_penalty": 2.0}
    inside = Sampler(SamplingOptions(**greedy, repeat_last_n=2))
    assert inside.pick(logits, [3, 0, 3]) == 1
    assert inside.pick(logits, [0, 3, 3]) == 0  # out of the window
    assert Sampler(SamplingOptions(**greedy, repeat_last_n=-1)).pick(logits, [0, 3, 3]) == 1
    assert Sampler(SamplingOptions(**greedy, repeat_last_n=0)).pick(logits, [0, 0, 0]) == 0


def test_likeliest_is_in_order():
    assert likeliest(np.array([1.0, 4.0, 4.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert likeliest(np.array([1.0, 4.0, 4.0, 3.0]), 4).tolist() == [1, 2, 3, 0]


def test_greedy_takes_the_first_maximum():
    sampler = Sampler(SamplingOptions(temp=0.0))
    assert sampler.pick(np.array([0.0, 7.0, 7.0, 1.0], np.float32), []) == 1


def test_draw_follows_the_probabilities():
    random = np.random.default_rng(1)
    drawn = Counter(draw(HALF_QUARTER_EIGHTHS, random) for _ in range(4000))
    for token, probability in enumerate(np.exp(HALF_QUARTER_EIGHTHS)):
        assert drawn[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_the_chain_draws_only_what_every_sampler_keeps():
    options = SamplingOptions(temp=2.0, top_k=3, top_p=0.99, min_p=0.3, seed=5)
    sampler = Sampler(options)
    drawn = {sampler.pick(HALF_QUARTER_EIGHTHS.astype(np.float32), []) for _ in range(200)}
    assert drawn == {0, 2}


def test_a_seed_repeats_and_none_does_not():
    logits = np.zeros(1000, np.float32)
    options = SamplingOptions(top_k=0, top_p=1.0, min_p=0.0, seed=7)

    def draws(sampler):
        return [sampler.pick(logits, []) for _ in range(20)]

    assert draws(Sampler(options)) == draws(Sampler(options))
    free = SamplingOptions(top_k=0, top_p=1.0, min_p=0.0)
    assert draws(Sampler(free)) != draws(Sampler(free))


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_broken_scores_never_win(temp):
    sampler = Sampler(SamplingOptions(temp=temp, top_k=0, top_p=1.0, min_p=0.0, seed=3))
    logits = np.array([np.nan, NO, 1.0, np.nan], np.float32)
    assert {sampler.pick(logits, []) for _ in range(50)} == {2}
    assert np.isnan(logits[0])  # the argument is as it was


@pytest.mark.parametrize("temp", [0.0, 1e-30, 0.8, 1e30])
def test_infinity_is_the_largest_score(temp):
    sampler = Sampler(SamplingOptions(temp=temp, top_k=0, top_p=0.5, seed=3))
    assert sampler.pick(np.array([0.0, np.inf, 1.0, NO], np.float32), []) in (0, 1, 2)
    assert int(np.argmax(usable(np.array([0.0, np.inf, 1.0], np.float32)))) == 1


@pytest.mark.parametrize("value", [np.nan, NO])
def test_no_usable_score_is_an_error(value):
    with pytest.raises(GGUFError, match="no token a usable score"):
        Sampler(SamplingOptions()).pick(np.full(4, value, np.float32), [])


def test_padding_is_never_drawn():
    sampler = Sampler(SamplingOptions(temp=0.0), n_tokens=3)
    assert sampler.pick(np.array([0.0, 1.0, 0.0, 9.0], np.float32), []) == 1


def test_the_file_overrides_the_defaults():
    metadata = {
        "general.sampling.temp": 0.25,
        "general.sampling.top_k": 7,
        "general.sampling.top_p": 0.5,
        "general.sampling.min_p": 0.125,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.penalty_last_n": 9,
        "general.name": "x",
    }
    options, notes = SamplingOptions().with_metadata(metadata)
    assert options == SamplingOptions(0.25, 7, 0.5, 0.125, 1.5, 9)
    assert notes == []


def test_unusable_values_of_the_file_are_named_and_ignored():
    metadata = {
        "general.sampling.temp": float("nan"),
        "general.sampling.top_k": -1,
        "general.sampling.top_p": 1.5,
        "general.sampling.min_p": "\x1b[2J",
        "general.sampling.penalty_repeat": np.zeros(3),
    }
    options, notes = SamplingOptions().with_metadata(metadata)
    assert options == SamplingOptions(top_k=0)
    assert len(notes) == 4
    assert "general.sampling.top_p" in notes[1] and "from 0 to 1" in notes[1]
    assert "\x1b" not in "".join(notes)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temp", -0.1),
        ("temp", float("inf")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("seed", -1),
        ("seed", True),
        ("temp", "0.5"),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        SamplingOptions(**{name: value})
