"""WordPiece, the tokenizer of BERT, in `tokenizers`.

GGUF writes the start of a word with a U+2581 before it and the parts that follow as they are; the
library wants the reverse, a mark before the parts that follow. Text is cleaned, cut and lowercased
by its BertNormalizer and BertPreTokenizer.
"""

from typing import Any

from gguf_tools.encoders.vocabulary import Vocabulary, is_utf8
from gguf_tools.errors import FormatError
from gguf_tools.token_types import NORMAL, SPACE, USER_DEFINED

LONGEST_WORD = 100  # characters; longer ones are the unknown token, as in BERT's own tokenizer

# Characters that Unicode keeps for programs; the normalizer takes them out of every text.
_INSIDE, _UNKNOWN = "\ufdd1", "\ufdd1unknown"


class WordEncoder:
    """The longest known start of each word, then the longest known part of its rest, and so on."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import WordPiece

        unknown = vocabulary.ids.get("unknown")
        if unknown is None:
            raise FormatError(
                "the file's tokenizer is incomplete: tokenizer.ggml.unknown_token_id is missing"
            )
        parts = {_UNKNOWN: unknown}
        for i, (text, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True)
        ):
            if kind in (NORMAL, USER_DEFINED) and is_utf8(text):
                parts.setdefault(text[1:] if text[:1] == SPACE else _INSIDE + text, i)
        self._tokenizer: Any = Tokenizer(
            WordPiece(
                parts,
                unk_token=_UNKNOWN,
                continuing_subword_prefix=_INSIDE,
                max_input_chars_per_word=LONGEST_WORD,
            )
        )
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=vocabulary.strip_accents,
            lowercase=vocabulary.lowercase,
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
