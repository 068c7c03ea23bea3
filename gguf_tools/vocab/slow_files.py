"""vocab.json and merges.txt: a byte-level BPE as it was kept before tokenizer.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_tools.errors import UnsupportedModelError, printable
from gguf_tools.pretokenizers import SPLITS
from gguf_tools.vocab.files import read_json, read_text

VOCAB_NAME, MERGES_NAME = "vocab.json", "merges.txt"
CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}  # and the split each stands for


def read_slow_files(folder: Path, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What tokenizer.json would hold, or None when the files are not there.

    The cutting of words is in no file: it is a matter of the class that the config names.
    """
    vocab, merges = read_json(folder, VOCAB_NAME), read_text(folder, MERGES_NAME)
    if vocab is None or merges is None:
        return None
    name = str((config or {}).get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    split = CLASSES.get(name)
    if split is None:
        raise UnsupportedModelError(
            f"{VOCAB_NAME} and {MERGES_NAME} of a '{printable(name, 40)}': without tokenizer.json "
            f"only those of {', '.join(CLASSES)} are known; save the tokenizer with transformers"
        )
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[split]
    ]
    switches = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps.append({"type": "ByteLevel", **switches})
    lines = (line for line in merges.splitlines() if line and not line.startswith("#version"))
    return {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocab, "merges": list(lines)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
