"""The model's side of a dialogue: which text it has read, what is new, and what an answer is.

A `Conversation` holds turns and keeps the model's cache in step with them. With a chat template
a turn is a message and its answer; without one the text simply goes on, turn by turn. Answering
yields events; a caller who asks for no more of them has interrupted the answer, and what was
written until then stays.

Only new tokens are read. The template is rendered again for each turn, but where the rendered
text begins with what was read and written before, those tokens are kept as they are and just the
rest is encoded. When that fails, as it must when the system prompt changes or a template rewrites
earlier answers, a notice says how many tokens were read again and why.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf_tools.errors import ContextFullError, DeviceLostError, GGUFError, TemplateError
from runtime.answer import AnswerEvent, AnswerStream
from runtime.generation import LanguageModel, StopReason, n_reusable, read_prompt, write
from runtime.reasoning import Splitter
from runtime.sampling import Sampler
from runtime.templates import thinking_variables
from runtime.tokenizer import Tokenizer, encode_chat
from runtime.turns import Turn, continuation_ids, held_part, joined

ContextPolicy = Literal["stop", "drop-oldest"]
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # as templates call it

EndReason = StopReason | Literal["stop string", "interrupted"]


class Template(Protocol):
    """What a conversation needs of a template; `runtime.templates.ChatTemplate` is one."""

    @property
    def source(self) -> str: ...

    @property
    def takes_system(self) -> bool: ...

    @property
    def takes_empty(self) -> bool: ...

    def render(
        self, messages: list[dict[str, str]], *, variables: Mapping[str, Any] | None = None
    ) -> str: ...


@dataclass(frozen=True)
class Progress:
    """Reading goes on: `done` of `total` new tokens are read."""

    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in words."""

    text: str


Event = Progress | Notice | AnswerEvent


@dataclass
class AnswerStats:
    """How the last answer went."""

    n_read: int = 0
    read_seconds: float = 0.0
    n_written: int = 0
    n_steps: int = 0  # tokens computed one by one: those written, less the first
    write_seconds: float = 0.0
    n_context: int = 0  # tokens in the cache
    n_ctx: int = 0
    reason: EndReason = "interrupted"


class Conversation:
    """A dialogue with one model."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        template: Template | None = None,
        system: str | None = None,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
        policy: ContextPolicy = "drop-oldest",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.template = template
        self.stop = tuple(stop)
        self.max_tokens = max_tokens
        self.policy = policy
        self.turns: list[Turn] = []
        self.stats = AnswerStats(n_ctx=model.n_ctx)
        self._system = system
        self._thinking: str | None = None
        self._changed = ""  # why earlier turns may have to be read again
        self._told: set[str] = set()  # notices that come up with every turn and are given once

    @property
    def system(self) -> str | None:
        """The system prompt; only a chat template has a place for it."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        self._changed = "the system prompt changed"

    @property
    def thinking(self) -> str | None:
        """Whether the model is to reason before it answers: on, off, or how much: low to high.

        None leaves that to the template.
        """
        return self._thinking

    @thinking.setter
    def thinking(self, word: str | None) -> None:
        self._thinking = word
        self._changed = f"reasoning was set to {word}"

    def clear(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self._changed = ""

    def undo(self) -> str | None:
        """Take back the last message and its answer; gives the message."""
        return self.turns.pop().user if self.turns else None

    def say(self, text: str) -> Iterator[Event]:
        """Answer `text`. ContextFullError, with nothing changed, when there is no room for it."""
        yield from self._prepare(text)
        yield from self._answer()

    def regenerate(self) -> Iterator[Event]:
        """Answer the last message again. ValueError when there is none."""
        if not self.turns:
            raise ValueError("there is no answer yet to write again")
        last = self.turns.pop()
        try:
            yield from self._prepare(last.user)
        except BaseException:
            self.turns.append(last)
            raise
        new = self.turns[-1]
        try:
            yield from self._answer()
        except DeviceLostError:
            if not any(turn is new for turn in self.turns):  # no word of it was written
                self.turns.append(last)
            raise

    # Text and tokens.

    def _prepare(self, user: str) -> Iterator[Event]:
        """Append a turn for `user`, after dropping old turns when the policy says so."""
        self.stats = AnswerStats(n_ctx=self.model.n_ctx)
        turns = list(self.turns)
        text = yield from self._render(turns, user)
        ids, n_held = self._encode(text)
        n_dropped = 0
        while self.policy == "drop-oldest" and turns and len(ids) > self._limit():
            n_dropped += 1
            del turns[0]
            text = yield from self._render(turns, user)
            ids = self._encode_whole(text)
        if not ids:
            raise GGUFError(
                "the text has no token in this model's vocabulary: write something else"
            )
        if len(ids) > self.model.n_ctx:
            raise ContextFullError(self._too_long(len(ids)))
        if n_dropped:
            yield self._dropped(n_dropped, turns)
            self._changed = "the oldest turns were dropped"
        kept = n_reusable(self.model.tokens, ids)
        if self.turns and n_held > kept + 1:
            yield from self._read_again(len(ids) - kept, len(ids), text)
        self._changed = ""
        self.turns = [*turns, Turn(user, text, ids)]

    def _render(self, turns: Sequence[Turn], user: str) -> Generator[Event, None, str]:
        """All text up to where the answer to `user` begins."""
        if self.template is None:
            text = ""
            for turn in turns:
                text = joined(text, turn.user) + turn.answer
            return joined(text, user)
        if self._system is not None and not self.template.takes_system:
            yield from self._tell_once(
                "this template takes no system prompt: it stands before the first message"
            )
        if not self.template.takes_empty and any(not turn.answer.strip() for turn in turns):
            yield from self._tell_once(
                "this template takes no empty answer: a turn without one is left out"
            )
            turns = [turn for turn in turns if turn.answer.strip()]
        variables = {} if self._thinking is None else thinking_variables(self._thinking)
        text = self.template.render(self._messages(turns, user), variables=variables)
        if not text:
            raise TemplateError("the chat template renders nothing of this conversation")
        return text

    def _messages(self, turns: Sequence[Turn], user: str) -> list[dict[str, str]]:
        """The dialogue as templates take it; a control token that somebody typed stays text."""
        guarded = self.tokenizer.guarded
        messages: list[dict[str, str]] = []
        for turn in turns:
            messages.append({"role": "user", "content": guarded(turn.user)})
            answer = {"role": "assistant", "content": guarded(turn.answer.strip())}
            if reasoning := guarded(turn.reasoning.strip()):
                answer |= dict.fromkeys(REASONING_NAMES, reasoning)
            messages.append(answer)
        messages.append({"role": "user", "content": guarded(user)})
        if self._system is not None:
            system = guarded(self._system)
            if self.template is not None and not self.template.takes_system:
                messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
            else:
                messages.insert(0, {"role": "system", "content": system})
        return messages

    def _encode(self, text: str) -> tuple[list[int], int]:
        """The ids of `text`, and how many of them the earlier turns already were."""
        if not self.turns:
            return self._encode_whole(text), 0
        last = self.turns[-1]
        n_held = min(len(last.prompt_ids) + len(last.answer_ids), len(self.model.tokens))
        held, rest = held_part(text, last, self.tokenizer)
        added = continuation_ids(self.tokenizer, rest) if held else None
        return (self._encode_whole(text) if added is None else held + added), n_held

    def _encode_whole(self, text: str) -> list[int]:
        return encode_chat(self.tokenizer, text)

    # What is said of it.

    def _read_again(self, n: int, total: int, text: str) -> Iterator[Notice]:
        reasoning = self.tokenizer.guarded(self.turns[-1].reasoning.strip())
        said = f"re-read {n} of {total} tokens because "
        if self._changed:
            yield Notice(said + self._changed)
        elif reasoning not in text:
            why = "the template leaves earlier reasoning out, here and in later turns"
            yield from self._tell_once(why, before=said)
        else:
            why = "the template does not repeat the earlier turns as they were"
            yield from self._tell_once(why, before=said)

    def _tell_once(self, text: str, *, before: str = "") -> Iterator[Notice]:
        if text not in self._told:
            self._told.add(text)
            yield Notice(before + text)

    # Room in the context.

    def _limit(self) -> int:
        """The longest prompt that leaves room for an answer."""
        room = self.model.n_ctx // 4
        if self.max_tokens is not None:
            room = min(room, self.max_tokens)
        return self.model.n_ctx - room

    def _make_room(self) -> Generator[Event, None, bool]:
        """Drop old turns in the middle of an answer; whether that freed anything."""
        current, turns = self.turns[-1], self.turns[:-1]
        if self.policy == "stop" or not turns:
            return False
        text, ids, n_dropped = current.prompt_text, current.prompt_ids, 0
        while turns and len(ids) + len(current.answer_ids) > self._limit():
            n_dropped += 1
            del turns[0]
            text = yield from self._render(turns, current.user)
            ids = self._encode_whole(text)
        if n_dropped == 0 or len(ids) + len(current.answer_ids) >= self.model.n_ctx:
            return False
        current.prompt_text, current.prompt_ids = text, ids
        self.turns = [*turns, current]
        yield self._dropped(n_dropped, turns)
        return True

    def _dropped(self, n_dropped: int, kept: Sequence[Turn]) -> Notice:
        what = "turn is" if n_dropped == 1 else f"{n_dropped} turns are"
        rest = f"{len(kept)} earlier ones remain" if kept else "none before this one remains"
        return Notice(
            f"the context of {self.model.n_ctx} tokens is full: the oldest {what} dropped, {rest}"
        )

    def _too_long(self, n_ids: int) -> str:
        if not self.turns or self.policy == "drop-oldest":
            return (
                f"the prompt has {n_ids} tokens and the context holds {self.model.n_ctx}: "
                "shorten it, or start with a larger --ctx"
            )
        return (
            f"the conversation would have {n_ids} tokens and the context holds "
            f"{self.model.n_ctx}: /undo or /clear makes room, or start with a larger --ctx or "
            "--context-policy drop-oldest"
        )

    # The answer.

    def _answer(self) -> Iterator[Event]:
        """Write the answer of the last turn."""
        turn = self.turns[-1]
        stats = self.stats
        splitter = None
        if self.template is not None:
            splitter = Splitter(self.template.source, turn.prompt_text)
        stream = AnswerStream(turn, self.tokenizer, stop=self.stop, splitter=splitter)
        try:
            while True:
                logits = yield from self._read(turn.prompt_ids + turn.answer_ids)
                reason = yield from self._write(turn, logits, stream)
                if reason != "context full" or not (yield from self._make_room()):
                    break
            if not stream.stopped:
                yield from stream.finish()
            stats.reason = reason
        finally:
            if stats.reason == "interrupted" or stream.stopped:
                stream.cut_back()
            if stats.reason == "interrupted" and not turn.written:
                self.turns.remove(turn)
            stats.n_context = len(self.model.tokens)

    def _read(self, ids: Sequence[int]) -> Generator[Event, None, NDArray[np.float32]]:
        reader = read_prompt(self.model, ids)
        total = len(ids) - n_reusable(self.model.tokens, ids)
        before = self.stats.n_read
        while True:
            start = perf_counter()
            try:
                done = next(reader)
            except StopIteration as finished:
                self.stats.n_read = before + total
                logits: NDArray[np.float32] = finished.value
                return logits
            finally:
                self.stats.read_seconds += perf_counter() - start
            self.stats.n_read = before + done
            yield Progress(done, total)

    def _write(
        self,
        turn: Turn,
        logits: NDArray[np.float32],
        stream: AnswerStream,
    ) -> Generator[Event, None, EndReason]:
        stats = self.stats
        left = None if self.max_tokens is None else self.max_tokens - len(turn.answer_ids)
        writer = write(
            self.model, logits, self.sampler, stop_ids=self.tokenizer.eog_ids, max_tokens=left
        )
        n_held = len(self.model.tokens)
        n_steps = stats.n_steps
        while True:
            start = perf_counter()
            try:
                token = next(writer)
            except StopIteration as finished:
                reason: StopReason = finished.value
                return reason
            finally:
                stats.write_seconds += perf_counter() - start
                stats.n_steps = n_steps + len(self.model.tokens) - n_held
            stats.n_written += 1
            yield from stream.feed(token)
            if stream.stopped:
                return "stop string"
