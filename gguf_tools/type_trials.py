"""Asking what types of tensors cost: the model is run by a process of its own.

What runs it is in the runtime, which nothing here imports (runtime/trying_types.py). It answers
with lines of JSON, and says in between how far it is.
"""

import json
import subprocess
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf_tools.child import python_command
from gguf_tools.errors import GGUFError
from gguf_tools.self_check import Source

RUNTIME = "runtime.trying_types"  # a module with a main that answers requests

Answer = dict[str, Any]


@dataclass(frozen=True)
class Doing:
    """What it is about to do, or how much of that is done."""

    what: str
    done: int = 0
    total: int = 0  # 0: not known


@dataclass(frozen=True)
class Measured:
    """What each type of each tensor is expected to cost, and how that was measured."""

    costs: Mapping[str, Mapping[str, float]]  # mean KL divergence, nats
    tokens: int
    together: int  # layers whose tensors of a kind were measured together
    text: str  # its name
    digest: str  # its SHA-256


class TypeTrials:
    """A model whose types are tried, for a `with` block; questions are asked in this order."""

    def __init__(
        self, source: Source, *, text: Path | None, imatrix: Path | None, threads: int
    ) -> None:
        """`text` is what the model reads; None: the one that ships."""
        self._request = {
            "source": str(source.path.resolve()),
            "is_checkpoint": source.is_checkpoint,
            "adapters": source.adapters,
            "text": None if text is None else str(text.resolve()),
            "imatrix": None if imatrix is None else str(imatrix.resolve()),
            "threads": threads,
        }

    def __enter__(self) -> "TypeTrials":
        self._process = subprocess.Popen(
            python_command(RUNTIME),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._process as process:
            process.kill()

    def measure(
        self, types: Mapping[str, Sequence[str]], tried: Mapping[str, str]
    ) -> Generator[Doing, None, Measured]:
        """Returns the costs of the types that each tensor can have; `tried` ones are measured.

        GGUFError says why a model cannot be measured.
        """
        answer = yield from self._ask({**self._request, "types": types, "tried": tried}, "costs")
        return Measured(**answer)

    def compare(
        self, mixtures: Sequence[Mapping[str, str]]
    ) -> Generator[Doing, None, tuple[Sequence[float], int]]:
        """Returns the mean KL divergence of each, and the number of tokens."""
        answer = yield from self._ask({"mixtures": mixtures}, "kl")
        return answer["kl"], answer["tokens"]

    def _ask(self, request: Answer, wanted: str) -> Generator[Doing, None, Answer]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        what = "reading the model"
        yield Doing(what)
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer: Answer = json.loads(line)
                if "error" in answer:
                    raise GGUFError(
                        f"{answer['error']}; without measuring, --type chooses the types"
                    )
                if wanted in answer:
                    return answer
                what = answer.get("doing", what)
                yield Doing(what, answer.get("done", 0), answer.get("total", 0))
        except (BrokenPipeError, ValueError):  # it ended in the middle of a line
            pass
        raise GGUFError(
            "the process that measures what types cost ended early, perhaps for want of memory; "
            "--type chooses types without measuring"
        )
