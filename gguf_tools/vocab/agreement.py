"""Whether the tokenizer of a finished GGUF file encodes as that of its checkpoint does.

The file is read again as a runtime would read it, and a fixed set of texts is encoded by both. The
checkpoint's own expressions run in a process of their own, with limits: in `trial` where the file
was tried out anyway, else here.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from gguf_tools.child import FAILURES, Question, limit_memory
from gguf_tools.encoders import TextEncoder, read_vocabulary
from gguf_tools.errors import GGUFError, printable
from gguf_tools.reader import UnfinishedFile
from gguf_tools.vocab.corpus import COMPARED_TEXTS
from gguf_tools.vocab.files import read_bytes, read_json
from gguf_tools.vocab.slow_files import MERGES_NAME, VOCAB_NAME, read_slow_files
from gguf_tools.vocab.tokenizer_json import NAME as JSON_NAME
from gguf_tools.vocab.trial import Encodings

MODEL_NAME, CONFIG_NAME = "tokenizer.model", "tokenizer_config.json"
TIME_LIMIT = 60.0  # seconds; the largest tokenizers take about six
SHOWN = 4  # tokens of each side, from where they part

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Difference:
    """A text that the two encode differently, from the first token that is not the same."""

    text: str
    expected: tuple[str, ...]  # a few tokens as the checkpoint has them
    found: tuple[str, ...]  # and as the file has them


@dataclass(frozen=True)
class Agreement:
    """What came of the comparison."""

    source: str  # the checkpoint's file that was run
    n_texts: int
    differences: tuple[Difference, ...]
    failure: str = ""  # why nothing could be compared

    @property
    def complete(self) -> bool:
        return not self.differences and not self.failure

    def describe(self) -> str:
        """What came of it, in one line."""
        if self.failure:
            return f"not compared with the checkpoint's: {self.failure}"
        n_same = self.n_texts - len(self.differences)
        return f"{n_same} of {self.n_texts} test texts are encoded as by {self.source}"

    def lines(self) -> list[str]:
        """Each difference in one line."""
        return [
            f"tokenizer: '{printable(d.text, 60)}': {self.source} goes on with "
            f"{_listing(d.expected)}, the file with {_listing(d.found)}"
            for d in self.differences
        ]


def compare(folder: Path, file: Path) -> Agreement:
    """Encode the compared texts with the checkpoint in `folder` and with the GGUF file."""
    with ask_for_encodings(folder) as question:
        try:
            vocabulary = read_vocabulary(UnfinishedFile(file).metadata)
            encoder = TextEncoder(vocabulary)
        except GGUFError as error:
            return Agreement("", len(COMPARED_TEXTS), (), str(error))
        return agree(read_encodings(question), encoder, vocabulary.tokens)


def ask_for_encodings(folder: Path) -> Question:
    """What the checkpoint's own library makes of the test texts, under way."""
    return Question("gguf_tools.vocab.agreement", [str(folder.resolve())])


def read_encodings(question: Question) -> Encodings:
    """What came of it, which is waited for."""
    try:
        return Encodings(**question.answer(seconds=TIME_LIMIT))
    except subprocess.TimeoutExpired:
        failure = f"it took longer than {TIME_LIMIT:.0f} seconds"
    except (*FAILURES, TypeError):
        failure = "the process that was to run it ended early"
    return Encodings("", (), failure)


def agree(expected: Encodings, encoder: TextEncoder, names: Sequence[str]) -> Agreement:
    """Encode the compared texts as the file does, whose tokens are called `names`."""
    if expected.failure:
        return Agreement("", len(COMPARED_TEXTS), (), expected.failure)
    # SentencePiece's library finds no special token in a text.
    special = expected.source != MODEL_NAME
    differences = tuple(
        _part(text, list(ids), found, names=names)
        for text, ids in zip(COMPARED_TEXTS, expected.ids, strict=True)
        for found in [encoder.encode(text, parse_special=special)]
        if list(ids) != found
    )
    return Agreement(expected.source, len(COMPARED_TEXTS), differences)


def main(arguments: Sequence[str]) -> int:
    """Encode with the checkpoint in the folder that the argument is; write JSON."""
    answer: dict[str, Any] = {"source": "", "ids": [], "failure": ""}
    try:
        limit_memory()
        answer["source"], encode = source_encoder(Path(arguments[0]))
        answer["ids"] = [encode(text) for text in COMPARED_TEXTS]
    except GGUFError as error:
        answer["failure"] = str(error)
    sys.stdout.write(json.dumps(answer))
    return 0


def source_encoder(folder: Path) -> tuple[str, Encode]:
    """The checkpoint's tokenizer as its own library runs it, and the file it is in.

    GGUFError when there is none, or when the library cannot load it.
    """
    model = read_bytes(folder, MODEL_NAME)
    if (folder / JSON_NAME).is_file():
        try:
            return JSON_NAME, _hugging_face(lambda kind: kind.from_file(str(folder / JSON_NAME)))
        except GGUFError:
            if model is None:
                raise
    if model is not None:
        return MODEL_NAME, _sentencepiece(model)
    data = read_slow_files(folder, read_json(folder, CONFIG_NAME))
    if data is None:
        raise GGUFError(f"neither {JSON_NAME} nor {MODEL_NAME} is there any more")
    text = json.dumps(data)
    return f"{VOCAB_NAME} and {MERGES_NAME}", _hugging_face(lambda kind: kind.from_str(text))


def _hugging_face(load: Callable[[Any], Any]) -> Encode:
    from tokenizers import Tokenizer

    try:
        tokenizer = load(Tokenizer)
    except Exception as error:  # the library raises nothing more definite
        raise GGUFError(f"the tokenizers library cannot load it ({printable(error)})") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _sentencepiece(model: bytes) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise GGUFError(f"the sentencepiece library cannot load it ({printable(error)})") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = processor.EncodeAsIds(text)
        return ids

    return encode


def _part(text: str, expected: list[int], found: list[int], *, names: Sequence[str]) -> Difference:
    """The text, and the tokens of both from where they part."""
    pairs = zip(expected, found, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def show(ids: list[int]) -> tuple[str, ...]:
        shown = ids[same : same + SHOWN]
        return tuple(names[i] if i < len(names) else str(i) for i in shown)

    return Difference(text, show(expected), show(found))


def _listing(tokens: Sequence[str]) -> str:
    return " ".join(f"'{printable(token, 30)}'" for token in tokens) or "nothing"
