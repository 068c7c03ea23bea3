"""Which type each tensor gets: llama-quantize's choice.

The order in which tensors are counted, the rules of the file types and the types for rows that do
not fill a block are those of llama.cpp's src/llama-quant.cpp, decision for decision: files made
either way have the same types. Nothing here knows how to quantise.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gguf_tools.errors import UnsupportedQuantError, printable
from gguf_tools.file_types import FALLBACKS, FILE_TYPES, FileType, Place, RecipeFacts
from gguf_tools.overrides import EMBEDDINGS, NO_OVERRIDES, Overrides
from gguf_tools.quants import QUANTS

# Kinds of tensors; the first whose text is in the name. `ffn_down` is `ffn_down_exps` too.
KINDS = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)

NEVER_QUANTISED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight",
    "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd",
    "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook",
    "mm.a.code_embd",
)  # fmt: skip
NEVER_QUANTISED_NAMES = ("position_embd.weight", "token_types.weight")

# Tensor types, and a file type, that llama-quantize refuses to make without an importance matrix.
NEED_IMPORTANCE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "Q2_K_S"}

BLOCK_SIZES = {quant.name: quant.block_size for quant in QUANTS}


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and why it is not the one that was asked for."""

    type: str
    wanted: str  # what the file type or an option asks for
    reason: str = ""  # empty unless `type` is not `wanted`


def find_file_type(name: str) -> FileType:
    """The file type called `name` in any case; UnsupportedQuantError lists those there are."""
    for file_type in available():
        if file_type.name == name.upper():
            return file_type
    known = ", ".join(file_type.name for file_type in available())
    raise UnsupportedQuantError(f"type {printable(name)} is not known; known are {known}")


def available() -> tuple[FileType, ...]:
    """The file types for which every tensor type that can occur has a quantiser."""
    can = {quant.name for quant in QUANTS if quant.quantize is not None}
    return tuple(file_type for file_type in FILE_TYPES if _types_of(file_type) <= can)


def needs_importance(file_type: FileType, name: str, type_: str) -> bool:
    """Whether tensor `name` would be garbage as `type_` without an importance matrix."""
    if name == "output.weight" or name in EMBEDDINGS:
        return False
    return type_ in NEED_IMPORTANCE or (file_type.name in NEED_IMPORTANCE and type_ == "Q2_K")


def choose_types(
    file_type: FileType,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    facts: RecipeFacts,
    overrides: Overrides = NO_OVERRIDES,
) -> dict[str, Choice]:
    """The type of every tensor, by name; `shapes` are in NumPy order.

    UnsupportedQuantError where a type that was asked for by name cannot hold the tensor.
    """
    kinds = {name: kind_of(name) for name in shapes}
    is_tied = "output.weight" not in shapes
    totals = {"attn_v": sum(kind == "attn_v" for kind in kinds.values())}
    counters: dict[str, int] = {}
    choices: dict[str, Choice] = {}
    for name in sorted_names(shapes):
        shape = shapes[name]
        if not is_quantisable(name, shape):
            choices[name] = Choice("F32", "F32")
            continue
        final = overrides.final(name)
        if final:
            choices[name] = _exactly(final, name, shape[-1])
            continue
        if not file_type.is_mix:
            choices[name] = Choice(file_type.base, file_type.base)
            continue
        by_pattern = overrides.by_pattern(name) or (file_type.base if overrides.pure else "")
        if by_pattern:  # such a tensor is not counted among its kind
            choices[name] = _fit(by_pattern, shape[-1])
            continue
        kind = kinds[name]
        if kind == "output" or (kind == "embedding" and is_tied):
            if overrides.output:
                choices[name] = _fit(overrides.output, shape[-1])
            else:
                choices[name] = _choose_output(file_type, shape[-1], facts)
            continue
        if file_type.experts:
            wanted = file_type.experts if len(shape) > 2 and shape[0] > 1 else file_type.base
            choices[name] = _fit(wanted, shape[-1])
            continue
        i = counters.get(kind, 0)
        counters[kind] = i + 1
        if kind.startswith("ffn_") and facts.n_experts > 1 and not file_type.tiny:
            i = block_number(name)
        place = Place(i, totals.get(kind, facts.n_layers), facts)
        rules = file_type.rules.get(kind, ())
        wanted = next((type_ for type_, holds in rules if holds(place)), file_type.base)
        if not file_type.tiny:
            wanted = _adjust(wanted, kind, facts)
        choices[name] = _fit(wanted, shape[-1])
    return {name: choices[name] for name in shapes}


def sorted_names(names: Iterable[str]) -> list[str]:
    """By layer (tensors without one first), then by name: the order in which tensors count."""
    return sorted(names, key=lambda name: (block_number(name), name))


def block_number(name: str) -> int:
    match = re.match(r"blk\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1


def kind_of(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((kind for text, kind in KINDS if text in name), "other")


def is_quantisable(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices that end in `weight`, but for norms, routers and a few small ones."""
    return (
        any(size > 1 for size in shape[:-1])
        and name.endswith("weight")
        and name not in NEVER_QUANTISED_NAMES
        and not any(part in name for part in NEVER_QUANTISED)
    )


def _choose_output(file_type: FileType, row_length: int, facts: RecipeFacts) -> Choice:
    """The head: more bits than the rest, and Q8_0 where the base type does not fit its rows."""
    if facts.architecture == "falcon":
        return _fit("Q8_0", row_length)
    if row_length % BLOCK_SIZES[file_type.base]:
        choice = _fit("Q8_0", row_length)
        return Choice(choice.type, file_type.output, _reason(row_length, file_type.base))
    return _fit(file_type.output, row_length)


def _adjust(wanted: str, kind: str, facts: RecipeFacts) -> str:
    """The exceptions for two sizes of model, after the rules of the file type."""
    if kind == "attn_v" and facts.is_70b and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    if kind in ("attn_v", "attn_k") and facts.n_experts == 8:
        wanted = "Q8_0"
    return wanted


def _exactly(wanted: str, name: str, row_length: int) -> Choice:
    """`wanted`, which has no fallback: llama-quantize stops in the middle of its work here."""
    if row_length % BLOCK_SIZES[wanted]:
        option = "--output-type" if name == "output.weight" else "--embedding-type"
        raise UnsupportedQuantError(
            f"{option} {wanted}: {_reason(row_length, wanted)} in tensor {printable(name)}; choose "
            f"another type, such as {_fit(wanted, row_length).type}"
        )
    return Choice(wanted, wanted)


def _fit(wanted: str, row_length: int) -> Choice:
    """`wanted`, or what holds rows of `row_length` instead."""
    if row_length % BLOCK_SIZES[wanted] == 0:
        return Choice(wanted, wanted)
    fallback = FALLBACKS.get(wanted, wanted)
    if row_length % BLOCK_SIZES[fallback]:
        fallback = "F16"
    return Choice(fallback, wanted, _reason(row_length, wanted))


def _reason(row_length: int, wanted: str) -> str:
    return f"rows of {row_length:,} are not whole blocks of {BLOCK_SIZES[wanted]} ({wanted})"


def _types_of(file_type: FileType) -> set[str]:
    """Every tensor type that a file of this type can hold."""
    types = {"F32", file_type.base}
    if file_type.is_mix:
        types |= {file_type.output, "Q8_0", "F16"}
        types |= {type_ for rules in file_type.rules.values() for type_, _ in rules}
        types |= {file_type.experts} - {""}
        types |= {FALLBACKS[type_] for type_ in types if type_ in FALLBACKS}
    return types
