"""The tokenizer files of a checkpoint folder, as the metadata that GGUF keeps of them.

Tried in the order of llama.cpp's converter: `tokenizer.model`, then tokenizer.json. What the files
say about special tokens, templates and sampling is gathered from wherever they say it.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.errors import CheckpointError, UnsupportedModelError, printable
from gguf_tools.pretokenizers import PRETOKENIZERS
from gguf_tools.token_types import CONTROL, UNKNOWN
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.vocab.files import read_bytes, read_json
from gguf_tools.vocab.pieces import (
    Pieces,
    add_tokens,
    byte_fallback_pieces,
    byte_level_pieces,
    mark_control,
    note_metaspace,
    read_slow_added_tokens,
    sentencepiece_pieces,
)
from gguf_tools.vocab.presplit import find_pre, splits_to_try, uses_nfc
from gguf_tools.vocab.sentencepiece_model import parse_model
from gguf_tools.vocab.settings import added_ends, chat_templates, sampling_defaults
from gguf_tools.vocab.slow_files import read_slow_files
from gguf_tools.vocab.special import KEYS, find_special, special_texts
from gguf_tools.vocab.table import AddedToken, check_unique, read_added_tokens
from gguf_tools.vocab.tokenizer_json import NAME as JSON_NAME
from gguf_tools.vocab.tokenizer_json import TokenizerJson, parse_tokenizer
from gguf_tools.vocab.trial import Encodings, RunningTrial

__all__ = ["Vocab", "begin_trial", "read_vocab"]

MODEL_NAME = "tokenizer.model"
CONFIG_NAME = "tokenizer_config.json"
MAP_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
GENERATION_NAME = "generation_config.json"

BYTE_LEVEL = b'"ByteLevel"'  # is in any tokenizer.json that has to be tried out

PREFIX = "tokenizer.ggml."


@dataclass(frozen=True)
class Vocab:
    """What a checkpoint says about text, ready to be written."""

    metadata: dict[str, MetadataValue]  # every tokenizer.* key, in order
    sampling: dict[str, MetadataValue]  # general.sampling.*
    warnings: tuple[str, ...]
    encodings: Encodings | None = None  # of the test texts, where they came up


def begin_trial(folder: Path) -> AbstractContextManager[RunningTrial | None]:
    """Begin to try out the folder's tokenizer.json, which takes a while, for `read_vocab`.

    Nothing is begun where that will not ask for it.
    """
    model, data = (read_bytes(folder, name) for name in (MODEL_NAME, JSON_NAME))
    if data is None or BYTE_LEVEL not in data or _comes_first(model, data):
        return nullcontext()
    return RunningTrial(folder / JSON_NAME)


def read_vocab(
    folder: Path,
    config: Mapping[str, Any],
    *,
    n_vocab: int,
    trial: RunningTrial | None = None,
) -> Vocab:
    """The vocabulary of a checkpoint; `n_vocab` is the number of rows of its embedding.

    Of a tokenizer.json that is being tried out already, `trial` is that.
    """
    with begin_trial(folder) if trial is None else trial as running:
        return _read_vocab(folder, config, n_vocab, running)


def _read_vocab(
    folder: Path, config: Mapping[str, Any], n_vocab: int, trial: RunningTrial | None
) -> Vocab:
    tokenizer_config = read_json(folder, CONFIG_NAME)
    special_map = read_json(folder, MAP_NAME)
    generation = read_json(folder, GENERATION_NAME)
    data = read_json(folder, JSON_NAME)
    source, pieces, pre, encodings = _main_file(folder, data, tokenizer_config, n_vocab, trial)
    warnings = pieces.warnings

    add_tokens(pieces, _added_tokens(folder, source, tokenizer_config, pieces), n_vocab)
    mark_control(pieces, special_texts(tokenizer_config, special_map))
    check_unique(pieces.table, "the tokenizer")
    texts, scores, types = pieces.table.filled(n_vocab)

    special = find_special(
        pieces.names,
        (tokenizer_config, special_map),
        {"config.json": config, GENERATION_NAME: generation},
        control={text: i for text, i in pieces.names.items() if types[i] in (UNKNOWN, CONTROL)},
        n_vocab=n_vocab,
    )
    steps = source.post_processor if source is not None else []
    ends = added_ends(steps, tokenizer_config, special, pieces.names)
    if "eos" not in special.ids:
        special.warnings.append(
            "no file of the tokenizer names the token that ends a text: answers will only end at "
            "their longest"
        )
    elif pieces.model == "gpt2":
        special.ids.setdefault("bos", special.ids["eos"])  # or llama.cpp would take the id 11
    templates, template_warnings = chat_templates(folder, tokenizer_config)
    sampling, sampling_warnings = sampling_defaults(generation)

    metadata: dict[str, MetadataValue] = {
        PREFIX + "model": Value("str", pieces.model),
        PREFIX + "pre": Value("str", pre),
        PREFIX + "tokens": Array("str", texts),
    }
    if pieces.model != "gpt2":
        metadata[PREFIX + "scores"] = Array("f32", scores)
    metadata[PREFIX + "token_type"] = Array("i32", types)
    if pieces.model == "gpt2":
        metadata[PREFIX + "merges"] = Array("str", pieces.merges)
    for role, key in KEYS.items():
        if role in special.ids:
            metadata[PREFIX + key] = Value("u32", special.ids[role])
    metadata.update(_switches(pieces, ends, special.ids, tokenizer_config))
    metadata.update(templates)
    warnings += [*special.warnings, *template_warnings, *sampling_warnings]
    return Vocab(metadata, dict(sampling), tuple(warnings), encodings)


def _main_file(
    folder: Path,
    data: dict[str, Any] | None,
    config: Mapping[str, Any] | None,
    n_vocab: int,
    running: RunningTrial | None,
) -> tuple[TokenizerJson | None, Pieces, str, Encodings | None]:
    """The file that holds the vocabulary, its tokens, the value of `pre`, and what it encodes."""
    model = read_bytes(folder, MODEL_NAME)
    if model is not None and _comes_first(model, data):
        pieces = sentencepiece_pieces(parse_model(model, MODEL_NAME), n_vocab, MODEL_NAME)
        return _parse_beside(data, pieces), pieces, "default", None
    is_json = data is not None
    if data is None:
        data = read_slow_files(folder, config)
    if data is None:
        found = ", ".join(sorted(p.name for p in folder.glob("*token*"))[:8]) or "none"
        raise CheckpointError(
            f"{printable(folder)}: no tokenizer: expected {MODEL_NAME} or {JSON_NAME}, found "
            f"{printable(found)}"
        )
    source = parse_tokenizer(data)
    if source.byte_level:
        if running is not None:
            running.ask(splits_to_try(source))
        pieces = byte_level_pieces(source, n_vocab)
        trial = running.result() if running is not None else None
        pre, warnings = find_pre(source, trial, tried=running is not None)
        pieces.warnings += warnings
        if is_json and uses_nfc(source) != PRETOKENIZERS[pre].nfc:
            pieces.nfc = uses_nfc(source)
        return source, pieces, pre, Encodings(JSON_NAME, trial.ids) if trial is not None else None
    return source, byte_fallback_pieces(source, n_vocab), "default", None


def _parse_beside(data: dict[str, Any] | None, pieces: Pieces) -> TokenizerJson | None:
    """tokenizer.json beside a tokenizer.model: only its added tokens and its post-processor count.

    Where it cannot be read as a BPE the model file is enough.
    """
    if data is None:
        return None
    try:
        source = parse_tokenizer(data)
        note_metaspace(source, pieces)
        return source
    except (CheckpointError, UnsupportedModelError) as error:
        pieces.warnings.append(f"{JSON_NAME} was not used beside {MODEL_NAME}: {error}")
        return None


def _added_tokens(
    folder: Path, source: TokenizerJson | None, config: Mapping[str, Any] | None, pieces: Pieces
) -> list[AddedToken]:
    """Added tokens from every file, one per text; tokenizer_config.json has the last word."""
    tokens = read_slow_added_tokens(read_json(folder, ADDED_NAME), ADDED_NAME)
    if source is not None:
        tokens += source.added if pieces.from_json else _agreeing(source, pieces)
    tokens += read_added_tokens((config or {}).get("added_tokens_decoder"), CONFIG_NAME)
    merged: dict[str, AddedToken] = {}
    for token in tokens:
        before = merged.get(token.text)
        if before is not None and before.source != ADDED_NAME:
            token = replace(token, id=before.id, source=before.source)
        merged[token.text] = token
    return sorted(merged.values(), key=lambda token: token.id)


def _agreeing(source: TokenizerJson, pieces: Pieces) -> list[AddedToken]:
    """The added tokens of tokenizer.json that don't contradict the tokenizer.model beside it."""
    texts = pieces.table.texts
    agreeing = [token for token in source.added if texts.get(token.id, token.text) == token.text]
    n_others = len(source.added) - len(agreeing)
    if n_others:
        pieces.warnings.append(
            f"{JSON_NAME} and {MODEL_NAME} give {n_others:,} ids to different tokens; "
            f"{MODEL_NAME} is used"
        )
    return agreeing


def _switches(
    pieces: Pieces, ends: dict[str, bool], ids: dict[str, int], config: Mapping[str, Any] | None
) -> dict[str, MetadataValue]:
    """Whether bos, eos and a first space are added; always written, for defaults differ."""
    switches: dict[str, MetadataValue] = {}
    for role, default in (("bos", pieces.model == "llama"), ("eos", False)):
        value = ends.get(role, default) and role in ids
        switches[f"{PREFIX}add_{role}_token"] = Value("bool", value)
    prefix = pieces.add_space_prefix
    configured = (config or {}).get("add_prefix_space")
    if isinstance(configured, bool) and (prefix is None or not pieces.from_json):
        prefix = configured  # tokenizer.json says itself what it does
    if prefix is not None:
        switches[PREFIX + "add_space_prefix"] = Value("bool", prefix)
    # Rules of our own, which llama.cpp passes over.
    if prefix and pieces.prefix_first_only:
        switches[PREFIX + "space_prefix_first_only"] = Value("bool", True)
    if prefix and pieces.prefix_unless_space:
        switches[PREFIX + "space_prefix_unless_space"] = Value("bool", True)
    for side, stripping in (("lstrip", pieces.table.lstrip), ("rstrip", pieces.table.rstrip)):
        if stripping:
            switches[f"{PREFIX}{side}_token_ids"] = Array("i32", sorted(stripping))
    if pieces.nfc is not None:
        switches[PREFIX + "normalizer.nfc"] = Value("bool", pieces.nfc)
    if pieces.remove_extra_whitespaces:
        switches[PREFIX + "remove_extra_whitespaces"] = Value("bool", True)
    if pieces.charsmap:
        table = np.frombuffer(pieces.charsmap, np.uint8)
        switches[PREFIX + "precompiled_charsmap"] = Array("u8", table)
    return switches


def _comes_first(model: bytes | None, data: object | None) -> bool:
    """Whether the vocabulary is that of tokenizer.model; `data` is what tokenizer.json holds.

    A `tokenizer.model` may be a list of base64 tokens and ranks, not SentencePiece.
    """
    if model is None or data is None:
        return model is not None
    first = model[:200].split(b"\n", 1)[0].split(b" ")
    return not (len(first) == 2 and first[1].strip().isdigit() and len(first[0]) % 4 == 0)
