"""BPE by a list of merges, over GPT-2's byte alphabet or over plain text, in `tokenizers`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gguf_tools.encoders.vocabulary import Vocabulary, is_utf8
from gguf_tools.errors import FormatError, printable
from gguf_tools.token_types import BYTE, NORMAL, SPACE, USER_DEFINED


class MergeEncoder:
    """BPE by merges."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

        pre = vocabulary.pre
        usable = np.flatnonzero(np.isin(vocabulary.types, (NORMAL, USER_DEFINED, BYTE)))
        texts = vocabulary.tokens
        # Of several tokens with one text the first counts: it is put in last.
        tokens = {texts[i]: i for i in reversed(usable.tolist())}
        if not is_utf8("".join(tokens)):
            tokens = {text: i for text, i in tokens.items() if is_utf8(text)}
        options = {"ignore_merges": pre.ignore_merges, "byte_fallback": pre.raw_bytes}
        self._tokenizer: Any = Tokenizer(_bpe(tokens, vocabulary.merges, options))
        cuts: list[Any] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        if pre.raw_bytes:
            self._tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        else:
            cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
            if vocabulary.nfc:
                self._tokenizer.normalizer = normalizers.NFC()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)

    def encode(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _bpe(tokens: dict[str, int], merges: Sequence[str], options: dict[str, bool]) -> Any:
    from tokenizers.models import BPE

    # The first space is part of the first token when the merge begins with it.
    at = [merge.find(" ", 1) for merge in merges]
    if min(at, default=0) < 0:
        rank = next(rank for rank, place in enumerate(at) if place < 0)
        raise FormatError(
            f"tokenizer.ggml.merges: entry {rank:,} is not two tokens but "
            f"'{printable(merges[rank], 40)}'"
        )
    pairs = [(merge[:i], merge[i + 1 :]) for merge, i in zip(merges, at, strict=True)]
    longest = max(map(_n_bytes, tokens), default=0)
    if max(map(_n_bytes, merges), default=0) - 1 > longest:  # the library would panic
        pairs = _possible(pairs, tokens)
    try:
        return BPE(tokens, pairs, **options)
    except Exception:  # the library has no kind of its own for a merge of unknown tokens
        return BPE(tokens, _possible(pairs, tokens), **options)


def _possible(pairs: list[tuple[str, str]], tokens: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of tokens that are in the vocabulary; others could never be used."""
    return [(a, b) for a, b in pairs if a in tokens and b in tokens and a + b in tokens]


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
