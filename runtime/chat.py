"""Answers to a person: one and done, or a chat with commands between the messages."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gguf_tools.errors import DeviceLostError, GGUFError, printable
from runtime.conversation import AnswerStats, Conversation, Event
from runtime.sampling import Sampler, SamplingOptions
from runtime.session import Session, count
from runtime.templates import EFFORTS
from runtime.terminal import (
    THINK_MODES,
    Interruptible,
    ThinkMode,
    draw_answer,
    make_line_reader,
    remark,
    use_utf8,
    visible,
)

ANSWER_LIMIT = 1024  # tokens, unless told otherwise: small models may repeat themselves for ever
BASE_TURN = 256  # tokens that a model without template writes before it is the user's turn again

SWITCHES = ("on", "off", *EFFORTS)  # of reasoning


@dataclass(frozen=True)
class Command:
    """Something to type instead of a message."""

    name: str
    arguments: str
    help: str


COMMANDS = (
    Command("help", "", "this list"),
    Command("exit", "", "leave; so does Ctrl-D"),
    Command("clear", "", "forget the conversation"),
    Command("regen", "", "write the last answer again"),
    Command("undo", "", "take back the last message and its answer"),
    Command("system", "[TEXT | off]", "show or set the system prompt"),
    Command("think", "[show | hide | fold]", "how reasoning is shown; /think last: the last one"),
    Command("think", "[on | off | low | medium | high]", "whether the model reasons, or how much"),
    Command("set", "[NAME VALUE]", "show or set how tokens are drawn: /set temp 0.5"),
    Command("cpu", "", "go on without GPUs, such as after one was lost"),
    Command("stats", "[on | off]", "figures of the last answer; or show them after each"),
)


def answer_once(
    session: Session, conversation: Conversation, text: str, *, think: ThinkMode, show_stats: bool
) -> None:
    """Answer `text`: the answer alone on standard output, ended by a newline."""
    for note in session.notes:
        remark(f"note: {note}")
    use_utf8(sys.stdout)
    try:
        drawn = draw_answer(conversation.say(text), sys.stdout, lambda: False, think=think)
    except DeviceLostError as error:
        raise DeviceLostError(f"{error}; --gpu-layers 0 runs on the CPU alone") from error
    if not drawn:
        print(flush=True)
        remark(f"note: {no_answer(conversation)}")
    if note := end_note(conversation):
        remark(note)
    if show_stats:
        remark(f"[{stats_line(conversation.stats, session)}]")


class Chat:
    """A conversation at the terminal, until the user leaves."""

    def __init__(
        self, session: Session, conversation: Conversation, *, think: ThinkMode, show_stats: bool
    ) -> None:
        self.session = session
        self.conversation = conversation
        self.think: ThinkMode = think
        self.show_stats = show_stats
        self._handlers: dict[str, Callable[[str], bool]] = {
            "help": self._help,
            "exit": lambda rest: False,
            "quit": lambda rest: False,
            "clear": self._clear,
            "regen": self._regenerate,
            "undo": self._undo,
            "system": self._set_system,
            "think": self._set_think,
            "set": self._set_option,
            "cpu": self._move_to_cpu,
            "stats": self._set_stats,
        }

    def run(self) -> None:
        """Talk until Ctrl-D or /exit."""
        for line in self.session.describe():
            remark(line)
        for note in self.session.notes:
            remark(f"note: {note}")
        remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        read_line = make_line_reader()
        going_on = True
        while going_on:
            try:
                text = read_line()
            except KeyboardInterrupt:
                remark("(Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                break
            n_turns = len(self.conversation.turns)
            try:
                going_on = self._take(text)
            except DeviceLostError as error:
                remark(f"error: {error}")
                whole = len(self.conversation.turns) > n_turns or text.startswith("/")
                kept = "is kept" if whole else "is kept but for this message"
                remark(f"the conversation {kept}: /cpu goes on with it on the CPU")
            except GGUFError as error:
                remark(f"error: {error}")

    def _take(self, text: str) -> bool:
        """Do what was typed; whether to go on."""
        handler, rest = self._find_command(text)
        if handler is not None:
            return handler(rest)
        continues = self.conversation.template is None and bool(self.conversation.turns)
        if text.strip() or continues:
            # A lone surrogate, which some terminals let through, is no text.
            self._answer(self.conversation.say(text.encode("utf-8", "replace").decode()))
        return True

    def _find_command(self, text: str) -> tuple[Callable[[str], bool] | None, str]:
        if not text.startswith("/"):
            return None, ""
        name, _, rest = text[1:].partition(" ")
        if name in self._handlers:
            return self._handlers[name], rest.strip()
        if "\n" in text:  # pasted text that happens to begin with a slash
            return None, ""
        return self._unknown, name

    # The answer.

    def _answer(self, events: Iterator[Event]) -> None:
        n_turns = len(self.conversation.turns)
        with Interruptible() as keys:
            drawn = draw_answer(events, sys.stdout, lambda: keys.pressed, think=self.think)
        stats = self.conversation.stats
        if stats.reason == "interrupted":
            kept = len(self.conversation.turns) > n_turns or drawn
            remark("(stopped)" if kept else "(stopped; the message is taken back)")
        elif not drawn:
            remark(f"({no_answer(self.conversation)})")
        if note := end_note(self.conversation):
            remark(note)
        if self.show_stats:
            remark(f"[{stats_line(stats, self.session)}]")

    def _regenerate(self, rest: str) -> bool:
        if self.conversation.turns:
            self._answer(self.conversation.regenerate())
        else:
            remark("there is no answer yet to write again")
        return True

    # The other commands.

    def _help(self, rest: str) -> bool:
        width = max(len(f"{command.name} {command.arguments}") for command in COMMANDS)
        for command in COMMANDS:
            remark(f"/{f'{command.name} {command.arguments}':{width}}  {command.help}")
        remark("Alt-Enter begins a new line; a pasted text stays one message")
        if self.conversation.template is None:
            remark("this model continues text: an empty line lets it go on")
        return True

    def _unknown(self, name: str) -> bool:
        remark(
            f"unknown command /{printable(name, 40)}; /help lists them "
            "(a message may begin with a slash after a space)"
        )
        return True

    def _clear(self, rest: str) -> bool:
        self.conversation.clear()
        remark("the conversation is forgotten")
        return True

    def _undo(self, rest: str) -> bool:
        message = self.conversation.undo()
        if message is None:
            remark("there is nothing to take back")
        else:
            left = count(len(self.conversation.turns), "turn")
            remark(f"took back: {printable(message, 60)} ({left} left)")
        return True

    def _set_system(self, rest: str) -> bool:
        conversation = self.conversation
        if conversation.template is None:
            remark("plain text is continued here: only a chat template has a system prompt")
        elif rest:
            conversation.system = None if rest == "off" else rest
            remark("no system prompt from now on" if rest == "off" else "the system prompt is set")
        elif conversation.system is None:
            remark("there is no system prompt; /system TEXT sets one")
        else:
            remark(f"system prompt: {visible(conversation.system)}")
        return True

    def _set_think(self, rest: str) -> bool:
        conversation = self.conversation
        if conversation.template is None:
            remark("plain text is continued here: only a chat template has a place for reasoning")
        elif rest in THINK_MODES:
            self.think, _ = parse_think([rest])
            remark(f"reasoning: {rest}")
        elif rest in SWITCHES:
            conversation.thinking = rest
            remark(switch_note(self.session, rest) or f"reasoning is set to {rest}")
        elif rest == "last":
            turns = conversation.turns
            remark((turns[-1].reasoning.strip() if turns else "") or "there was no reasoning")
        elif rest:
            remark(f"/think {', '.join((*THINK_MODES, *SWITCHES))} or last")
        else:
            switch = conversation.thinking or "left to the template"
            remark(f"reasoning: {self.think}; it is {switch}")
        return True

    def _set_option(self, rest: str) -> bool:
        conversation = self.conversation
        name, _, value = rest.replace("=", " ").partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if not name:
            self._show_options()
        elif name not in {*option_types(), "max_tokens"}:
            remark(f"unknown setting {printable(name, 40)}; /set alone lists them")
        elif not value:
            remark(f"/set {name.replace('_', '-')} needs a value")
        else:
            try:
                if name == "max_tokens":
                    conversation.max_tokens = parse_max_tokens(value)
                else:
                    self._change_sampler(name, value)
            except ValueError as error:
                remark(str(error))
            else:
                self._show_options()
        return True

    def _change_sampler(self, name: str, value: str) -> None:
        sampler = self.conversation.sampler
        change: dict[str, Any] = {name: parse_option(name, value)}
        options = replace(sampler.options, **change)
        if name == "seed":
            n_tokens = self.session.tokenizer.n_tokens
            self.conversation.sampler = Sampler(options, n_tokens=n_tokens)
        else:
            sampler.options = options

    def _show_options(self) -> None:
        options = self.conversation.sampler.options
        shown = {field.name: getattr(options, field.name) for field in fields(options)}
        shown["seed"] = "random" if options.seed is None else options.seed
        limit = self.conversation.max_tokens
        shown["max_tokens"] = "no limit" if limit is None else limit
        remark(", ".join(f"{name.replace('_', '-')} {show(v)}" for name, v in shown.items()))

    def _move_to_cpu(self, rest: str) -> bool:
        if self.session.model.devices == ("CPU",):
            remark("the CPU does everything already")
        else:
            self.session.model.move_to_cpu()
            remark("on the CPU from now on; it reads the conversation again")
        return True

    def _set_stats(self, rest: str) -> bool:
        if rest in ("on", "off"):
            self.show_stats = rest == "on"
            remark(f"figures after each answer: {rest}")
        elif rest:
            remark("/stats, /stats on or /stats off")
        else:
            remark(stats_line(self.conversation.stats, self.session))
            remark(count(len(self.conversation.turns), "turn") + " in this conversation")
        return True


def parse_think(words: Sequence[str]) -> tuple[ThinkMode, str | None]:
    """How reasoning is shown, and the word of SWITCHES, if any; the last of each counts."""
    shown: ThinkMode = "show"
    for word in words:
        shown = next((mode for mode in THINK_MODES if mode == word), shown)
    return shown, next((word for word in reversed(words) if word in SWITCHES), None)


def switch_note(session: Session, word: str) -> str:
    """What to say when reasoning is set to a word of SWITCHES, and that does nothing."""
    if session.template is None or word in session.template.traits.switches:
        return ""
    return f"this template does not ask whether reasoning is {word}: it makes no difference"


def no_answer(conversation: Conversation) -> str:
    """Why there is no answer, when there is none."""
    if conversation.turns and conversation.turns[-1].reasoning.strip():
        return "there is only reasoning, and no answer"
    return "the model ended its answer at once"


def stats_line(stats: AnswerStats, session: Session) -> str:
    """The figures of an answer on one line."""
    read = f"read {count(stats.n_read, 'token')}{speed(stats.n_read, stats.read_seconds)}"
    wrote = f"wrote {stats.n_written}{speed(stats.n_steps, stats.write_seconds)}"
    threads = count(session.model.n_threads, "thread")
    devices = " + ".join(session.model.devices)
    return f"{read}, {wrote}; context {stats.n_context} of {stats.n_ctx}; {devices}, {threads}"


def speed(n_tokens: int, seconds: float) -> str:
    """` at 41.2/s`, or nothing when nothing was done."""
    return f" at {_speed(n_tokens / seconds)}/s" if n_tokens and seconds > 0 else ""


def end_note(conversation: Conversation) -> str:
    """What to say about the way an answer ended, if anything."""
    reason = conversation.stats.reason
    if reason == "context full":
        return (
            f"note: the context of {conversation.stats.n_ctx} tokens is full, and the answer stops "
            "here; a larger --ctx gives more room"
        )
    if reason == "token limit" and conversation.max_tokens == ANSWER_LIMIT:
        return (
            f"note: the answer is cut at {ANSWER_LIMIT} tokens; -n sets another limit (in a chat, "
            "/set max-tokens), and -1 is none"
        )
    return ""


def option_types() -> dict[str, type]:
    """The sampling options, and whether each is a whole number."""
    whole = {"top_k", "repeat_last_n", "seed"}
    return {f.name: int if f.name in whole else float for f in fields(SamplingOptions)}


def parse_option(name: str, value: str) -> float | int | None:
    """The value of a sampling option as typed; ValueError in words."""
    if name == "seed" and value in ("-1", "random"):
        return None
    kind = option_types()[name]
    try:
        parsed: float | int = kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        shown = name.replace("_", "-")
        raise ValueError(f"{shown} is {wanted}, not {printable(value, 40)}") from None
    return parsed


def parse_max_tokens(value: str) -> int | None:
    """The limit of an answer as typed: a positive number, or -1 for none."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number == -1:
        return None
    if number < 1:
        raise ValueError(f"max-tokens is at least 1, or -1 for no limit, not {printable(value)}")
    return number


def show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _speed(rate: float) -> str:
    """Tokens per second, to about three figures and never in powers of ten."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
