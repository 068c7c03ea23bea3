"""LoRA adapters, as PEFT saves them: read, checked and taken apart.

For each module that it changes an adapter holds two thin matrices, A (r, inputs) and B
(outputs, r):

    W + scale * alpha / r * B @ A        with rslora: alpha / sqrt(r)

(Hu et al. 2021, arXiv:2106.09685; PEFT's tuners/lora/layer.py).
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.archs.config import HFConfig
from gguf_tools.checkpoint import listing
from gguf_tools.errors import CheckpointError, printable
from gguf_tools.json_files import read_json, shown
from gguf_tools.safetensors_file import READABLE, Floats, LazyTensor, open_tensors, unreadable

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"

MAX_RANK = 1 << 14
MAX_ALPHA = 1e9
MAX_PATTERNS = 10_000
MAX_PATTERN = 300  # characters

# Options that make of an adapter more than B @ A, and the words for them.
BEYOND = {
    "use_dora": "DoRA, which divides by the norm of whole columns",
    "use_qalora": "QALoRA",
    "lora_bias": "biases of its own beside B",
    "trainable_token_indices": "single rows of the embedding",
    "target_parameters": "parameters that are no modules (experts stacked in one tensor)",
    "layer_replication": "layers that the base does not have",
    "arrow_config": "Arrow, which chooses between adapters for each token",
    "kasa_config": "KaSA, which changes the base's weights",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "ensure_weight_tying": "an embedding and a head that stay tied",
}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # leave the base as it is

_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[\w-]+)?\.weight")
_EMBEDDING_PAIR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.[\w-]+)?")
_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.[\w-]+)?)(?=\.)")
# Regular expressions that cannot take long: no repeated groups, no look-around, two repetitions.
_SIMPLE_PATTERN = re.compile(r"\^?([\w.-]|\\[.dw]|\[[\w-]+\]|[(](?![?])|[)](?![*+?])|[|*+?])*\$?")


@dataclass(frozen=True)
class Pair:
    """The change of one matrix."""

    module: str  # as the transformers model calls it
    a: LazyTensor  # (r, inputs); of an embedding (r, tokens)
    b: LazyTensor  # (outputs, r)
    factor: float  # of B @ A: alpha / r
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def rows(self, first: int, last: int, transposed: bool) -> Floats:
        """Rows of B @ A, or of its transpose, times the factor."""
        if transposed:
            a, b = _whole(self.a)[:, first:last], _whole(self.b)
            delta = a.T @ b.T
        else:
            delta = _finite(self.b, self.b.load(first, last)) @ _whole(self.a)
        delta *= np.float32(self.factor)
        return delta


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder whose files were found to fit each other."""

    folder: Path
    base: str  # what it was trained on, if it says so
    alpha: float  # lora_alpha, before patterns
    rank_stabilised: bool
    pairs: tuple[Pair, ...]
    # Tensors that it has whole, by name: trained biases, norms, `modules_to_save`.
    whole: Mapping[str, LazyTensor]
    copies: frozenset[str]  # those of them that are a copy beside the base's own
    invocation_tokens: tuple[int, ...] = ()  # of an activated LoRA


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read configuration and header; what cannot be expressed as B @ A is refused in words."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{shown(path)}: expected the folder of a LoRA adapter")
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{shown(path)} has no {ADAPTER_CONFIG}: expected a LoRA adapter as PEFT saves it"
        )
    if not (path / ADAPTER_WEIGHTS).exists():
        pickled = (path / ADAPTER_PICKLE).exists()
        found = f"found {ADAPTER_PICKLE}, a pickle, which can run code when it is read: load it " \
            "once with PEFT and call save_pretrained(folder)"  # fmt: skip
        raise CheckpointError(
            f"{shown(path)}: expected {ADAPTER_WEIGHTS}, {found if pickled else 'found none'}"
        )
    config = HFConfig(read_json(path / ADAPTER_CONFIG), shown(path / ADAPTER_CONFIG))
    _check_kind(config)
    tensors = open_tensors(path / ADAPTER_WEIGHTS)
    halves, whole, problems = _sort(tensors)
    pairs: list[Pair] = []
    patterns = {key: _patterns(config, key) for key in ("rank_pattern", "alpha_pattern")}
    rank = config.integer("r", high=MAX_RANK, default=8)
    alpha = config.real("lora_alpha", low=0.0, high=MAX_ALPHA, default=8)
    if alpha == 0:
        raise config.refuse("lora_alpha", "a number above 0", alpha)
    stabilised = bool(config.flag("use_rslora", default=False))
    for module, (a, b, embedding) in halves.items():
        if a is None or b is None:
            present, absent = ("B", "A") if a is None else ("A", "B")
            problems.append(f"{printable(module)} has lora_{present} but no lora_{absent}")
            continue
        expected = patterns["rank_pattern"](module, rank)
        strength = patterns["alpha_pattern"](module, alpha)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            problems.append(f"{printable(module)}: A {a.shape} and B {b.shape} do not fit")
        elif a.shape[0] != expected:
            problems.append(
                f"{printable(module)}: {ADAPTER_CONFIG} gives rank {expected:g}, A is {a.shape}"
            )
        else:
            divisor = math.sqrt(expected) if stabilised else expected
            pairs.append(Pair(module, a, b, strength / divisor, embedding))
    problems += [unreadable(n, t.dtype) for n, t in tensors.items() if t.dtype not in READABLE]
    if not tensors:
        problems.append("it holds no tensor")
    if problems:
        raise CheckpointError(f"{shown(path / ADAPTER_WEIGHTS)}: {listing(problems, 5)}")
    saved = _texts(config, "modules_to_save")
    copies = frozenset(name for name in whole if name.rpartition(".")[0].endswith(saved))
    return Adapter(
        path,
        config.text("base_model_name_or_path", default=""),
        alpha,
        stabilised,
        tuple(pairs),
        whole,
        copies,
        _tokens(config),
    )


def _whole(tensor: LazyTensor) -> Floats:
    return _finite(tensor, tensor.load(0, tensor.n_rows))


def _finite(tensor: LazyTensor, rows: Floats) -> Floats:
    if rows.size and not np.isfinite(max(-float(rows.min()), float(rows.max()))):
        raise CheckpointError(
            f"tensor {printable(tensor.name)} of the adapter holds what is no finite number: "
            "the adapter is damaged"
        )
    return rows


# --- the adapter's files ------------------------------------------------------------------------

_Halves = dict[str, tuple[LazyTensor | None, LazyTensor | None, bool]]


def _check_kind(config: HFConfig) -> None:
    kind = config.text("peft_type", default="LORA").upper()
    if kind != "LORA":
        raise config.refuse("peft_type", "LORA", kind)
    for key, words in BEYOND.items():
        if config.values.get(key):
            raise config.refuse(
                key, f"none: {words} is not B @ A; merge it with PEFT (merge_and_unload)", True
            )
    start = config.values.get("init_lora_weights", True)
    if start not in PLAIN_STARTS and start is not None:
        raise config.refuse(
            "init_lora_weights",
            "a start that leaves the base's weights as they are (others: save it with PEFT's "
            "path_initial_model_for_weight_conversion)",
            start,
        )


def _sort(tensors: Mapping[str, LazyTensor]) -> tuple[_Halves, dict[str, LazyTensor], list[str]]:
    """Halves of pairs by module, whole tensors by name, and sentences about all others."""
    halves: _Halves = {}
    whole: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        plain = _PAIR.fullmatch(name)
        match = plain or _EMBEDDING_PAIR.fullmatch(name)
        if match:
            module, embedding = match["module"].replace(".base_layer", ""), plain is None
            a, b, _ = halves.get(module, (None, None, False))
            if (a if match["side"] == "A" else b) is not None:
                problems.append(f"{printable(full)} is there twice, under two names")
            halves[module] = (
                (tensor, b, embedding) if match["side"] == "A" else (a, tensor, embedding)
            )
        elif ".lora_magnitude_vector" in name:
            problems.append(f"{printable(full)}: it is a DoRA adapter; {BEYOND['use_dora']}")
        elif re.search(r"[._]lora_|^lora_", name):
            problems.append(f"{printable(full)}: expected lora_A and lora_B")
        else:
            whole[_WRAPPERS.sub("", name)] = tensor
    for module in halves:  # PEFT saves the base's own embedding beside its change
        if f"{_PREFIX}{module}.base_layer.weight" in tensors:
            whole.pop(f"{module}.weight", None)
    return halves, whole, problems


def _patterns(config: HFConfig, key: str) -> Callable[[str, float], float]:
    """PEFT's get_pattern_key: a module's value by the first pattern that its name ends with."""
    values = config.values.get(key) or {}
    if not isinstance(values, dict) or len(values) > MAX_PATTERNS:
        raise config.refuse(key, f"an object of at most {MAX_PATTERNS:,} patterns", values)
    high, table = MAX_RANK if key == "rank_pattern" else MAX_ALPHA, HFConfig(values, config.where)
    numbers = {text: table.real(text, low=1e-9, high=high) for text in values}
    exact = {text for text in values if re.fullmatch(r"[\w.-]*", text)}
    compiled: dict[str, re.Pattern[str]] = {}
    for text in values:
        simple = len(text) <= MAX_PATTERN and _SIMPLE_PATTERN.fullmatch(text)
        if not simple or len(re.findall(r"[*+?]", text)) > 2:
            raise config.refuse(key, "names or simple regular expressions", text)
        if text not in exact:
            try:
                compiled[text] = re.compile(rf"(.*\.)?({text})$")
            except re.error:
                raise config.refuse(key, "a regular expression", text) from None

    def value(module: str, default: float) -> float:
        for text, number in numbers.items():
            if text in exact:
                hit = module == text or module.endswith("." + text)
            else:
                hit = compiled[text].match(module) is not None
            if hit:
                return number
        return default

    return value


def _texts(config: HFConfig, key: str) -> tuple[str, ...]:
    values: Any = config.values.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise config.refuse(key, "a list of names", values)
    return tuple(values)


def _tokens(config: HFConfig) -> tuple[int, ...]:
    """The tokens from which on an activated LoRA acts (alora_invocation_tokens)."""
    values: Any = config.values.get("alora_invocation_tokens") or []
    if not isinstance(values, list) or not all(
        type(value) is int and 0 <= value < 1 << 32 for value in values
    ):
        raise config.refuse("alora_invocation_tokens", "a list of tokens", values)
    return tuple(values)
