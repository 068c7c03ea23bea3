"""A whole text to ids: added tokens are found in it, an encoder sees what lies between them."""

from functools import cached_property
from typing import Protocol

from gguf_tools.encoders.matcher import Matcher
from gguf_tools.encoders.merges import MergeEncoder
from gguf_tools.encoders.pieces import PieceEncoder
from gguf_tools.encoders.vocabulary import PIECE_MODELS, Vocabulary, is_added
from gguf_tools.encoders.words import WordEncoder
from gguf_tools.token_types import CONTROL, SPACE, UNKNOWN, USER_DEFINED

GUARD = "\ufdd0"
"""A character that Unicode keeps for programs. `TextEncoder.guarded` breaks up control tokens with
it; encoding removes it."""


class Encoder(Protocol):
    """Encodes a text, or a stretch of it between added tokens; `first` when no token is before."""

    def encode(self, text: str, *, first: bool) -> list[int]: ...


def make_encoder(vocabulary: Vocabulary) -> Encoder:
    """The encoder that the vocabulary's kind asks for."""
    if vocabulary.model in PIECE_MODELS:
        return PieceEncoder(vocabulary)
    if vocabulary.model == "bert":
        return WordEncoder(vocabulary)
    return MergeEncoder(vocabulary)


class TextEncoder:
    """Text to ids. Control tokens (bos, <|im_end|> and the like) are recognised only when asked
    for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._encoder = make_encoder(vocabulary)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text` and nothing around them; with `parse_special` control tokens too."""
        ids: list[int] = []
        matcher = self._all if parse_special else self._plain
        for part in matcher.split(well_formed(text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            if parse_special:
                part = part.replace(GUARD, "")
            ids += self._encoder.encode(part, first=not ids)
        return ids

    def guarded(self, text: str) -> str:
        """`text` so that `encode` with parse_special=True finds no control token in it.

        For what goes into a chat template: the template's own tokens are to be recognised, those
        that a user has typed are not.
        """
        text = well_formed(text).replace(GUARD, "")
        parts = []
        for part in self._controls.split(text):
            if isinstance(part, int):
                token = self._vocabulary.tokens[part]
                part = token[:1] + GUARD + token[1:]
            parts.append(part)
        return "".join(parts)

    @cached_property
    def _controls(self) -> Matcher:
        return self._matcher_of(CONTROL, UNKNOWN, strip=False)

    @cached_property
    def _plain(self) -> Matcher:
        return self._matcher_of(USER_DEFINED)

    @cached_property
    def _all(self) -> Matcher:
        return self._matcher_of(USER_DEFINED, CONTROL, UNKNOWN)

    def _matcher_of(self, *kinds: int, strip: bool = True) -> Matcher:
        vocabulary = self._vocabulary
        chosen = [
            i
            for i, kind in enumerate(vocabulary.types.tolist())
            if kind in kinds and (kind != USER_DEFINED or is_added(vocabulary, i))
        ]
        chosen.reverse()  # of several with one text the first counts
        texts = [vocabulary.tokens[i] for i in chosen]
        if vocabulary.model in PIECE_MODELS:  # there both of the spaces are one
            texts = [text.replace(" ", SPACE) for text in texts] + texts
            chosen = chosen * 2
        return Matcher(
            texts,
            chosen,
            lstrip=vocabulary.lstrip_ids if strip else frozenset(),
            rstrip=vocabulary.rstrip_ids if strip else frozenset(),
        )


def well_formed(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
