"""The token lists of the three kinds of tokenizer, before special ids and templates.

- `tokenizer.model`, SentencePiece's own file: pieces and scores as they are.
- tokenizer.json with byte-level BPE: the vocabulary and the merges.
- tokenizer.json with byte fallback (a SentencePiece model converted to BPE): GGUF keeps no merges
  for it, only scores, and merges the pair whose result scores highest. The score of a token is
  therefore minus the rank of the first merge that makes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf_tools.errors import CheckpointError, UnsupportedModelError, printable
from gguf_tools.token_types import (
    ADDED_SCORE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from gguf_tools.vocab.sentencepiece_model import SentencePieceModel
from gguf_tools.vocab.table import AddedToken, TokenTable, check_id, is_byte_token, looks_special
from gguf_tools.vocab.tokenizer_json import KINDS, NAME, TokenizerJson

LARGEST_OVERHANG = 1.1  # ids of the vocabulary to rows of the embedding


@dataclass
class Pieces:
    """What is known of a tokenizer after its main file has been read."""

    model: str  # tokenizer.ggml.model
    table: TokenTable
    names: dict[str, int]  # the tokens' texts in the source -> id
    merges: list[str] = field(default_factory=list)
    add_space_prefix: bool | None = None
    prefix_first_only: bool = False  # that prefix stands before a text, not after its tokens
    prefix_unless_space: bool = False  # and not before a text that begins with a space
    remove_extra_whitespaces: bool = False
    nfc: bool | None = None  # text is composed first, or is not, unlike the name of `pre` says
    charsmap: bytes = b""
    from_json: bool = True
    warnings: list[str] = field(default_factory=list)


def sentencepiece_pieces(model: SentencePieceModel, n_vocab: int, name: str) -> Pieces:
    """The pieces of a `tokenizer.model`."""
    kind = {"bpe": "llama", "unigram": "t5"}.get(model.model_type)
    if kind is None:
        raise UnsupportedModelError(
            f"{name}: a SentencePiece model of the type '{model.model_type}'; known are 'bpe' and "
            "'unigram'"
        )
    table = TokenTable()
    for token_id, piece in enumerate(model.pieces[:n_vocab]):
        # A user-defined piece is looked for in the text as typed, where spaces are spaces.
        text = piece.text.replace(SPACE, " ") if piece.kind == USER_DEFINED else piece.text
        table.put(token_id, text, piece.score, piece.kind)
    pieces = Pieces(
        kind,
        table,
        {piece.text: i for i, piece in enumerate(model.pieces[:n_vocab])},
        add_space_prefix=model.add_dummy_prefix,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
        charsmap=model.charsmap,
        from_json=False,
    )
    _check_fits(pieces, len(model.pieces) - 1, n_vocab, name)
    if len(pieces.names) != len(table.texts):
        raise CheckpointError(f"{name}: two of its pieces have the same text")
    if model.charsmap and kind == "llama":
        pieces.warnings.append(
            f"{name} replaces full-width, compatibility and other characters by a table of its "
            "own; it is written to the file, but llama.cpp does not look for it there"
        )
    if model.whitespace_suffix:
        pieces.warnings.append(
            f"{name} puts the space after a word; GGUF can only say before: expect other tokens"
        )
    return pieces


def byte_level_pieces(source: TokenizerJson, n_vocab: int) -> Pieces:
    """A byte-level BPE; token strings stay in GPT-2's byte alphabet."""
    table = TokenTable()
    names = dict(source.vocab)
    if max(names.values()) >= n_vocab:
        names = {text: token_id for text, token_id in names.items() if token_id < n_vocab}
    table.put_all(dict(zip(names.values(), names, strict=True)), 0.0, NORMAL)
    pairs = source.merges
    if len(names) < len(source.vocab):
        pairs = [(a, b) for a, b in pairs if a in names and b in names and a + b in names]
    if any(" " in text for text in names):  # not possible in the byte alphabet
        pairs = [(_no_space(left), _no_space(right)) for left, right in pairs]
    merges = list(map(" ".join, pairs))
    pieces = Pieces("gpt2", table, names, merges)
    _check_fits(pieces, max(source.vocab.values()), n_vocab, NAME)
    return pieces


def byte_fallback_pieces(source: TokenizerJson, n_vocab: int) -> Pieces:
    """A BPE over visible spaces with `<0x0A>` tokens for bytes: SentencePiece in JSON."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(source.merges):
        ranks.setdefault(left + right, rank)
    unmerged = -float(len(source.merges))
    table = TokenTable()
    names = {text: token_id for text, token_id in source.vocab.items() if token_id < n_vocab}
    for text, token_id in names.items():
        if source.byte_fallback and is_byte_token(text):
            table.put(token_id, text, 0.0, BYTE)
        elif text == source.unknown:
            table.put(token_id, text, 0.0, UNKNOWN)
        else:
            score = -float(ranks[text]) if text in ranks else unmerged
            table.put(token_id, text, score, NORMAL)
    pieces = Pieces("llama", table, names, add_space_prefix=False)
    _check_fits(pieces, max(source.vocab.values()), n_vocab, NAME)
    _space_rules(source, pieces)
    return pieces


def add_tokens(pieces: Pieces, added: list[AddedToken], n_vocab: int) -> None:
    """Enter the added tokens: control if special, else matched in text before anything else.

    A text that is in the vocabulary keeps its id there, as in the tokenizers library.
    """
    dropped, renamed = [], []
    for token in added:
        token_id = pieces.names.get(token.text, token.id)
        if token_id >= n_vocab:
            dropped.append(token.text)
            continue
        known = pieces.table.texts.get(token_id)
        if known is not None and token.text not in pieces.names:
            if token.source == NAME or token_id in pieces.table.added:
                raise CheckpointError(
                    f"{token.source}: the id {token_id:,} of the added token "
                    f"'{printable(token.text, 40)}' already belongs to '{printable(known, 40)}'"
                )
            pieces.names.pop(known, None)
            renamed.append(f"'{printable(known, 40)}' is '{printable(token.text, 40)}'")
        _enter(pieces, token, token_id)
    if renamed:
        pieces.warnings.append(
            f"tokenizer_config.json renames {len(renamed):,} tokens (the first: {renamed[0]})"
        )
    if dropped:
        pieces.warnings.append(
            f"{len(dropped):,} added tokens have no row in the embedding and were left out "
            f"(the first is '{printable(dropped[0], 40)}')"
        )


def _enter(pieces: Pieces, token: AddedToken, token_id: int) -> None:
    kind, text = USER_DEFINED, token.text
    if pieces.table.types.get(token_id) == UNKNOWN:
        kind = UNKNOWN
    elif token.special or looks_special(text):
        kind = CONTROL
    else:
        text = text.replace(SPACE, " ")  # matched in the text as typed
    score = 0.0 if pieces.model == "gpt2" else ADDED_SCORE
    if token_id in pieces.table.texts and kind == UNKNOWN:
        score = pieces.table.scores[token_id]
    pieces.table.put(token_id, text, score, kind)
    pieces.table.added.add(token_id)
    if token.lstrip:
        pieces.table.lstrip.add(token_id)
    if token.rstrip:
        pieces.table.rstrip.add(token_id)
    pieces.names[token.text] = token_id


def mark_control(pieces: Pieces, texts: set[str]) -> None:
    """Tokens that a configuration names as special are control tokens wherever they stand."""
    for text in texts:
        token_id = pieces.names.get(text)
        if token_id is not None and pieces.table.types[token_id] in (NORMAL, USER_DEFINED, UNUSED):
            pieces.table.types[token_id] = CONTROL
            pieces.table.texts[token_id] = text


def note_metaspace(source: TokenizerJson, pieces: Pieces) -> None:
    """`Metaspace` is sparing with the space before a text, in ways SentencePiece is not."""
    for step in source.pre_tokenizer:
        if step["type"] == "Metaspace":
            pieces.prefix_first_only = step.get("prepend_scheme") == "first"
            pieces.prefix_unless_space = True


def read_slow_added_tokens(data: Mapping[str, Any] | None, name: str) -> list[AddedToken]:
    """`added_tokens.json` of the older tokenizers: text -> id."""
    tokens = []
    for text, token_id in (data or {}).items():
        check_id(token_id, text, name)
        if text:
            tokens.append(AddedToken(token_id, text, False, name))
    return tokens


def _check_fits(pieces: Pieces, last: int, n_vocab: int, name: str) -> None:
    """A few tokens without a row in the embedding can be left out; many mean another model's."""
    if last < n_vocab:
        return
    what = f"{name} has tokens up to id {last:,} but the embedding has {n_vocab:,} rows"
    if last >= n_vocab * LARGEST_OVERHANG:
        raise CheckpointError(f"{what}: they cannot belong together")
    pieces.warnings.append(f"{what}; the tokens beyond were left out")


def _no_space(text: str) -> str:
    """A token in a merge, whose own spaces are escaped."""
    return text.replace(" ", chr(ord(" ") + 256))


def _space_rules(source: TokenizerJson, pieces: Pieces) -> None:
    """Find how spaces are written, and say what else is done to the text that GGUF cannot hold."""
    visible = False
    for step in source.normalizer:
        kind = step["type"]
        if kind == "Prepend" and step.get("prepend") == SPACE:
            pieces.add_space_prefix = True
        elif kind == "Replace" and step.get("content") == SPACE and _pattern(step) == " ":
            visible = True
        else:
            pieces.warnings.append(
                f"{NAME}: the normalizer '{printable(kind, 40)}' has no form in GGUF: text that it "
                "changes will be tokenized differently"
            )
    for step in source.pre_tokenizer:
        kind = step["type"]
        if kind == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            visible = True
            scheme = step.get("prepend_scheme", "always")
            pieces.add_space_prefix = (
                scheme != "never" and step.get("add_prefix_space") is not False
            )
        elif not (kind == "Split" and _pattern(step) == " "):
            raise UnsupportedModelError(
                f"{NAME}: BPE with the pre-tokenizer '{printable(kind, 40)}'; known are {KINDS}"
            )
    note_metaspace(source, pieces)
    if not visible:
        raise UnsupportedModelError(
            f"{NAME}: BPE that neither is byte-level nor writes spaces as U+2581; known are {KINDS}"
        )


def _pattern(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern")
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    return text if isinstance(text, str) else None
