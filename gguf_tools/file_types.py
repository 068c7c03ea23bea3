"""The file types, as data: a base type, and exceptions for the tensors that suffer most.

From llama.cpp's src/llama-quant.cpp, decision for decision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class RecipeFacts:
    """What the rules ask about a model."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int = 0
    has_importance: bool = False  # an importance matrix is at hand
    is_calibrated: bool = False  # a text is to tell the importance of what layers multiply with

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


def with_importance(place: Place) -> bool:
    return place.facts.has_importance


def falcon(place: Place) -> bool:
    return place.falcon


def both(*conditions: Callable[[Place], bool]) -> Callable[[Place], bool]:
    return lambda place: all(condition(place) for condition in conditions)


def negation(condition: Callable[[Place], bool]) -> Callable[[Place], bool]:
    return lambda place: not condition(place)


NOT_FALCON = negation(falcon)
WITHOUT = negation(with_importance)
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
    FileType("Q4_0", 2, "Q4_0", rules={"ffn_down": (("Q4_1", both(with_importance, first(8))),)}),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q5_0", 8, "Q5_0", rules={"ffn_down": (("Q5_1", both(with_importance, first(8))),)}),
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
            "attn_v": (("Q4_K", shared), ("IQ3_S", WITHOUT)),
            "attn_k": (("IQ2_S", always),),
            "attn_q": (("IQ2_S", always),),
            "ffn_down": (("Q4_K", both(WITHOUT, first(8))), ("Q3_K", WITHOUT)),
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
            "ffn_down": (("Q5_K", both(WITHOUT, first(8))),),
            "attn_output": (EXPERT_OUTPUT,),
        },
    ),
    FileType(
        "IQ4_XS", 30, "IQ4_XS",
        rules={
            "attn_v": (("Q5_K", shared),),
            "ffn_down": (("Q5_K", both(WITHOUT, first(8))),),
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
