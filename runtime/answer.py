"""An answer as it comes: tokens to pieces of reasoning and of text, up to a stop string."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from runtime.generation import StopStrings
from runtime.reasoning import Span, Splitter
from runtime.tokenizer import StreamDecoder, Tokenizer
from runtime.turns import Turn, cut_back


@dataclass(frozen=True)
class Piece:
    """The next piece of the answer's text; empty while a character is not complete."""

    text: str


@dataclass(frozen=True)
class Thought:
    """The next piece of the model's reasoning, which has `n_tokens` so far."""

    text: str
    n_tokens: int


@dataclass(frozen=True)
class ThoughtEnd:
    """The reasoning is over: what it has taken."""

    n_tokens: int
    seconds: float


AnswerEvent = Piece | Thought | ThoughtEnd


class AnswerStream:
    """Fills a turn with what its tokens say, and tells it piece by piece."""

    def __init__(
        self,
        turn: Turn,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        splitter: Splitter | None = None,
    ) -> None:
        """Without a `splitter` everything is answer, and white space before it counts.

        Only the answer ends at a string of `stop`, not the reasoning.
        """
        self._turn = turn
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = splitter
        self._stops = StopStrings(stop)
        self._said: list[bytes] = []  # what each token says
        self._n_thoughts = 0
        self._start: float | None = None  # of the reasoning that is going on

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stops.found is not None

    def feed(self, token: int) -> Iterator[AnswerEvent]:
        """What one more token says, which belongs to the turn from now on."""
        text, data = self._decoder.feed(token), self._tokenizer.token_bytes(token)
        if self._splitter is not None:
            if not data and self._splitter.is_mark(mark := self._tokenizer.token_text(token)):
                text, data = text + mark, mark.encode()  # most control tokens say nothing
            if self._splitter.part == "reasoning":
                self._think()
        self._turn.answer_ids.append(token)
        self._said.append(data)
        yield from self._tell(text)

    def finish(self) -> Iterator[AnswerEvent]:
        """What is left, when no more tokens come and no stop string was found."""
        yield from self._tell(self._decoder.finish())
        if self._splitter is not None:
            yield from self._tell_span(self._splitter.finish())
        yield self._answer(self._stops.finish())
        yield from self._end_thoughts()
        self._turn.covered = self._turn.written

    def cut_back(self) -> None:
        """Leave the turn with no more tokens than its text."""
        cut_back(self._turn, self._said)

    def _tell(self, text: str) -> Iterator[AnswerEvent]:
        if self._splitter is None:
            yield self._answer(self._stops.feed(text))
            return
        for span in self._splitter.feed(text):
            if not self.stopped:
                yield from self._tell_span(span)

    def _tell_span(self, span: Span) -> Iterator[AnswerEvent]:
        if span.is_mark:
            yield self._answer(self._stops.finish())
            self._turn.written += span.text
            if span.part == "reasoning":
                self._turn.reasoning += "\n" if self._turn.reasoning else ""
                self._think()
            else:
                yield from self._end_thoughts()
        elif span.part == "reasoning":
            yield self._thought(span.text)
        else:
            yield self._answer(self._stops.feed(span.text))

    def _answer(self, text: str) -> Piece:
        """Append to the answer; an answer to a message is shown without white space before it."""
        at_start = self._splitter is not None and not self._turn.answer.strip()
        self._turn.answer += text
        self._turn.written += text
        return Piece(text.lstrip() if at_start else text)

    def _thought(self, text: str) -> Thought:
        at_start = not self._turn.reasoning.strip()
        self._turn.reasoning += text
        self._turn.written += text
        return Thought(text.lstrip() if at_start else text, self._n_thoughts)

    def _think(self) -> None:
        """Count a token of the reasoning."""
        if self._start is None:
            self._start = perf_counter()
        self._n_thoughts += 1

    def _end_thoughts(self) -> Iterator[ThoughtEnd]:
        """The end of reasoning that was going on; nothing is said of an empty block."""
        if self._start is not None and self._turn.reasoning.strip():
            yield ThoughtEnd(self._n_thoughts, perf_counter() - self._start)
        self._start, self._n_thoughts = None, 0
