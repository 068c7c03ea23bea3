"""Multiple-choice tasks, as of HellaSwag, ARC or PIQA: which ending does the model find likeliest?

Each line of a task file is a JSON object with `context`, `endings` (a list of texts) and `gold`,
the index of the right ending. An ending's score is the sum of ln p of its tokens after the
context; the normalised score is that per byte of the ending (`acc` and `acc_norm` of EleutherAI's
lm-evaluation-harness, lm_eval/api/task.py). Where neither the context ends nor an ending begins
with white space, a space is put between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_tools.errors import GGUFError, printable
from runtime.generation import n_reusable
from runtime.model import Model
from runtime.quality.measures import Estimate, log_probabilities, mean_of
from runtime.tokenizer import Tokenizer

LONGEST_LINE = 1 << 20  # characters


@dataclass(frozen=True)
class Question:
    """What is asked: endings of a context, one of them right."""

    context: str
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Answered:
    """A question was answered."""

    done: int
    total: int


@dataclass(frozen=True)
class Accuracy:
    """The share of questions whose right ending had the largest score."""

    questions: int
    accuracy: Estimate
    normalised: Estimate  # by the scores per byte


def read_questions(path: Path) -> list[Question]:
    """The questions of a task file; GGUFError names a line that is none."""
    questions = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise GGUFError(f"{printable(path)}: expected UTF-8 text") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            questions.append(_question(line, f"{printable(path)}, line {number:,}"))
    if not questions:
        raise GGUFError(f"{printable(path)}: expected a JSON object on each line, found none")
    return questions


def answer(
    model: Model, tokenizer: Tokenizer, questions: Sequence[Question]
) -> Iterator[Answered | Accuracy]:
    """Let the model answer all questions; the accuracy comes at the end."""
    right, right_per_byte = [], []
    for done, question in enumerate(questions, 1):
        scores = [_score(model, tokenizer, question.context, text) for text in question.endings]
        sizes = [max(1, len(ending.encode())) for ending in question.endings]
        right.append(int(np.argmax(scores)) == question.gold)
        right_per_byte.append(int(np.argmax(np.divide(scores, sizes))) == question.gold)
        yield Answered(done, len(questions))
    yield Accuracy(
        len(questions),
        mean_of(np.asarray(right, np.float64)),
        mean_of(np.asarray(right_per_byte, np.float64)),
    )


def _score(model: Model, tokenizer: Tokenizer, context: str, ending: str) -> float:
    """ln of the probability of `ending` after `context`."""
    if context and ending and not context[-1].isspace() and not ending[0].isspace():
        ending = " " + ending
    before, ids = tokenizer.encode(context), tokenizer.encode(context + ending)
    if tokenizer.add_eos and tokenizer.eos_id is not None:
        before, ids = before[:-1], ids[:-1]
    start = max(1, n_common(before, ids))  # the last token of the context may grow into the ending
    if len(ids) <= start:
        return 0.0
    held = min(n_reusable(model.tokens, ids), start - 1)
    model.truncate(held)
    if held < start - 1:
        model.forward(ids[held : start - 1])
    log_p = log_probabilities(model.forward(ids[start - 1 : -1], all_logits=True))
    return float(log_p[np.arange(len(ids) - start), ids[start:]].sum(dtype=np.float64))


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


def _question(line: str, where: str) -> Question:
    if len(line) > LONGEST_LINE:
        raise GGUFError(f"{where}: longer than {LONGEST_LINE:,} characters")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise GGUFError(
            f"{where}: expected a JSON object with context, endings and gold, found "
            f"{printable(line, 40)}"
        )
    context, endings, gold = (value.get(key) for key in ("context", "endings", "gold"))
    if not isinstance(context, str):
        raise GGUFError(f"{where}: `context` must be a text")
    if not isinstance(endings, list) or not all(isinstance(each, str) for each in endings):
        raise GGUFError(f"{where}: `endings` must be a list of texts")
    if len(endings) < 2 or not all(endings):
        raise GGUFError(f"{where}: at least two endings are needed, and none may be empty")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(endings):
        raise GGUFError(
            f"{where}: `gold` must be the index of the right ending, from 0 to {len(endings) - 1}"
        )
    return Question(context, tuple(endings), gold)
