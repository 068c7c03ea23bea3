"""The front matter of a checkpoint's README.md: licence, languages, tags, base models.

It is YAML between two lines of `---`. Only what model cards use is read, texts and lists of texts
at the top level; anything else in it is passed over.
"""

import os
import stat
from pathlib import Path

from gguf_tools.naming import title
from gguf_tools.values import Array, MetadataValue, Value

MAX_CARD = 1 << 20  # bytes of README.md that are looked at
MAX_ITEMS = 1000
LISTS = (("general.tags", ("tags", "pipeline_tag")), ("general.languages", ("language",)))
TEXTS = (
    ("general.license", "license"),
    ("general.license.name", "license_name"),
    ("general.license.link", "license_link"),
)


def read_card(folder: Path) -> dict[str, list[str]]:
    """The texts under each key; nothing without a README or without front matter."""
    path = folder / "README.md"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return {}
        with open(path, "rb") as file:
            lines = file.read(MAX_CARD).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}  # a card is a courtesy: a model without one converts as well
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    card: dict[str, list[str]] = {}
    key = ""
    for line in lines[1 : lines.index("---", 1)]:
        item = line.strip()
        if item.startswith("- ") and key:
            if len(card[key]) < MAX_ITEMS:
                card[key].append(_unquote(item[2:]))
            continue
        name, colon, text = line.partition(":")
        if not colon or line[0] in " \t#":
            key = "" if line[:1] not in (" ", "\t") else key
            continue
        key, text = name.strip(), text.strip()
        if text.startswith("[") and text.endswith("]"):
            card[key] = [_unquote(part) for part in text[1:-1].split(",") if part.strip()]
        else:
            card[key] = [_unquote(text)] if text and text[0] not in "|>&*{!" else []
    return {name: [text for text in texts if text] for name, texts in card.items()}


def card_metadata(card: dict[str, list[str]]) -> dict[str, MetadataValue]:
    """general.* keys, as llama.cpp's converter writes them."""
    entries: dict[str, MetadataValue] = {}
    for key, name in TEXTS:
        if card.get(name):
            entries[key] = Value("str", ",".join(card[name]))
    bases = card.get("base_model", [])
    if bases:
        entries["general.base_model.count"] = Value("u32", len(bases))
    for i, base in enumerate(bases):
        organisation, slash, name = base.rpartition("/")
        entries[f"general.base_model.{i}.name"] = Value("str", title(name))
        if slash and "/" not in organisation:
            key = f"general.base_model.{i}"
            entries[f"{key}.organization"] = Value("str", title(organisation))
            entries[f"{key}.repo_url"] = Value("str", f"https://huggingface.co/{base}")
    for key, names in LISTS:
        texts = [text for name in names for text in card.get(name, [])]
        if texts:
            entries[key] = Array("str", texts)
    return entries


def _unquote(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] in "'\"":
        end = text.find(text[0], 1)
        return text[1:end] if end > 0 else text[1:]
    return text.partition(" #")[0].strip()
