"""Chat template, sampling defaults, and whether bos and eos are added: a checkpoint's manners."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_tools.errors import CheckpointError, printable
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.vocab.files import read_json, read_text
from gguf_tools.vocab.special import SpecialTokens, token_text
from gguf_tools.vocab.table import check_text

MAX_TEMPLATES = 64

# generation_config.json -> (key of general.sampling, type, smallest, largest)
SAMPLING = {
    "temperature": ("temp", "f32", 0.0, 100.0),
    "top_k": ("top_k", "i32", 0, 2**31 - 1),
    "top_p": ("top_p", "f32", 0.0, 1.0),
    "min_p": ("min_p", "f32", 0.0, 1.0),
    "repetition_penalty": ("penalty_repeat", "f32", 0.01, 100.0),
    "penalty_repeat": ("penalty_repeat", "f32", 0.01, 100.0),
    "penalty_last_n": ("penalty_last_n", "i32", -1, 2**31 - 1),
    "xtc_probability": ("xtc_probability", "f32", 0.0, 1.0),
    "xtc_threshold": ("xtc_threshold", "f32", 0.0, 1.0),
}

# Classes of transformers that build their own post-processor from add_bos_token, add_eos_token.
_CONFIG_RULES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")


def sampling_defaults(config: Mapping[str, Any] | None) -> tuple[dict[str, Value], list[str]]:
    """`general.sampling.*` from generation_config.json, and warnings about what was left out."""
    found: dict[str, Value] = {}
    warnings = []
    for name, (key, kind, low, high) in SAMPLING.items():
        value = (config or {}).get(name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            warnings.append(
                f"generation_config.json: {name} {printable(value, 40)} is not a number from "
                f"{low} to {high} and was ignored"
            )
            continue
        if kind == "i32" and value != int(value):
            warnings.append(f"generation_config.json: {name} {value} is not whole and was ignored")
            continue
        found[f"general.sampling.{key}"] = Value(
            kind, int(value) if kind == "i32" else float(value)
        )
    return found, warnings


def chat_templates(
    folder: Path, config: Mapping[str, Any] | None
) -> tuple[dict[str, MetadataValue], list[str]]:
    """The `tokenizer.chat_template*` entries: tokenizer_config.json first, then template files."""
    warnings: list[str] = []
    configured = _named((config or {}).get("chat_template"), "tokenizer_config.json")
    beside, source = _template_files(folder)
    templates = configured or beside
    first, second = configured.get("default"), beside.get("default")
    if first is not None and second is not None and first.strip() != second.strip():
        warnings.append(
            f"tokenizer_config.json and {source} hold different chat templates; the one of "
            "tokenizer_config.json is used (transformers prefers the other)"
        )
    for text in templates.values():
        check_text(text, "the chat template")
    entries: dict[str, MetadataValue] = {}
    if "default" in templates:
        entries["tokenizer.chat_template"] = Value("str", templates["default"])
    others = sorted(name for name in templates if name != "default")
    for name in others:
        entries[f"tokenizer.chat_template.{name}"] = Value("str", templates[name])
    if others:
        entries["tokenizer.chat_templates"] = Array("str", others)
    return entries, warnings


def added_ends(
    post_processor: list[dict[str, Any]],
    config: Mapping[str, Any] | None,
    special: SpecialTokens,
    names: Mapping[str, int],
) -> dict[str, bool]:
    """Whether bos and eos are put around a text; absent where no file says.

    Where the post-processor adds a token that no file calls bos or eos, that token takes the role;
    the eos that it displaces still ends a turn.
    """
    asked = {
        role: config[f"add_{role}_token"]
        for role in ("bos", "eos")
        if config and isinstance(config.get(f"add_{role}_token"), bool)
    }
    done: dict[str, bool] = {}
    for step in post_processor:
        if step["type"] == "ByteLevel":
            done.setdefault("bos", False)
            done.setdefault("eos", False)
        elif step["type"] in ("RobertaProcessing", "BertProcessing"):
            done.update(bos=True, eos=True)
        elif step["type"] == "TemplateProcessing" and isinstance(step.get("single"), list):
            items = [_special_name(item) for item in step["single"]]
            first = names.get(items[0] or "") if items else None
            last = names.get(items[-1] or "") if len(items) > 1 else None
            done.update(bos=first is not None, eos=last is not None)
            if first is not None and first != special.ids.setdefault("bos", first):
                done["bos"] = first == special.ids.get("cls")
            if last is not None and last != special.ids.setdefault("eos", last):
                special.ids.setdefault("eot", special.ids["eos"])
                special.ids["eos"] = last
    config_rules = str((config or {}).get("tokenizer_class", "")).startswith(_CONFIG_RULES)
    for role in ("bos", "eos"):
        if role in asked and role in done and asked[role] != done[role]:
            winner = "tokenizer_config.json" if config_rules else "the post-processor"
            special.warnings.append(
                f"tokenizer_config.json says add_{role}_token = {str(asked[role]).lower()}, the "
                f"post-processor of tokenizer.json does the opposite: {winner} wins, as in "
                "transformers"
            )
    return {**done, **asked} if config_rules else {**asked, **done}


def _special_name(item: object) -> str | None:
    inner = item.get("SpecialToken") if isinstance(item, Mapping) else None
    text = inner.get("id") if isinstance(inner, Mapping) else None
    return text if isinstance(text, str) else None


def _template_files(folder: Path) -> tuple[dict[str, str], str]:
    text = read_text(folder, "chat_template.jinja")
    if text is not None:
        templates = {"default": text}
        extra = folder / "additional_chat_templates"
        paths = sorted(extra.glob("*.jinja")) if extra.is_dir() else []
        for path in paths[:MAX_TEMPLATES]:
            more = read_text(extra, path.name)
            if more is not None:
                templates[_plain_name(path.stem)] = more
        return templates, "chat_template.jinja"
    data = read_json(folder, "chat_template.json")
    return _named((data or {}).get("chat_template"), "chat_template.json"), "chat_template.json"


def _named(value: object, source: str) -> dict[str, str]:
    """A template, or a list of named ones, as name -> text."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list) or len(value) > MAX_TEMPLATES:
        raise CheckpointError(f"{source}: chat_template is neither a text nor a list of them")
    templates = {}
    for entry in value:
        name = token_text({"content": entry.get("name")}) if isinstance(entry, Mapping) else None
        text = entry.get("template") if isinstance(entry, Mapping) else None
        if not name or not isinstance(text, str):
            raise CheckpointError(f"{source}: a chat template without a name or a text")
        templates[_plain_name(name)] = text
    return templates


def _plain_name(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name[:64])
