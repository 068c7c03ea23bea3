"""What `convert` checks of a finished file before it gets its name, in one line.

The file is read again: its tokenizer encodes a set of texts as the checkpoint's own does
(gguf_tools/vocab/agreement.py); a dialogue through its chat template begins with one BOS, and ends
with a token of the stop set; a few tokens give the logits that the source's weights give. What
runs the model is in the runtime, which nothing here imports: it is a process of its own, and what
becomes of it cannot hurt the conversion.
"""

import json
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.errors import OutputError, printable
from gguf_tools.vocab.agreement import compare
from gguf_tools.vocab.trial import FAILURES, ask

RUNTIME = "runtime.file_check"  # a module with a main that answers with Findings
TIME_LIMIT = (
    900.0  # seconds; of a model that is read from a slow disk, on a machine without kernels
)


@dataclass(frozen=True)
class Finding:
    """What came of one part of the check."""

    text: str  # for the line
    problems: tuple[str, ...] = ()  # sentences about what is wrong
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What the file was made from."""

    path: Path  # a checkpoint, or a GGUF file
    is_checkpoint: bool
    adapters: tuple[str, ...] = ()  # merged, as --lora has them


class SelfCheck:
    """The check as a step of a conversion; with `strict`, what is wrong is an error."""

    def __init__(self, source: Source, output: Path, *, threads: int, strict: bool) -> None:
        self.findings: tuple[Finding, ...] = ()
        self._source, self._output = source, output
        self._threads, self._strict = threads, strict

    def run(self, file: Path) -> None:
        """Check `file`, which is to become the output."""
        self.findings = check_file(file, self._source, threads=self._threads)
        if self._strict and self.problems:
            raise OutputError(
                f"{printable(self._output, limit=1000)} was not written, as --strict asks: "
                f"{self.problems[0]}"
            )

    @property
    def line(self) -> str:
        return ", ".join(finding.text for finding in self.findings)

    @property
    def problems(self) -> list[str]:
        return [problem for finding in self.findings for problem in finding.problems]

    @property
    def details(self) -> list[str]:
        return [detail for finding in self.findings for detail in finding.details]


def check_file(file: Path, source: Source, *, threads: int) -> tuple[Finding, ...]:
    """All parts of the check, each in a process of its own, at the same time."""
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(_check_running, file, source, threads)
        tokenizer = _check_tokenizer(file, source)
        return (tokenizer, *running.result())


def _check_tokenizer(file: Path, source: Source) -> Finding:
    if not source.is_checkpoint:
        return Finding("tokenizer carried over")
    agreement = compare(source.path, file)
    lines = tuple(agreement.lines())
    if agreement.failure:
        return Finding(f"tokenizer {agreement.describe()}", (f"tokenizer: {agreement.failure}",))
    if lines:
        return Finding(f"tokenizer differs: {agreement.describe()}", lines)
    text = f"tokenizer agrees on {agreement.n_texts} texts"
    return Finding(text, details=(f"tokenizer: compared with {agreement.source}",))


def _check_running(file: Path, source: Source, threads: int) -> tuple[Finding, ...]:
    """The chat template and the logits."""
    request = {
        "file": str(file.resolve()),
        "source": str(source.path.resolve()),
        "is_checkpoint": source.is_checkpoint,
        "adapters": source.adapters,
        "threads": threads,
    }
    try:
        return _read(ask(RUNTIME, [json.dumps(request)], seconds=TIME_LIMIT))
    except subprocess.TimeoutExpired:
        failure = f"it took longer than {TIME_LIMIT:.0f} seconds"
    except (*FAILURES, TypeError, KeyError):
        failure = "the process that was to run it ended early"
    return (Finding("model not run", (f"the model could not be run: {failure}",)),)


def _read(answer: Sequence[dict[str, object]]) -> tuple[Finding, ...]:
    """The findings that a process wrote; KeyError or TypeError if these are none."""

    def texts(value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise TypeError(f"expected texts, found {value!r}")
        return tuple(map(str, value))

    return tuple(
        Finding(str(part["text"]), texts(part["problems"]), texts(part["details"]))
        for part in answer
    )
