"""Prefix reuse, limits and stop strings, on a toy model whose next token is always known."""

import numpy as np
import pytest

from gguf_tools.errors import ContextFullError
from runtime.generation import (
    StopStrings,
    generate,
    n_reusable,
    read_prompt,
)
from runtime.sampling import Sampler, SamplingOptions

N_VOCAB = 100


class Counting:
    """Says that after token i comes i + 1; counts what it reads."""

    def __init__(self, n_ctx=50):
        self.n_ctx = n_ctx
        self.tokens = []
        self.n_read = 0
        self.steps = []

    def forward(self, ids):
        assert len(ids) > 0 and len(self.tokens) + len(ids) <= self.n_ctx
        self.tokens.extend(ids)
        self.n_read += len(ids)
        self.steps.append(len(ids))
        logits = np.zeros(N_VOCAB, np.float32)
        logits[(ids[-1] + 1) % N_VOCAB] = 1.0
        return logits

    def truncate(self, n):
        assert n <= len(self.tokens)
        del self.tokens[n:]


def collect(generator):
    """What it yields, and what it returns."""
    result = []
    while True:
        try:
            result.append(next(generator))
        except StopIteration as finished:
            return result, finished.value


def write(model, ids, **limits):
    return collect(generate(model, ids, Sampler(SamplingOptions(temp=0.0)), **limits))


def test_it_writes_until_a_stop_token():
    assert write(Counting(), [5, 6], stop_ids={10}) == ([7, 8, 9], "end of generation")


def test_it_writes_until_the_limit():
    model = Counting()
    assert write(model, [5], max_tokens=3) == ([6, 7, 8], "token limit")
    assert model.tokens == [5, 6, 7]  # the last one needn't be read


def test_a_limit_of_nothing():
    assert write(Counting(), [5], max_tokens=0) == ([], "token limit")


def test_a_full_context_stops_it():
    model = Counting(n_ctx=4)
    assert write(model, [5, 6]) == ([7, 8, 9], "context full")
    assert model.tokens == [5, 6, 7, 8]


def test_a_prompt_may_fill_the_context():
    assert write(Counting(n_ctx=3), [5, 6, 7]) == ([8], "context full")


def test_a_prompt_may_not_exceed_the_context():
    model = Counting(n_ctx=3)
    model.forward([1, 2])
    with pytest.raises(ContextFullError, match="4 tokens and the context holds 3"):
        write(model, [5, 6, 7, 8])
    assert model.tokens == [1, 2]


def test_an_empty_prompt_is_a_wrong_call():
    with pytest.raises(ValueError, match="empty prompt"):
        write(Counting(), [])


@pytest.mark.parametrize(
    "held, ids, n",
    [
        ([], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 3], 2),  # the last is read again, for its logits
        ([1, 2, 3, 4], [1, 2], 1),
        ([1, 9, 3], [1, 2, 3], 1),
        ([1], [1], 0),
    ],
)
def test_reuse(held, ids, n):
    assert n_reusable(held, ids) == n


def test_only_new_tokens_are_read():
    model = Counting()
    answer, _ = write(model, [1, 2, 3], max_tokens=4)
    assert model.n_read == 3 + 3
    model.n_read = 0
    write(model, [1, 2, 3, *answer, 50, 51], max_tokens=1)
    assert model.n_read == 3  # the last of the answer, and two new ones
    assert model.tokens == [1, 2, 3, *answer, 50, 51]


def test_a_reused_prefix_gives_the_same_answer():
    model = Counting()
    write(model, [1, 2, 3, 4, 5], max_tokens=5)
    assert write(model, [1, 2, 3], max_tokens=5) == write(Counting(), [1, 2, 3], max_tokens=5)


def test_reading_goes_in_steps_and_reports():
    model = Counting()
    reported, logits = collect(read_prompt(model, list(range(10)), step=4))
    assert reported == [0, 4, 8]
    assert model.steps == [4, 4, 2]
    assert int(np.argmax(logits)) == 10


def test_reading_can_be_given_up():
    model = Counting()
    reader = read_prompt(model, list(range(10)), step=4)
    assert [next(reader), next(reader)] == [0, 4]
    reader.close()
    assert model.tokens == [0, 1, 2, 3]


def feed(strings, pieces):
    stops = StopStrings(strings)
    shown = [stops.feed(piece) for piece in pieces]
    return shown, stops.finish(), stops.found


def test_stop_strings_are_found_across_pieces():
    shown, rest, found = feed(["<end>"], ["one <", "en", "d> two"])
    assert shown == ["one ", "", ""] and rest == "" and found == "<end>"


def test_text_is_held_back_no_longer_than_needed():
    shown, rest, found = feed(["<end>"], ["a<e", "nough", "<"])
    assert shown == ["a", "<enough", ""] and rest == "<" and found is None


def test_the_first_of_several_stop_strings_counts():
    shown, _, found = feed(["three", "two", "twofold"], ["one twofold three"])
    assert shown == ["one "] and found == "twofold"


def test_overlapping_beginnings():
    shown, rest, found = feed(["aab"], ["aa", "a", "b", "z"])
    assert "".join(shown) + rest == "a" and found == "aab"


def test_nothing_comes_after_a_stop_string():
    stops = StopStrings(["x"])
    assert stops.feed("axb") == "a" and stops.feed("more") == "" and stops.finish() == ""


def test_no_stop_strings():
    assert feed([], ["a", "b"]) == (["a", "b"], "", None)


def test_a_stop_string_has_text():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
