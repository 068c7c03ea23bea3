"""Which tokens begin and end a text, pad it and so on, from all the files that may say so.

In order: tokenizer_config.json, special_tokens_map.json (both name tokens by their text),
config.json and generation_config.json (both by id; the end of a text may be a list there). The
first that names a known token wins. Ids that only a list holds become `eot` (end of turn) and `eom`
(end of message), so that a runtime stops at them too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf_tools.errors import printable
from gguf_tools.token_types import FILL_IN_MIDDLE

KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # as the format spells it
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot", "eom")

# Texts by which a role is found when no file names it.
USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"),
    "unk": ("<unk>",),
}

TURN_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<turn|>", "<EOT>",
    "_<EOT>", "[EOT]", "<end_of_utterance>",
)  # fmt: skip
MESSAGE_ENDS = ("<|eom_id|>", "<|eom|>")


@dataclass
class SpecialTokens:
    ids: dict[str, int] = field(default_factory=dict)  # role -> id
    warnings: list[str] = field(default_factory=list)


def special_texts(*configs: Mapping[str, Any] | None) -> set[str]:
    """The texts that tokenizer_config.json or special_tokens_map.json call special."""
    texts = set()
    for config in configs:
        for role in NAMED:
            texts.add(token_text((config or {}).get(f"{role}_token")))
        more = (config or {}).get("additional_special_tokens")
        for entry in more if isinstance(more, list) else ():
            texts.add(token_text(entry))
    return {text for text in texts if text}


def token_text(entry: object) -> str | None:
    """A token as configuration files write it: its text, or an object with a `content`."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def find_special(
    names: Mapping[str, int],
    by_text: tuple[Mapping[str, Any] | None, ...],
    by_id: Mapping[str, Mapping[str, Any] | None],
    *,
    control: Mapping[str, int],
    n_vocab: int,
) -> SpecialTokens:
    """Roles and their ids.

    `names` are all tokens, `control` those that are not text; `by_id` maps the name of a file to
    its content.
    """
    found = SpecialTokens()
    ends: list[int] = []  # every id that some file calls the end of a text
    for role in NAMED:
        for config in by_text:
            token_id = names.get(token_text((config or {}).get(f"{role}_token")) or "")
            if token_id is not None:
                found.ids.setdefault(role, token_id)
                if role == "eos":
                    ends.append(token_id)
        for source, config in by_id.items():
            ids = list(_ids(config, role, source, n_vocab, found.warnings))
            if role == "eos":
                ends += ids
            if ids:
                found.ids.setdefault(role, ids[0])
    for role, texts in USUAL.items():
        usual = [control[text] for text in texts if text in control]
        if usual:
            found.ids.setdefault(role, usual[0])
    _ends_of_turns(found, names, ends)
    for role, texts in FILL_IN_MIDDLE.items():
        known = [control[text] for text in texts if text in control]
        if known:
            found.ids.setdefault(role, known[0])
    return found


def _ids(
    config: Mapping[str, Any] | None, role: str, source: str, n_vocab: int, warnings: list[str]
) -> Iterator[int]:
    """The ids that a config gives a role, those that are no token left out with a warning."""
    key = f"{role}_token_id"
    value = (config or {}).get(key)
    if value is None:
        inner = (config or {}).get("text_config")
        value = inner.get(key) if isinstance(inner, Mapping) else None
    for entry in value if isinstance(value, list) else [value]:
        if entry is None or (role == "pad" and entry == -1):
            continue
        if type(entry) is int and 0 <= entry < n_vocab:
            yield entry
        else:
            warnings.append(
                f"{source}: {key} {printable(entry, 40)} is not the id of a token (0 to "
                f"{n_vocab - 1:,}) and was ignored"
            )


def _ends_of_turns(found: SpecialTokens, names: Mapping[str, int], ends: list[int]) -> None:
    """Give the ends other than `eos` the roles eot and eom, as far as there are roles."""
    eos = found.ids.get("eos")
    others = [i for i in dict.fromkeys(ends) if i != eos and i not in found.ids.values()]
    ends_and_eos = {*others, eos}
    texts = {token_id: text for text, token_id in names.items() if token_id in ends_and_eos}
    for role, usual in (("eom", MESSAGE_ENDS), ("eot", TURN_ENDS)):
        if role not in found.ids:
            fitting = [i for i in others if texts.get(i) in usual]
            if fitting:
                found.ids[role] = fitting[0]
                others.remove(fitting[0])
    if others and "eot" not in found.ids and eos is not None and texts.get(eos) in TURN_ENDS:
        found.ids["eot"] = eos  # the others end texts, not turns
    for role in ("eot", "eom"):
        if others and role not in found.ids:
            found.ids[role] = others.pop(0)
