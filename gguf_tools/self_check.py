"""What `convert` checks of a finished file before it gets its name, in one line.

The file is read again: its tokenizer encodes a set of texts as the checkpoint's own does
(gguf_tools/vocab/agreement.py); a dialogue through its chat template begins with one BOS, and ends
with a token of the stop set; a few tokens give the logits that the source's weights give. That is
done in the runtime, which nothing here imports: it is a process of its own, and what becomes of it
cannot hurt the conversion.
"""

import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from gguf_tools.errors import OutputError, printable
from gguf_tools.vocab.agreement import ask_for_encodings, read_encodings
from gguf_tools.vocab.trial import FAILURES, Encodings, Question

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
    encodings: Encodings | None = None  # of the test texts, by its tokenizer, where known already


class SelfCheck:
    """The check as a step of a conversion; with `strict`, what is wrong is an error.

    For a `with` block: the process that checks begins to load there, beside whatever comes first,
    and to look at the file when `begin` names it.
    """

    def __init__(self, *, threads: int, strict: bool) -> None:
        self.findings: tuple[Finding, ...] = ()
        self._threads, self._strict = threads, strict
        self._source: Source | None = None
        self._output = Path()
        self._tokenizer: Question | None = None
        self._running = Question(RUNTIME, [], waits=True)

    def __enter__(self) -> "SelfCheck":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for question in (self._tokenizer, self._running):
            if question is not None:
                question.close()

    def begin(self, part: Path, *, source: Source, output: Path) -> None:
        """Start with `part`, which is to become `output` and has its metadata already."""
        self._source, self._output = source, output
        if source.is_checkpoint and source.encodings is None:
            self._tokenizer = ask_for_encodings(source.path)
        self._running.tell(
            {
                "file": str(part.resolve()),
                "source": str(source.path.resolve()),
                "is_checkpoint": source.is_checkpoint,
                "adapters": source.adapters,
                "threads": self._threads,
            }
        )

    def end(self, file: Path) -> None:
        """Wait for what comes of it: the file is finished, its metadata is what it was."""
        self.findings = self._run()
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

    def _run(self) -> tuple[Finding, ...]:
        """What the process finds, which is told how the checkpoint encodes."""
        assert self._source is not None, "it has begun"
        encodings = self._source.encodings
        if self._tokenizer is not None:
            encodings = read_encodings(self._tokenizer)
        self._running.tell(None if encodings is None else asdict(encodings))
        try:
            return _read(self._running.answer(seconds=TIME_LIMIT))
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
