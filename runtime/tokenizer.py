"""The tokenizer of a GGUF file: text to ids and back, from its metadata alone.

Control tokens (bos, <|im_end|> and the like) are recognised in text only when asked for, with
`parse_special=True`, as in a prompt made by a chat template; what a user types never becomes one.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from gguf_tools.encoders import GUARD, TextEncoder, read_vocabulary
from gguf_tools.encoders.vocabulary import byte_value, is_added
from gguf_tools.token_types import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

__all__ = ["GUARD", "StreamDecoder", "Tokenizer", "encode_chat"]


class Tokenizer:
    """Text to ids and back. Knows its vocabulary and no model."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._vocabulary = read_vocabulary(metadata)
        ids = self._vocabulary.ids
        self.tokens = self._vocabulary.tokens  # as the file spells them
        self.n_tokens = len(self.tokens)
        self.bos_id = ids.get("bos")
        self.eos_id = ids.get("eos")
        self.add_bos = self._vocabulary.add_bos
        self.add_eos = self._vocabulary.add_eos
        self.eog_ids = self._vocabulary.eog_ids
        self.chat_template = self._vocabulary.chat_template
        self.notes = self._vocabulary.notes  # to tell the user once
        self.encoder = TextEncoder(self._vocabulary)

    # Text to ids.

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The ids of `text`.

        `add_special` puts bos before and eos behind as the file asks, but never a second bos:
        a text that begins with it (most chat templates do) keeps its own. `parse_special`
        recognises control tokens in the text.
        """
        ids = self.encoder.encode(text, parse_special=parse_special)
        if add_special:
            if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
            if self.add_eos and self.eos_id is not None:
                ids.append(self.eos_id)
        return ids

    def guarded(self, text: str) -> str:
        """`text` so that `encode` with parse_special=True finds no control token in it."""
        return self.encoder.guarded(text)

    # Ids to text.

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`; control tokens are left out unless `special`.

        The space that a tokenizer of this kind puts before every text is taken away again.
        """
        data = b"".join(self.token_bytes(i, special=special) for i in ids)
        if self._vocabulary.add_space_prefix and data.startswith(b" "):
            first = next(i for i in ids if self.token_bytes(i, special=special))
            if self._vocabulary.types[first] == NORMAL or not is_added(self._vocabulary, first):
                data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for: part of a character, or several; nothing for control."""
        text = self.token_text(token_id)
        kind = self._vocabulary.types[token_id]
        if kind == BYTE and (byte := byte_value(text)) is not None:
            return bytes([byte])
        if kind in (NORMAL, BYTE):
            if self._byte_alphabet:
                return _from_byte_alphabet(text)
            return _utf8(text.replace(SPACE, " "))
        if kind in (CONTROL, UNKNOWN, UNUSED) and not special:
            return b""
        return _utf8(text)

    def token_text(self, token_id: int) -> str:
        """The token as the file stores it."""
        if not 0 <= token_id < self.n_tokens:
            raise ValueError(f"{token_id} is no token of {self.n_tokens}")
        return self._vocabulary.tokens[token_id]

    def is_mark(self, token_id: int) -> bool:
        """Whether a token stands for no text, but for a place in it: bos, <|im_end|> and such."""
        special = self._vocabulary.types[token_id] in (CONTROL, USER_DEFINED, UNKNOWN)
        return special and bool(self.token_text(token_id).replace(SPACE, " ").strip())

    @property
    def _byte_alphabet(self) -> bool:
        return self._vocabulary.model == "gpt2" and not self._vocabulary.pre.raw_bytes


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """The ids of a prompt that a chat template has written: bos once, and no eos behind it."""
    ids = tokenizer.encode(rendered, add_special=False, parse_special=True)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


class StreamDecoder:
    """Tokens to text as they come: a character is given out when its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """What can be shown after one more token."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, special=self._special))

    def finish(self) -> str:
        """What is left: U+FFFD for a character whose end never came."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(text: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in text])
    except KeyError:
        return _utf8(text)


def _utf8(text: str) -> bytes:
    """The bytes of a token; what was not UTF-8 in the file comes back as it was."""
    return text.encode("utf-8", "surrogateescape")
