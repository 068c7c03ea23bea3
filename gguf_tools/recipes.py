"""Which type each tensor gets: llama-quantize's rules, as data.

A file type (Q4_K_M) is a base type and exceptions for the tensors that suffer most. The rules, the
order in which tensors are counted and the types for rows that do not fill a block are those of
llama.cpp's src/llama-quant.cpp, decision for decision; files made either way have the same types.
Nothing here knows how to quantise.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gguf_tools.errors import UnsupportedQuantError, printable
from gguf_tools.quants import QUANTS


@dataclass(frozen=True)
class RecipeFacts:
    """What the rules ask about a model."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int = 0

    @property
    def sharing(self) -> int:
        """Heads that share a KV head."""
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Models whose attn_v is so small beside the rest that more bits for it cost nothing."""
        if self.architecture == "llama":
            return self.n_layers == 80 and self.n_heads != self.n_kv_heads and self.n_experts != 8
        return (self.architecture, self.n_layers) in {
            ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68),
        }  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A tensor among its kind, as the rules count them: index `i` of `n`."""

    i: int
    n: int
    facts: RecipeFacts

    @property
    def falcon(self) -> bool:
        return self.facts.architecture == "falcon"


Rule: TypeAlias = tuple[str, Callable[[Place], bool]]


def always(place: Place) -> bool:
    return True


def more_bits(place: Place) -> bool:
    """The first and last eighth, and every third between."""
    i, n = place.i, place.n
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def first(part: int) -> Callable[[Place], bool]:
    return lambda place: place.i < place.n // part


def first_few(count: int) -> Callable[[Place], bool]:
    return lambda place: place.i < count


def middle(place: Place) -> bool:
    return place.n // 8 <= place.i < 7 * place.n // 8


def shared(place: Place) -> bool:
    return place.facts.sharing >= 4


def shared_or_experts(place: Place) -> bool:
    return place.facts.sharing >= 4 or place.facts.n_experts >= 4


def eight_experts(place: Place) -> bool:
    return place.facts.n_experts == 8


def falcon(place: Place) -> bool:
    return place.falcon


def both(*conditions: Callable[[Place], bool]) -> Callable[[Place], bool]:
    return lambda place: all(condition(place) for condition in conditions)


def negation(condition: Callable[[Place], bool]) -> Callable[[Place], bool]:
    return lambda place: not condition(place)


NOT_FALCON = negation(falcon)
NOT_EIGHT = negation(eight_experts)
PLAIN = both(NOT_FALCON, NOT_EIGHT)  # attn_output of most models


@dataclass(frozen=True)
class FileType:
    """A file type: what `--type` names. For each kind of tensor the first rule that holds."""

    name: str
    file_type_id: int  # general.file_type
    base: str  # every tensor without a rule
    output: str = "Q6_K"  # output.weight, or token_embd.weight where that is the head too
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)  # by kind, see KINDS
    tiny: bool = False  # IQ1 and IQ2: the exceptions of `_adjust` are part of the rules
    experts: str = ""  # MXFP4_MOE: the type of stacked experts, all else is the base

    @property
    def is_mix(self) -> bool:
        return self.base not in ("F32", "F16", "BF16")


EXPERT_OUTPUT: Rule = ("Q5_K", both(NOT_FALCON, eight_experts))  # attn_output of Mixtral


def _tiny(file_type: str, number: int, base: str) -> FileType:
    """IQ1 and IQ2."""
    medium = file_type in ("IQ2_S", "IQ2_M")
    low = "IQ3_S" if medium else "Q2_K"
    output: tuple[Rule, ...] = (("Q5_K", eight_experts),)
    if medium:
        output += (("IQ3_S", always),)
    elif file_type in ("IQ1_S", "IQ1_M"):
        output += (("IQ2_XXS", always),)
    rules: dict[str, tuple[Rule, ...]] = {
        "embedding": ((low, always),),
        "attn_v": (("Q4_K", shared_or_experts), (low, always)),
        "attn_k": (("Q4_K", eight_experts),),
        "ffn_down": ((low, first(8)),),
        "attn_output": output,
    }
    return FileType(file_type, number, base, "Q5_K", rules, tiny=True)


EMBEDDING_Q4: tuple[Rule, ...] = (("Q4_K", always),)

FILE_TYPES: tuple[FileType, ...] = (
    FileType("F32", 0, "F32"),
    FileType("F16", 1, "F16"),
    FileType("BF16", 32, "BF16"),
    FileType("Q4_0", 2, "Q4_0"),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q5_0", 8, "Q5_0"),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("Q8_0", 7, "Q8_0", output="Q8_0"),
    FileType(
        "Q2_K", 10, "Q2_K",
        rules={
            "attn_v": (("Q4_K", shared), ("Q3_K", always)),
            "ffn_down": (("Q3_K", always),),
            "attn_output": (EXPERT_OUTPUT, ("Q3_K", PLAIN)),
        },
    ),
    FileType(
        "Q2_K_S", 21, "Q2_K",
        rules={"attn_v": (("Q4_K", shared),), "ffn_down": (("Q4_K", first(8)),)},
    ),
    FileType("Q3_K_S", 11, "Q3_K", rules={"attn_output": (EXPERT_OUTPUT,)}),
    FileType(
        "Q3_K_M", 12, "Q3_K",
        rules={
            "attn_v": (("Q5_K", first_few(2)), ("Q4_K", always)),
            "ffn_down": (
                ("Q5_K", first(16)),
                ("Q4_K", NOT_FALCON),
                ("Q4_K", more_bits),
            ),
            "attn_output": (EXPERT_OUTPUT, ("Q4_K", PLAIN)),
        },
    ),
    FileType(
        "Q3_K_L", 13, "Q3_K",
        rules={
            "attn_v": (("Q5_K", always),),
            "ffn_down": (("Q4_K", falcon), ("Q5_K", always)),
            "attn_output": (("Q4_K", falcon), ("Q5_K", NOT_EIGHT)),
        },
    ),
    FileType(
        "Q4_K_S", 14, "Q4_K",
        rules={
            "attn_v": (("Q5_K", first_few(4)),),
            "ffn_down": (("Q5_K", both(NOT_FALCON, first(8))),),
            "attn_output": (EXPERT_OUTPUT,),
        },
    ),
    FileType(
        "Q4_K_M", 15, "Q4_K",
        rules={
            "attn_v": (("Q6_K", more_bits),),
            "ffn_down": (
                ("Q6_K", both(falcon, first(16))),
                ("Q5_K", both(falcon, more_bits)),
                ("Q6_K", both(NOT_FALCON, more_bits)),
            ),
            "attn_output": (EXPERT_OUTPUT,),
        },
    ),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType(
        "Q5_K_M", 17, "Q5_K",
        rules={"attn_v": (("Q6_K", more_bits),), "ffn_down": (("Q6_K", more_bits),)},
    ),
    FileType("Q6_K", 18, "Q6_K"),
    _tiny("IQ1_S", 24, "IQ1_S"),
    _tiny("IQ1_M", 31, "IQ1_M"),
    _tiny("IQ2_XXS", 19, "IQ2_XXS"),
    _tiny("IQ2_XS", 20, "IQ2_XS"),
    _tiny("IQ2_S", 28, "IQ2_XS"),
    _tiny("IQ2_M", 29, "IQ2_S"),
    FileType(
        "IQ3_XXS", 23, "IQ3_XXS", "Q5_K",
        rules={
            "embedding": (("IQ3_S", always),),
            "attn_v": (("Q4_K", shared), ("IQ3_S", always)),
            "attn_k": (("IQ2_S", always),),
            "attn_q": (("IQ2_S", always),),
            "ffn_down": (("Q4_K", first(8)), ("Q3_K", always)),
            "attn_output": (EXPERT_OUTPUT, ("IQ3_S", PLAIN)),
        },
    ),
    FileType(
        "IQ3_XS", 22, "IQ3_S",
        rules={
            "attn_v": (("Q4_K", shared),),
            "attn_k": (("IQ3_XXS", always),),
            "attn_q": (("IQ3_XXS", always),),
            "ffn_gate": (("IQ3_XXS", middle),),
            "ffn_up": (("IQ3_XXS", middle),),
            "attn_output": (EXPERT_OUTPUT,),
        },
    ),
    FileType(
        "IQ3_S", 26, "IQ3_S",
        rules={"attn_v": (("Q4_K", shared),), "attn_output": (EXPERT_OUTPUT,)},
    ),
    FileType(
        "IQ3_M", 27, "IQ3_S",
        rules={
            "attn_v": (("Q4_K", always),),
            "ffn_down": (("Q4_K", first(8)), ("Q4_K", both(eight_experts, more_bits))),
            "attn_output": (EXPERT_OUTPUT, ("Q4_K", PLAIN)),
        },
    ),
    FileType(
        "IQ4_NL", 25, "IQ4_NL",
        rules={
            "attn_v": (("Q5_K", shared),),
            "ffn_down": (("Q5_K", first(8)),),
            "attn_output": (EXPERT_OUTPUT,),
        },
    ),
    FileType(
        "IQ4_XS", 30, "IQ4_XS",
        rules={
            "attn_v": (("Q5_K", shared),),
            "ffn_down": (("Q5_K", first(8)),),
            "attn_output": (EXPERT_OUTPUT,),
        },
    ),
    FileType("TQ1_0", 36, "TQ1_0", rules={"embedding": EMBEDDING_Q4}),
    FileType("TQ2_0", 37, "TQ2_0", rules={"embedding": EMBEDDING_Q4}),
    FileType("MXFP4_MOE", 38, "Q8_0", output="Q8_0", experts="MXFP4"),
)  # fmt: skip

# The type of rows that do not fill whole blocks; F16 where this does not fit either.
FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip

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

BLOCK_SIZES = {quant.name: quant.block_size for quant in QUANTS}


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and why it is not the one that the file type asks for."""

    type: str
    wanted: str  # what the file type asks for
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


def choose_types(
    file_type: FileType, shapes: Mapping[str, tuple[int, ...]], *, facts: RecipeFacts
) -> dict[str, Choice]:
    """The type of every tensor, by name; `shapes` are in NumPy order."""
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
        if not file_type.is_mix:
            choices[name] = Choice(file_type.base, file_type.base)
            continue
        kind = kinds[name]
        if kind == "output" or (kind == "embedding" and is_tied):
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
