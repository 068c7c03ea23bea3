"""Small tokenizers, trained on the spot, in the forms that checkpoints carry."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from gguf_tools.pretokenizers import SPLITS
from gguf_tools.values import Array
from gguf_tools.vocab import Vocab, read_vocab
from gguf_tools.vocab.corpus import TEST_TEXTS

STORY = (
    "Once upon a time, there was a little girl named Lily. She liked to play outside in the park.",
    "One day she saw a big, red ball! \"Can I play with it?\" It's 10 or 12345 steps away.",
    "def add(a, b):\n    return a + b  # the sum of 1, 22 and 333",
)  # fmt: skip
TEXTS = (*STORY * 8, *TEST_TEXTS)
SPACE = "\u2581"


def byte_level(split: str = "gpt-2", *, vocab_size: int = 420, **changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json with the pre-tokenizer of a known split."""
    tokenizer = Tokenizer(models.BPE())
    cuts: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS[split]]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(TEXTS, _trainer(vocab_size, specials, byte_alphabet=True))
    return {**json.loads(tokenizer.to_str()), **changes}


def byte_fallback(*, vocab_size: int = 700) -> dict[str, Any]:
    """A tokenizer.json like those converted from SentencePiece models."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(STORY * 8, _trainer(vocab_size, specials))
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are no added tokens
    return dict(data)


def add_token(
    data: dict[str, Any], text: str, *, special: bool, lstrip: bool = False, rstrip: bool = False
) -> int:
    """Add a token behind all others; its id."""
    tokenizer = Tokenizer.from_str(json.dumps(data))
    token = AddedToken(text, special=special, normalized=False, lstrip=lstrip, rstrip=rstrip)
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    data.update(json.loads(tokenizer.to_str()))
    return int(tokenizer.token_to_id(text))


def sentencepiece_model(**options: Any) -> bytes:
    """A `tokenizer.model`."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line]),
        model_writer=model,
        **{**settings, **options},
    )
    return model.getvalue()


def write_folder(folder: Path, **files: Any) -> Path:
    """A folder of tokenizer files; a double underscore in a name is its dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def n_tokens(data: dict[str, Any]) -> int:
    """Tokens of a tokenizer.json, added ones included."""
    ids = [*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])]
    return max(ids) + 1


def vocab_of(data: dict[str, Any], folder: Path, **files: Any) -> Vocab:
    """What is read from a folder with this tokenizer.json."""
    write_folder(folder, tokenizer__json=data, **files)
    return read_vocab(folder, {}, n_vocab=n_tokens(data))


def as_read(vocab: Vocab) -> dict[str, Any]:
    """The metadata as a reader of the file gives it."""
    dtypes = {"f32": np.float32, "i32": np.int32, "u8": np.uint8}
    values: dict[str, Any] = {}
    for key, entry in vocab.metadata.items():
        if not isinstance(entry, Array):
            values[key] = entry.value
        elif entry.type == "str":
            values[key] = list(entry.values)
        else:
            values[key] = np.asarray(entry.values, dtypes[entry.type])
    return values


def _trainer(vocab_size: int, specials: list[str], *, byte_alphabet: bool = False) -> BpeTrainer:
    return BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_alphabet else [],
    )
