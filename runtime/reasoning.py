"""Reasoning in an answer: the marks that open and close it, found as the text comes.

Most models write `<think>...</think>` or tags like it before their answer, and often their chat
template opens the block for them at the end of the prompt. Such tags count only before the answer
begins: later they are text like any other. Some families speak a dialect of their own, where every
message of an answer has marks; a dialect is known by what stands in the template.

Sources: the templates in llama.cpp's `models/templates`, and its `common/parsers`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["reasoning", "answer"]

MAX_HEADER = 100  # characters between the two ends of a mark such as `<|channel|>final<|message|>`


@dataclass(frozen=True)
class Mark:
    """A piece of text that is not shown; what comes after it is `part`."""

    text: str
    part: Part
    until: str = ""  # where the mark ends, when it has more to it


@dataclass(frozen=True)
class Dialect:
    """The marks of one family. They count anywhere in an answer."""

    sign: str  # what the templates of the family have in them
    marks: tuple[Mark, ...]  # of two that fit at one place the first counts


@dataclass(frozen=True)
class Span:
    """Some of the text of an answer; a mark belongs to the part that it begins."""

    part: Part
    text: str
    is_mark: bool = False


TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<unused94>thought", "<unused95>"),  # MedGemma
)

ENDS = ("START", "END")
DIALECTS = (
    Dialect(  # gpt-oss
        "<|channel|>",
        (
            Mark("<|channel|>analysis", "reasoning", until="<|message|>"),
            Mark("<|channel|>", "answer", until="<|message|>"),
            Mark("<|start|>assistant", "answer"),
            Mark("<|message|>", "answer"),
            Mark("<|end|>", "answer"),
        ),
    ),
    Dialect(  # Command R7B, Command A
        "<|START_THINKING|>",
        (
            Mark("<|START_THINKING|>", "reasoning"),
            Mark("<|END_THINKING|>", "answer"),
            *(Mark(f"<|{end}_{what}|>", "answer") for end in ENDS for what in ("RESPONSE", "TEXT")),
        ),
    ),
    Dialect(  # Granite 3.3
        "<response></response>",
        (
            Mark("<think>", "reasoning"),
            *(Mark(text, "answer") for text in ("</think>", "<response>", "</response>")),
        ),
    ),
    Dialect(  # OpenThinker
        "<|begin_of_thought|>",
        (
            Mark("<|begin_of_thought|>", "reasoning"),
            *(
                Mark(f"<|{text}|>", "answer")
                for text in ("end_of_thought", "begin_of_solution", "end_of_solution")
            ),
        ),
    ),
    Dialect(  # Apriel 1.6
        "[BEGIN FINAL RESPONSE]",
        (
            Mark("Here are my reasoning steps:", "reasoning"),
            Mark("[BEGIN FINAL RESPONSE]", "answer"),
            Mark("[END FINAL RESPONSE]", "answer"),
        ),
    ),
    Dialect(  # Solar Open
        "<|begin|>assistant<|think|>",
        (
            Mark("<|think|>", "reasoning"),
            *(Mark(text, "answer") for text in ("<|content|>", "<|begin|>assistant", "<|end|>")),
        ),
    ),
    Dialect(  # Muse
        "to=self",
        (
            Mark("<|start|>assistant to=self<|message|>", "reasoning"),
            Mark(" to=self<|message|>", "reasoning"),
            Mark("<|start|>assistant to=user<|message|>", "answer"),
            Mark(" to=user<|message|>", "answer"),
            Mark("<|eom|>", "answer"),
        ),
    ),
    Dialect(  # Kimi K3
        "<|open|>",
        (
            Mark("<|open|>think<|sep|>", "reasoning"),
            Mark("<|open|>", "answer", until="<|sep|>"),
            Mark("<|close|>", "answer", until="<|sep|>"),
        ),
    ),
)


class Splitter:
    """Divides the text of one answer into reasoning and answer, wherever its pieces are cut.

    Text that may be the beginning of a mark is held back until that is decided.
    """

    def __init__(self, template: str, prompt: str) -> None:
        """For the answer to `prompt`, as the source `template` has made it.

        The prompt may end with the mark that opens a block of reasoning.
        """
        dialect = next((dialect for dialect in DIALECTS if dialect.sign in template), None)
        self._always = () if dialect is None else dialect.marks
        self._closing: tuple[Mark, ...] = ()  # of the tag that is open
        self._begun = False  # there is some of the answer, and tags mean nothing any more
        self._held = ""
        self.part: Part = "answer"
        end = prompt.rstrip()
        for mark in (*self._always, *_OPENING):
            if mark.part == "reasoning" and end.endswith(mark.text):
                self._pass(mark)
                break

    def is_mark(self, token: str) -> bool:
        """Whether a control token may be part of a mark here; if not, it is no text at all."""
        return any(token in mark.text or token in mark.until for mark in self._marks())

    def feed(self, text: str) -> Iterator[Span]:
        """What is decided after some more text."""
        pending = self._held + text
        while True:
            place, mark, length = self._find(pending)
            if place:
                self._begun |= self.part == "answer" and not pending[:place].isspace()
                yield Span(self.part, pending[:place])
            pending = pending[place:]
            if mark is None:
                break
            self._pass(mark)
            yield Span(self.part, pending[:length], is_mark=True)
            pending = pending[length:]
        self._held = pending

    def finish(self) -> Span:
        """What is still held back, when no more comes."""
        held, self._held = self._held, ""
        return Span(self.part, held)

    def _pass(self, mark: Mark) -> None:
        self.part = mark.part
        closing = _CLOSING.get(mark.text) if mark.part == "reasoning" else None
        self._closing = () if closing is None else (Mark(closing, "answer"),)

    def _marks(self) -> tuple[Mark, ...]:
        """Those that count now."""
        if self.part == "reasoning":
            return self._always + self._closing
        return self._always if self._begun else self._always + _OPENING

    def _find(self, text: str) -> tuple[int, Mark | None, int]:
        """The place, the mark and the length of the first mark in `text`.

        Without a mark, what comes before the place is decided, and the rest may become a mark.
        """
        marks = self._marks()
        for place in range(len(text)):
            if place and self.part == "answer" and not text[place - 1].isspace():
                marks = self._always  # an answer begins here, so that tags are over
            for mark in marks:
                length = _fit(mark, text[place:])
                if length is None:
                    return place, None, 0
                if length:
                    return place, mark, length
        return len(text), None, 0


def _fit(mark: Mark, text: str) -> int | None:
    """The length of `mark` at the beginning of `text`; 0: it is not there; None: it may yet be."""
    if not text.startswith(mark.text):
        return None if mark.text.startswith(text) else 0
    if not mark.until:
        return len(mark.text)
    end = text.find(mark.until, len(mark.text), len(mark.text) + MAX_HEADER)
    if end >= 0:
        return end + len(mark.until)
    return None if len(text) < len(mark.text) + MAX_HEADER else 0


_OPENING = tuple(Mark(opening, "reasoning") for opening, _ in TAGS)
_CLOSING = dict(TAGS)
