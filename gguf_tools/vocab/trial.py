"""Trying a tokenizer.json out: its fingerprint, and which known split encodes as it does.

It runs in a process of its own: the file's regular expressions run in the tokenizers library, where
a hostile one may take for ever or bring the process down. The parent sets a time limit and reads
the answer, one line of JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tools.child import FAILURES, Question, limit_memory
from gguf_tools.closing import Closeable
from gguf_tools.errors import CheckpointError
from gguf_tools.pretokenizers import SPLITS
from gguf_tools.vocab.corpus import COMPARED_TEXTS, TEST_TEXTS
from gguf_tools.vocab.fingerprints import CHECK_TEXT, fingerprint

TIME_LIMIT = 15.0  # seconds; the largest tokenizers take about two
NFC = "+nfc"


@dataclass(frozen=True)
class Encodings:
    """What the checkpoint's own tokenizer makes of the compared texts."""

    source: str  # the file that was run
    ids: Sequence[Sequence[int]]  # of each text
    failure: str = ""  # why there are none

    def of(self, text: str) -> Sequence[int]:
        """The ids of one of the texts."""
        return self.ids[COMPARED_TEXTS.index(text)]


@dataclass(frozen=True)
class Trial:
    """How a tokenizer.json behaves. Keys are splits, with "+nfc" where text is normalized first."""

    fingerprint: str
    n_texts: int
    same_ids: Mapping[str, int]  # texts that encode to the same ids
    same_words: Mapping[str, int]  # texts that are cut at the same places
    merges_matter: int  # texts that ignoring the merges of whole words encodes differently
    ids: Sequence[Sequence[int]]  # what the compared texts are encoded as


class RunningTrial(Closeable):
    """A tokenizer.json that is being tried out; for a `with` block.

    Its process loads it at once, beside whatever comes first, and waits to be asked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._question = Question("gguf_tools.vocab.trial", [str(path.resolve())], waits=True)

    def close(self) -> None:
        self._question.close()

    def ask(self, keys: Iterable[str]) -> None:
        """Let it be tried out with these splits in the place of its own."""
        self._question.tell(list(keys))

    def result(self) -> Trial | None:
        """None when it took too long."""
        try:
            return Trial(**self._question.answer(seconds=TIME_LIMIT))
        except subprocess.TimeoutExpired:
            return None
        except (*FAILURES, TypeError) as error:
            raise CheckpointError(
                f"{self.path.name}: the tokenizers library cannot load it or fails to run it"
            ) from error


def try_tokenizer(path: str, ask: Callable[[], Sequence[str]]) -> Trial:
    """Encode the test texts with the file as it is, and with each of the splits that come of `ask`
    in its place.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer: Any = Tokenizer.from_file(path)
    mark = fingerprint(tokenizer.encode(CHECK_TEXT).ids)
    ids = [_encode(tokenizer, text) for text in COMPARED_TEXTS]
    expected = ids[: len(TEST_TEXTS)]
    words = _cut_all(tokenizer)
    plain = tokenizer.model.ignore_merges
    tokenizer.model.ignore_merges = not plain
    merges_matter = len(TEST_TEXTS) - _count_equal(_encode_all(tokenizer), expected)
    tokenizer.model.ignore_merges = plain
    same_ids, same_words = {}, {}
    for key in ask():
        patterns = SPLITS[key.removesuffix(NFC)]
        tokenizer.normalizer = normalizers.NFC() if key.endswith(NFC) else normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        same_ids[key] = _count_equal(_encode_all(tokenizer), expected)
        same_words[key] = _count_equal(_cut_all(tokenizer), words)
    return Trial(mark, len(TEST_TEXTS), same_ids, same_words, merges_matter, ids)


def main(arguments: Sequence[str]) -> int:
    """Try the file that the argument is; the splits come as JSON on standard input."""
    limit_memory()
    trial = try_tokenizer(arguments[0], lambda: json.loads(sys.stdin.readline() or "[]"))
    sys.stdout.write(json.dumps(vars(trial)))
    return 0


def _encode_all(tokenizer: Any) -> list[list[int]]:
    return [_encode(tokenizer, text) for text in TEST_TEXTS]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _cut_all(tokenizer: Any) -> list[list[str]]:
    cut = []
    for text in TEST_TEXTS:
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        parts = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else []
        cut.append([part for part, _ in parts])
    return cut


def _count_equal(first: list[Any], second: list[Any]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))
