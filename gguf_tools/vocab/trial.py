"""Trying a tokenizer.json out: its fingerprint, and which known split encodes as it does.

It runs in a process of its own: the file's regular expressions run in the tokenizers library, where
a hostile one may take for ever or bring the process down. The parent sets a time limit and reads
the answer, one line of JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf_tools.child import python_command
from gguf_tools.errors import CheckpointError
from gguf_tools.pretokenizers import SPLITS
from gguf_tools.vocab.corpus import TEST_TEXTS
from gguf_tools.vocab.fingerprints import CHECK_TEXT, fingerprint

TIME_LIMIT = 15.0  # seconds; the largest tokenizers take about two
MEMORY_LIMIT = 4 << 30  # bytes of address space, where the system can limit it
NFC = "+nfc"
FAILURES = (OSError, ValueError, subprocess.SubprocessError)  # of a process that is asked


@dataclass(frozen=True)
class Encodings:
    """What the checkpoint's own tokenizer makes of the test texts."""

    source: str  # the file that was run
    ids: Sequence[Sequence[int]]  # of each text
    failure: str = ""  # why there are none


@dataclass(frozen=True)
class Trial:
    """How a tokenizer.json behaves. Keys are splits, with "+nfc" where text is normalized first."""

    fingerprint: str
    n_texts: int
    same_ids: Mapping[str, int]  # texts that encode to the same ids
    same_words: Mapping[str, int]  # texts that are cut at the same places
    merges_matter: int  # texts that ignoring the merges of whole words encodes differently
    ids: Sequence[Sequence[int]]  # what the texts are encoded as


class Question:
    """`main(arguments)` of a module, running in a process of its own from now on.

    To be closed, by the end of a `with` block: the process ends there if it has not yet.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, waits: bool = False) -> None:
        """With `waits` its standard input stays open until the answer is asked for."""
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        try:
            self._process = subprocess.Popen(
                python_command(module, arguments),
                stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Threads of these libraries would wait for each other by spinning.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:  # no process can be had: that is the answer
            self._failure = error

    def __enter__(self) -> "Question":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def tell(self, line: object) -> None:
        """Write a line of JSON to its standard input; if it is gone, `answer` will say so."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(line).encode() + b"\n")
                self._process.stdin.flush()

    def answer(self, *, seconds: float) -> Any:
        """The JSON that it writes, waited for so long.

        Raises one of FAILURES, subprocess.TimeoutExpired among them.
        """
        if self._process is None:
            raise self._failure or ValueError("the question is closed")
        written, _ = self._process.communicate(timeout=seconds)  # closes standard input
        if self._process.returncode != 0:
            raise subprocess.CalledProcessError(self._process.returncode, self._process.args)
        return json.loads(written)

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


class RunningTrial:
    """A tokenizer.json that is being tried out with the splits `keys`; for a `with` block."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        self._path = path
        self._question = Question("gguf_tools.vocab.trial", [str(path.resolve()), *keys])

    def __enter__(self) -> "RunningTrial":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._question.close()

    def result(self) -> Trial | None:
        """None when it took too long."""
        try:
            return Trial(**self._question.answer(seconds=TIME_LIMIT))
        except subprocess.TimeoutExpired:
            return None
        except (*FAILURES, TypeError) as error:
            raise CheckpointError(
                f"{self._path.name}: the tokenizers library cannot load it or fails to run it"
            ) from error


def try_tokenizer(path: str, keys: Sequence[str]) -> Trial:
    """Encode the test texts with the file as it is and with each of these splits in its place."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer: Any = Tokenizer.from_file(path)
    mark = fingerprint(tokenizer.encode(CHECK_TEXT).ids)
    expected = _encode_all(tokenizer)
    words = _cut_all(tokenizer)
    plain = tokenizer.model.ignore_merges
    tokenizer.model.ignore_merges = not plain
    merges_matter = len(TEST_TEXTS) - _count_equal(_encode_all(tokenizer), expected)
    tokenizer.model.ignore_merges = plain
    same_ids, same_words = {}, {}
    for key in keys:
        patterns = SPLITS[key.removesuffix(NFC)]
        tokenizer.normalizer = normalizers.NFC() if key.endswith(NFC) else normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        same_ids[key] = _count_equal(_encode_all(tokenizer), expected)
        same_words[key] = _count_equal(_cut_all(tokenizer), words)
    return Trial(mark, len(TEST_TEXTS), same_ids, same_words, merges_matter, expected)


def main(arguments: Sequence[str]) -> int:
    """Try the file and the splits that the arguments are."""
    limit_memory(MEMORY_LIMIT)
    sys.stdout.write(json.dumps(vars(try_tokenizer(arguments[0], arguments[1:]))))
    return 0


def limit_memory(n_bytes: int) -> None:
    """Let this process have no more address space than this, where the system can limit it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _encode_all(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEST_TEXTS]


def _cut_all(tokenizer: Any) -> list[list[str]]:
    cut = []
    for text in TEST_TEXTS:
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        parts = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else []
        cut.append([part for part, _ in parts])
    return cut


def _count_equal(first: list[Any], second: list[Any]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))
