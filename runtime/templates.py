"""Chat templates: a conversation as the text that a model was trained to see.

A template comes with the file and is a program. jinja2's sandbox keeps it from reaching anything,
but not from taking all memory (`'x' * 10 ** 10`) or never ending (three nested loops over
`range(99999)`), and there are too many ways to do so (repetition, powers, `center`, format widths,
`~` in a loop, `replace`, macros that call themselves) to stop each one in the interpreter, where a
single C call can take minutes. So templates are rendered in a process of their own: its address
space is limited by the system, and it is ended when it has used its processor time. The process
is started once for each template and waits for the next turn, so that a rendering takes about a
millisecond; should it have to be ended, the next rendering starts another.
"""

import json
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import psutil

from gguf_tools.child import python_command
from gguf_tools.errors import TemplateError, printable

CPU_SECONDS = 1.0  # of processor time for one rendering; real templates need milliseconds
WALL_SECONDS = 30.0  # for a process that is neither working nor answering
START_SECONDS = 60.0  # for Python and jinja2 to be loaded on a busy machine
MEMORY_BYTES = 200 << 20  # resident, where the system does not limit the process itself
POLL_SECONDS = 0.05

NO_LISTS = ("tools", "documents")  # names that templates look for and that are not given here
NAMES_KEY = "tokenizer.chat_templates"
TEMPLATE_KEY = "tokenizer.chat_template"
DEFAULT = "default"

EFFORTS = ("low", "medium", "high")  # of reasoning

PROBES = {"system": "probesystem", "user": "probeuser", "assistant": "probeassistant"}

MAX_SOURCE = 4 << 20  # characters
OUTPUT_ROOM = 1 << 20  # characters beyond
OUTPUT_FACTOR = 8  # times the conversation's own


@dataclass(frozen=True)
class Traits:
    """What a template does with a conversation, found by rendering some."""

    text: frozenset[str]  # roles whose content it takes as a text
    parts: frozenset[str]  # roles whose content it takes as a list of parts
    switches: frozenset[str]  # words that `thinking_variables` makes a difference for
    empty: bool  # whether it takes an answer without text, as an interrupted one is


class ChatTemplate:
    """A template that is known to compile."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source):,} characters, more than {MAX_SOURCE:,}"
            )
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._worker: _Worker | None = None
        self._lock = threading.Lock()
        with self._lock:
            self._ready_worker()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, each with a `role` and a `content`.

        A content is a text or a list of parts, `{"type": "text", "text": ...}`; a template that
        knows only one of the two gets that. `variables` are further names for the template to see,
        such as `enable_thinking`.
        """
        answer = self._render(
            [self._adapted(message) for message in messages],
            {**(variables or {}), "add_generation_prompt": add_generation_prompt},
        )
        if "error" in answer:
            raise _failure(answer)
        return str(answer["text"])

    @property
    def takes_empty(self) -> bool:
        """Whether an answer may be empty; some templates refuse that."""
        return self.traits.empty

    @property
    def takes_system(self) -> bool:
        """Whether a system message gets into the prompt; some templates refuse or ignore it."""
        return "system" in self.traits.text | self.traits.parts

    @cached_property
    def traits(self) -> Traits:
        """How the template takes messages."""
        probe = [_probe(role) for role in ("system", "user", "assistant", "user")]
        text = self._roles_shown(probe)
        parts = self._roles_shown([{**m, "content": _as_parts(m["content"])} for m in probe])
        for role in PROBES:
            if role not in text and role not in parts:
                mixed = [
                    {**m, "content": _as_parts(m["content"])} if m["role"] == role else m
                    for m in probe
                ]
                parts |= self._roles_shown(mixed) & {role}
        switches: set[str] = set()
        for words in (("on", "off"), EFFORTS):
            prompts = {
                self._render(probe[1:2], thinking_variables(word)).get("text")
                for word in (words[0], words[-1])
            }
            if len(prompts - {None}) == 2:
                switches.update(words)
        if not text | parts:  # it wants something else, and says so when it is used
            text = frozenset(PROBES)
        user, answer = probe[1:3]
        empty = self._render([user, {**answer, "content": ""}, user], {})
        filled = self._render([user, answer, user], {})
        takes_empty = "error" not in empty or "error" in filled
        return Traits(text, parts, frozenset(switches), takes_empty)

    def _roles_shown(self, messages: list[dict[str, Any]]) -> frozenset[str]:
        """The roles whose probes are in the prompt as they should be.

        A template that knows no parts may print the list of them, with quotation marks.
        """
        for start in (0, 1):  # with the system message, and without
            text = self._render(messages[start:], {}).get("text", "")
            found = {
                role
                for role, word in PROBES.items()
                if word in text and not any(f"{q}{word}{q}" in text for q in "'\"")
            }
            if found:
                return frozenset(found)
        return frozenset()

    def _adapted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`message` with its content in a form that the template takes."""
        message, content = dict(message), message.get("content")
        role = message.get("role")
        if isinstance(content, str):
            if role in self.traits.parts and role not in self.traits.text:
                message["content"] = _as_parts(content)
        elif isinstance(content, list) and role not in self.traits.parts:
            message["content"] = "\n".join(_texts(content))
        return message

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The worker's answer."""
        values = {
            **self._tokens,
            **dict.fromkeys(NO_LISTS),
            "add_generation_prompt": True,
            **variables,
            "messages": list(messages),
        }
        max_output = OUTPUT_ROOM + OUTPUT_FACTOR * len(json.dumps(values))
        with self._lock:
            answer = self._exchange({"variables": values, "max_output": max_output})
            if answer.get("error", "").startswith(("TypeError", "UndefinedError")):
                # Some templates for tools use what they are given without looking for it.
                again = self._exchange(
                    {"variables": _with_nothing(values), "max_output": max_output}
                )
                answer = answer if "error" in again else again
        return answer

    def _ready_worker(self) -> "_Worker":
        """A process that has compiled the template."""
        if self._worker is None or not self._worker.alive:
            worker = _Worker()
            answer = worker.ask({"source": self.source})
            if "error" in answer:
                worker.stop()
                raise _failure(answer)
            self._worker = worker
        return self._worker

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._ready_worker().ask(request)


def thinking_variables(word: str) -> dict[str, Any]:
    """What has the model reason (`on`), not at all (`off`), or as much as a word of EFFORTS says.

    Families differ in the names.
    """
    variables = dict.fromkeys(("enable_thinking", "thinking"), word != "off")
    if word not in EFFORTS:
        return variables
    names = ("reasoning_effort", "reasoning_strength", "thinking_effort")
    return {**variables, **dict.fromkeys(names, word)}


def named_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a GGUF file by name; the usual one is `default`, and first."""
    names = metadata.get(NAMES_KEY)
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    keys = {DEFAULT: TEMPLATE_KEY, **{name: f"{TEMPLATE_KEY}.{name}" for name in listed}}
    if TEMPLATE_KEY not in metadata:
        keys[DEFAULT] = f"{TEMPLATE_KEY}.{DEFAULT}"
    found = {name: metadata.get(key) for name, key in keys.items()}
    return {name: source for name, source in found.items() if isinstance(source, str)}


def _probe(role: str) -> dict[str, Any]:
    return {"role": role, "content": PROBES[role]}


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _texts(parts: Sequence[Any]) -> Iterator[str]:
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise TemplateError(
                f"the chat template takes only text, and a message has a part of the type "
                f"'{printable(kind, 40)}'"
            )
        yield part["text"]


def _with_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` for a template that takes it for granted that there are tools and a date."""
    nothing: dict[str, Any] = {key: [] for key in NO_LISTS if values[key] is None}
    today = datetime.now().strftime("%b %d %Y")  # as llama.cpp gives it
    return {"functions": "", "datetime": today, **values, **nothing}


def _failure(answer: Mapping[str, Any]) -> TemplateError:
    message = printable(answer["error"], 300)
    if answer["refused"]:
        return TemplateError(f"the chat template refuses this conversation: {message}")
    return TemplateError(f"the chat template does not work: {message}")


class _Worker:
    """A process that renders one template."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            python_command("runtime.template_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=sys.platform != "win32",  # Ctrl-C in the terminal is not for it
        )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._end = weakref.finalize(self, _stop, self._process)
        reader = threading.Thread(
            target=_read_lines, args=(self._process, self._lines), daemon=True
        )
        reader.start()
        self._wait(START_SECONDS, START_SECONDS)

    @property
    def alive(self) -> bool:
        return self._end.alive and self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            self.stop()
            raise _stopped("its process has gone away") from error
        answer: dict[str, Any] = json.loads(self._wait(CPU_SECONDS, WALL_SECONDS))
        return answer

    def stop(self) -> None:
        self._end()

    def _wait(self, cpu_seconds: float, wall_seconds: float) -> bytes:
        """The next line of the answer; ends the process when it takes more than it may."""
        start = time.monotonic()
        try:
            watched = psutil.Process(self._process.pid)
            cpu_start = _cpu_seconds(watched)
            while True:
                try:
                    line = self._lines.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    if _cpu_seconds(watched) - cpu_start > cpu_seconds:
                        raise _stopped("it runs for too long") from None
                    if watched.memory_info().rss > MEMORY_BYTES:
                        raise _stopped("it needs too much memory") from None
                    if time.monotonic() - start > wall_seconds:
                        raise _stopped("it does not answer") from None
                    continue
                if line is None:
                    raise _stopped("it brought its process down")
                return line
        except psutil.Error:
            self.stop()
            raise _stopped("its process has gone away") from None
        except BaseException:
            self.stop()
            raise


def _stopped(reason: str) -> TemplateError:
    return TemplateError(f"the chat template was stopped: {reason}")


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _read_lines(process: "subprocess.Popen[bytes]", lines: "queue.Queue[bytes | None]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.kill()
    try:
        process.stdin.close()
    except OSError:  # what was still to be written has no reader any more
        process.stdin = None
    process.wait()
