"""Finding added tokens in a text before an encoder sees it."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from gguf_tools.encoders.vocabulary import is_utf8


class Matcher:
    """Finds the leftmost, longest occurrences of a set of tokens.

    Those in `lstrip` and `rstrip` take the white space before or behind them with them.
    """

    def __init__(
        self,
        texts: Sequence[str],
        ids: Sequence[int],
        *,
        lstrip: Collection[int] = (),
        rstrip: Collection[int] = (),
    ) -> None:
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import BPE

        self._matcher: Any = None
        known = {text: i for text, i in zip(texts, ids, strict=True) if text and is_utf8(text)}
        if known:
            # A tokenizer with no vocabulary but the added tokens: what they don't match, it drops.
            self._matcher = Tokenizer(BPE({}, []))
            self._matcher.add_tokens(
                [
                    AddedToken(text, normalized=False, lstrip=i in lstrip, rstrip=i in rstrip)
                    for text, i in known.items()
                ]
            )
            self._ids = {self._matcher.token_to_id(text): i for text, i in known.items()}

    def split(self, text: str) -> Iterator[str | int]:
        """Stretches of text, and the ids of the tokens between them."""
        start = 0
        if self._matcher is not None:
            found = self._matcher.encode(text, add_special_tokens=False)
            for token_id, (begin, end) in zip(found.ids, found.offsets, strict=True):
                if begin > start:
                    yield text[start:begin]
                yield self._ids[token_id]
                start = end
        if start < len(text):
            yield text[start:]
