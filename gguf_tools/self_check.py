"""What `convert` checks of a finished file before it gets its name, in one line.

The file is read again: its tokenizer encodes a set of texts as the checkpoint's own does
(gguf_tools/vocab/agreement.py); a dialogue through its chat template begins with one BOS, and ends
with a token of the stop set; a few tokens give the logits that the source's weights give. A short
text tells what quantising cost (gguf_tools/quality_sheet.py). That is done in the runtime, which
nothing here imports: it is a process of its own, and what becomes of it cannot hurt the conversion.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gguf_tools.child import FAILURES, Question
from gguf_tools.closing import Closeable
from gguf_tools.errors import OutputError, printable
from gguf_tools.quality_sheet import Sheet, cliff_warning, fitting, sheet_of_json
from gguf_tools.values import MetadataValue
from gguf_tools.vocab.agreement import ask_for_encodings, read_encodings
from gguf_tools.vocab.run_texts import LONG_TEXT, SHORT_TEXT
from gguf_tools.vocab.trial import Encodings

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


@dataclass(frozen=True)
class SheetRequest:
    """What the quality sheet is to be of."""

    bits: int  # of the file's type
    compiles: bool  # kernels that are not there yet; without, NumPy takes the place of them
    names_tensors: bool = True  # off where no tensor of the file is the source's alone


class CliffFoundError(Exception):
    """A precision cliff, in a file that is to be made again with more bits for some tensors."""

    def __init__(self, sheet: Sheet) -> None:
        super().__init__("the file lies beyond a precision cliff")
        self.sheet = sheet


class SelfCheck(Closeable):
    """The check as a step of a conversion; with `strict`, what is wrong is an error.

    For a `with` block: the process that checks begins to load there, beside whatever comes first,
    makes ready when `prepare` names the source, and looks at the file when `begin` names that.
    """

    def __init__(self, *, threads: int, strict: bool, checks: bool = True) -> None:
        """Without `checks` the quality sheet is all that is made, where one is asked for."""
        self.findings: tuple[Finding, ...] = ()
        self.sheet: Sheet | None = None
        self.no_sheet = ""  # why there is none, where one was asked for
        self._checks = checks
        self._wanted: SheetRequest | None = None
        self._raises = False
        self._threads, self._strict = threads, strict
        self._source: Source | None = None
        self._output = Path()
        self._tokenizer: Question | None = None
        self._running = Question(RUNTIME, [], waits=True)

    def close(self) -> None:
        for question in (self._tokenizer, self._running):
            if question is not None:
                question.close()

    def prepare(self, source: Source, *, is_tried: bool) -> None:
        """Let the process get ready to run `source`, of which there is no file yet.

        Unless the tokenizer is being tried out, which tells how it encodes, it is asked for that.
        """
        self._running.tell(_told_of(source))
        if not is_tried:
            self._ask_for_encodings(source)

    def begin(
        self,
        part: Path,
        *,
        source: Source,
        output: Path,
        sheet: SheetRequest | None = None,
        raises: bool = False,
    ) -> None:
        """Start with `part`, which is to become `output` and has its metadata already.

        With `sheet` it has room for a quality sheet, too. With `raises`, a cliff in which some
        tensors stand out is a CliffFoundError.
        """
        self._source, self._output = source, output
        self._wanted, self._raises = sheet, raises
        if self._tokenizer is None and source.encodings is None:
            self._ask_for_encodings(source)
        self._running.tell(
            {
                **_told_of(source),
                "file": str(part.resolve()),
                "threads": self._threads,
                "checks": self._checks,
                "ids": run_ids(source),
                "sheet": None if sheet is None else asdict(sheet),
            }
        )

    def end(self, file: Path) -> Mapping[str, MetadataValue]:
        """Wait for what comes of it: the file is finished, its metadata is what it was.

        Gives what is to be put into the file's room for a quality sheet.
        """
        self.findings = self._run()
        if self.sheet is not None and self.sheet.is_cliff:
            if self._raises and self.sheet.outstanding:
                raise CliffFoundError(self.sheet)
            cliff = Finding("", (cliff_warning(self.sheet),))
            self.findings = (cliff, *self.findings)  # first: it says what to do
        if self._strict and self.problems:
            raise OutputError(
                f"{printable(self._output, limit=1000)} was not written, as --strict asks: "
                f"{self.problems[0]}"
            )
        return {} if self.sheet is None else fitting(self.sheet)

    @property
    def line(self) -> str:
        return ", ".join(finding.text for finding in self.findings if finding.text)

    @property
    def problems(self) -> list[str]:
        return [problem for finding in self.findings for problem in finding.problems]

    @property
    def details(self) -> list[str]:
        return [detail for finding in self.findings for detail in finding.details]

    def _ask_for_encodings(self, source: Source) -> None:
        if self._checks and source.is_checkpoint:
            self._tokenizer = ask_for_encodings(source.path)

    def _run(self) -> tuple[Finding, ...]:
        """What the process finds, which is told how the checkpoint encodes."""
        assert self._source is not None, "it has begun"
        encodings = self._source.encodings
        if self._tokenizer is not None:
            encodings = read_encodings(self._tokenizer)
        self._running.tell(None if encodings is None else asdict(encodings))
        try:
            answer = self._running.answer(seconds=TIME_LIMIT)
            if self._wanted is not None:
                self.sheet = sheet_of_json(answer["sheet"])
                self.no_sheet = str(answer["no_sheet"])
            return _read(answer["findings"])
        except subprocess.TimeoutExpired:
            failure = f"it took longer than {TIME_LIMIT:.0f} seconds"
        except (*FAILURES, TypeError, KeyError):
            failure = "the process that was to run it ended early"
        self.sheet, self.no_sheet = None, failure
        return (Finding("model not run", (f"the model could not be run: {failure}",)),)


def _told_of(source: Source) -> dict[str, object]:
    """What there is to run, for the process that does."""
    return {
        "source": str(source.path.resolve()),
        "is_checkpoint": source.is_checkpoint,
        "adapters": source.adapters,
    }


def run_ids(source: Source) -> dict[str, Sequence[int]] | None:
    """The tokens of the texts that the models are run on, where the checkpoint has told them."""
    encodings = source.encodings
    if encodings is None or encodings.failure:
        return None
    return {"short": encodings.of(SHORT_TEXT), "long": encodings.of(LONG_TEXT)}


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
