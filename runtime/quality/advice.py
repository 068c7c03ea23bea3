"""Which file of a family to take, in words, from what was measured.

The limits are on the mean KL divergence from the reference, in nats: about what is lost in ln of
the probability of a token. A file is below a limit when it is with LEEWAY of its errors added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gguf_tools.describe import short_size
from gguf_tools.errors import printable
from runtime.quality.table import CLIFF_FACTOR, Result, cliffs, share, with_error

HARDLY = 0.01  # mean KL: hardly told from the reference
LITTLE = 0.1  # mean KL: little is lost
LEEWAY = 2.0  # errors

FILE, TAKE, CLIFF = "file", "take", "cliff"  # marks of files


@dataclass(frozen=True)
class Advice:
    """What to take, and why; `take` is one of several candidates."""

    lead: str
    take: Result | None
    sentences: tuple[str, ...]
    beyond: frozenset[str]  # names of files beyond a cliff

    def mark(self, result: Result) -> str:
        """What a candidate is marked as."""
        if result is self.take:
            return TAKE
        return CLIFF if result.name in self.beyond else FILE


def advise(candidates: Sequence[Result], reference: Result | None) -> Advice:
    """What the figures of `candidates` say."""
    more = _by_accuracy(candidates)
    if reference is not None and any(result.distance for result in candidates):
        found = _by_distance(candidates, _name(reference))
    elif any(result.evaluation for result in candidates):
        found = _by_perplexity(candidates)
    else:
        return more
    return Advice(found.lead, found.take, found.sentences + more.sentences, found.beyond)


def dominated(candidates: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    """Files that another, no larger one is clearly nearer to the reference than, with that one."""
    for result in candidates:
        better = [
            other
            for other in candidates
            if other.file_size <= result.file_size and _clearly_nearer(other, result)
        ]
        if better:
            yield result, min(better, key=_kl)


def _by_distance(candidates: Sequence[Result], reference: str) -> Advice:
    beyond = frozenset(cliffs(candidates))
    sound = [result for result in candidates if result.name not in beyond]
    little = [result for result in sound if _is_below(result, LITTLE)]
    near = [result for result in sound if _is_below(result, HARDLY)]
    take = min(little or candidates, key=_size if little else _kl)
    figures = _figures(take, reference)
    hardly = f"hardly told from {reference}"
    limit = f"a mean KL divergence of at most {LITTLE:g}, twice its error included"
    is_one = len(candidates) == 1
    if take in near:
        lead = f"{_name(take)} is {hardly}" if is_one else f"Take {_sized(take)}"
        why = "Its" if is_one else f"It is the smallest of these files, and {hardly}: its"
    elif little:
        lead = f"{_name(take)} loses little" if is_one else f"Take {_sized(take)}"
        why = (
            "That is" if is_one else "It is the smallest of these files that loses little, which is"
        )
        why += f" {limit}: its"
    else:
        lead = "None of these files loses little"
        lead = f"{_name(take)} loses more than a little" if is_one else lead
        why = f"Little would be {limit}. " + ("Its" if is_one else f"Nearest is {_name(take)}: its")
    sentences = [f"{why} {figures}."]
    if near and take not in near:
        best = min(near, key=_size)
        sentences.append(
            f"Where there is room for {_sized(best)}: it is {hardly}; its "
            f"{_figures(best, reference)}."
        )
    if beyond:
        names = _list([_name(result) for result in candidates if result.name in beyond])
        sentences.append(
            f"Beyond a cliff: {names}. The divergence grew more than {CLIFF_FACTOR:g} times for "
            "one bit per weight less than the next larger file has; 4 times is usual."
        )
    for worse, better in dominated(candidates):
        sentences.append(
            f"Nothing speaks for {_name(worse)}: {_name(better)} is no larger, and nearer to "
            f"{reference}."
        )
    return Advice(lead, take if little and not is_one else None, tuple(sentences), beyond)


def _by_perplexity(candidates: Sequence[Result]) -> Advice:
    known = [(each, each.evaluation.perplexity) for each in candidates if each.evaluation]
    best, least = min(known, key=lambda pair: pair[1].value)
    if len(known) == 1:
        lead = f"Perplexity {with_error(least, 3)}"
        return Advice(
            lead, None, ("What quantising cost, only a --reference can show.",), frozenset()
        )
    within = [each for each, found in known if found.value <= least.value + least.error]
    smallest = min(within, key=_size)
    sentences = [f"{_name(best)} has the lowest perplexity, {with_error(least, 3)}."]
    if smallest is not best:
        sentences.append(f"{_name(smallest)} is the smallest file within that error.")
    sentences.append(
        "This is a weak judgement: a --reference, compared token by token, tells files apart that "
        "perplexity cannot."
    )
    return Advice(
        f"By perplexity alone: {_sized(smallest)}", smallest, tuple(sentences), frozenset()
    )


def _by_accuracy(candidates: Sequence[Result]) -> Advice:
    known = [(each, each.accuracy) for each in candidates if each.accuracy]
    if not known:
        return Advice("", None, (), frozenset())
    best, most = max(known, key=lambda pair: (pair[1].accuracy.value, -pair[0].file_size))
    asked = f"{most.questions:,} questions" if most.questions > 1 else "the one question"
    if len(known) == 1:
        sentence = f"{_name(best)} answers {share(most.accuracy, 1)} of {asked} correctly."
        return Advice("In short", None, (sentence,), frozenset())
    least = most.accuracy.value - most.accuracy.error
    smallest = min((each for each, found in known if found.accuracy.value >= least), key=_size)
    sentence = f"Of {asked} {_name(best)} answers most correctly, {share(most.accuracy, 1)}"
    if smallest is not best:
        sentence += f"; {_name(smallest)} is the smallest file within that error"
    lead = f"By these questions: {_sized(smallest)}"
    return Advice(lead, smallest, (f"{sentence}.",), frozenset())


def _figures(result: Result, reference: str) -> str:
    apart = result.distance
    assert apart is not None
    return (
        f"mean KL divergence is {with_error(apart.kl, 4)}, its perplexity "
        f"{with_error(apart.perplexity_ratio, 3)} times that of {reference}, and both find the "
        f"same token likeliest in {share(apart.same_top, 1)} of all places"
    )


def _is_below(result: Result, limit: float) -> bool:
    apart = result.distance
    return apart is not None and apart.kl.value + LEEWAY * apart.kl.error <= limit


def _clearly_nearer(one: Result, other: Result) -> bool:
    a, b = one.distance, other.distance
    if a is None or b is None:
        return False
    return a.kl.value + LEEWAY * math.hypot(a.kl.error, b.kl.error) < b.kl.value


def _kl(result: Result) -> float:
    return math.inf if result.distance is None else result.distance.kl.value


def _size(result: Result) -> float:
    return result.file_size


def _sized(result: Result) -> str:
    return f"{_name(result)} ({short_size(result.file_size)})"


def _name(result: Result) -> str:
    return printable(result.name, 60)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
