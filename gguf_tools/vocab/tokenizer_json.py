"""`tokenizer.json`: the Hugging Face tokenizers file, checked and taken apart."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from operator import add
from typing import Any

from gguf_tools.errors import CheckpointError, UnsupportedModelError, printable
from gguf_tools.vocab.table import AddedToken, are_ids, check_id, read_added_tokens

NAME = "tokenizer.json"
KINDS = "SentencePiece models, byte-level BPE and BPE with byte fallback"
MAX_STEPS = 64  # of a normalizer, pre-tokenizer, decoder or post-processor

_LISTS = ("normalizers", "pretokenizers", "decoders", "processors")


@dataclass(frozen=True)
class TokenizerJson:
    """The parts of a BPE tokenizer.json; sequences are flattened."""

    vocab: Mapping[str, int]
    merge_entries: object  # as the file has them, not looked at yet
    added: list[AddedToken]
    normalizer: list[dict[str, Any]]
    pre_tokenizer: list[dict[str, Any]]
    decoder: list[dict[str, Any]]
    post_processor: list[dict[str, Any]]
    byte_fallback: bool
    ignore_merges: bool
    unknown: str | None

    @property
    def byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's byte alphabet."""
        steps = (*self.pre_tokenizer, *self.decoder)
        return not self.byte_fallback and any(step["type"] == "ByteLevel" for step in steps)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges in order; CheckpointError unless they are made of tokens."""
        return _merges(self.merge_entries, self.vocab)


def parse_tokenizer(data: Mapping[str, Any]) -> TokenizerJson:
    """The tokenizer in `data`, the whole of the JSON file."""
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{NAME}: expected a 'model', found none")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedModelError(
            f"{NAME}: the tokenizer is of the type '{printable(kind, 40)}'; known are {KINDS}"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedModelError(
                f"{NAME}: BPE with {key} '{printable(model[key], 40)}' has no form in GGUF; "
                f"known are {KINDS}"
            )
    return TokenizerJson(
        vocab=_vocab(model.get("vocab")),
        merge_entries=model.get("merges"),
        added=read_added_tokens(data.get("added_tokens"), NAME),
        normalizer=list(_steps(data, "normalizer")),
        pre_tokenizer=list(_steps(data, "pre_tokenizer")),
        decoder=list(_steps(data, "decoder")),
        post_processor=list(_steps(data, "post_processor")),
        byte_fallback=model.get("byte_fallback") is True,
        ignore_merges=model.get("ignore_merges") is True,
        unknown=model["unk_token"] if isinstance(model.get("unk_token"), str) else None,
    )


def _vocab(entries: object) -> dict[str, int]:
    if not isinstance(entries, Mapping) or not entries:
        raise CheckpointError(f"{NAME}: expected a vocabulary of tokens and ids, found none")
    if not are_ids(entries.values()):
        for text, token_id in entries.items():
            check_id(token_id, text, NAME)
    if "" in entries:
        raise CheckpointError(f"{NAME}: the token {entries['']:,} has no text")
    if len(set(entries.values())) != len(entries):
        seen: dict[int, str] = {}
        for text, token_id in entries.items():
            if token_id in seen:
                raise CheckpointError(
                    f"{NAME}: the id {token_id:,} belongs to two tokens, "
                    f"'{printable(seen[token_id], 40)}' and '{printable(text, 40)}'"
                )
            seen[token_id] = text
    return dict(entries)


def _merges(entries: object, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in order; both spellings, "a b" and ["a", "b"], are in use."""
    if not entries and isinstance(entries, list | None):
        return []
    if not isinstance(entries, list):
        raise CheckpointError(f"{NAME}: the merges are not a list")
    sides = _sides(entries)
    if sides is None:
        bad = next(rank for rank, entry in enumerate(entries) if _sides([entry]) is None)
        raise CheckpointError(
            f"{NAME}: merge {bad:,} is {printable(entries[bad], 60)}, not two tokens"
        )
    lefts, rights = sides
    made = list(map(add, lefts, rights))
    # A quarter of a million: looked at together, and one by one only to name the one at fault.
    if not all(all(map(vocab.__contains__, texts)) for texts in (lefts, rights, made)):
        each = zip(lefts, rights, made, strict=True)
        rank, missing = next(
            (rank, text) for rank, texts in enumerate(each) for text in texts if text not in vocab
        )
        raise CheckpointError(
            f"{NAME}: merge {rank:,} ('{printable(lefts[rank], 40)}' and "
            f"'{printable(rights[rank], 40)}') needs the token '{printable(missing, 40)}', which "
            "is not in the vocabulary"
        )
    return list(zip(lefts, rights, strict=True))


def _sides(entries: list[Any]) -> tuple[Sequence[str], Sequence[str]] | None:
    """The first and the second tokens of at least one entry; None unless each is two texts."""
    if set(map(type, entries)) == {str}:  # as nearly always: the quick way
        lefts, spaces, rights = zip(*map(str.partition, entries, repeat(" ")), strict=True)
        is_right = set(spaces) == {" "} and " " not in "".join(rights)
        return (lefts, rights) if is_right else None
    pairs = [entry.split(" ") if isinstance(entry, str) else entry for entry in entries]
    if set(map(type, pairs)) != {list} or set(map(len, pairs)) != {2}:
        return None
    lefts, rights = zip(*pairs, strict=True)
    return (lefts, rights) if set(map(type, lefts + rights)) == {str} else None


def _steps(data: Mapping[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """The steps of a part in order, sequences within sequences flattened."""
    waiting = [data.get(part)]
    count = 0
    while waiting:
        step = waiting.pop()
        if step is None:
            continue
        count += 1
        if count > MAX_STEPS:
            raise CheckpointError(f"{NAME}: the {part} has more than {MAX_STEPS} steps")
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise CheckpointError(f"{NAME}: the {part} has a step without a type")
        if step["type"] != "Sequence":
            yield step
            continue
        inner = next((step[name] for name in _LISTS if name in step), None)
        if not isinstance(inner, list):
            raise CheckpointError(f"{NAME}: the {part} has a sequence without steps")
        waiting.extend(reversed(inner))
