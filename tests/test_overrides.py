"""Types that are asked for by name, and types that change with an importance matrix."""

import re

import pytest

from gguf_tools.errors import GGUFError
from gguf_tools.file_types import FILE_TYPES, RecipeFacts
from gguf_tools.overrides import Overrides, parse_overrides
from gguf_tools.recipes import Choice, choose_types, find_file_type, needs_importance

BY_NAME = {file_type.name: file_type for file_type in FILE_TYPES}
N_LAYERS = 16
LAYER = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")


def shapes_of(*, width: int = 512, tied: bool = False) -> dict[str, tuple[int, ...]]:
    names = [f"blk.{layer}.{name}.weight" for layer in range(N_LAYERS) for name in LAYER]
    names += ["token_embd.weight"] if tied else ["output.weight", "token_embd.weight"]
    return {**dict.fromkeys(names, (1024, width)), "output_norm.weight": (width,)}


def choose(
    file_type: str,
    overrides: Overrides,
    *,
    importance: bool = False,
    width: int = 512,
    tied: bool = False,
) -> dict[str, Choice]:
    facts = RecipeFacts("llama", N_LAYERS, 8, 8, has_importance=importance)
    shapes = shapes_of(width=width, tied=tied)
    return choose_types(BY_NAME[file_type], shapes, facts=facts, overrides=overrides)


def types_of(choices: dict[str, Choice], part: str) -> list[str]:
    """The types of all layers."""
    return [choices[f"blk.{layer}.{part}.weight"].type for layer in range(N_LAYERS)]


@pytest.mark.parametrize(
    ("file_type", "without", "with_one"),
    [
        ("Q4_0", ["Q4_0"] * 16, ["Q4_1"] * 2 + ["Q4_0"] * 14),
        ("Q5_0", ["Q5_0"] * 16, ["Q5_1"] * 2 + ["Q5_0"] * 14),
        ("IQ4_XS", ["Q5_K"] * 2 + ["IQ4_XS"] * 14, ["IQ4_XS"] * 16),
        ("IQ4_NL", ["Q5_K"] * 2 + ["IQ4_NL"] * 14, ["IQ4_NL"] * 16),
        ("IQ3_XXS", ["Q4_K"] * 2 + ["Q3_K"] * 14, ["IQ3_XXS"] * 16),
        ("Q4_1", ["Q4_1"] * 16, ["Q4_1"] * 16),
    ],
)
def test_what_an_importance_matrix_changes(
    file_type: str, without: list[str], with_one: list[str]
) -> None:
    none = parse_overrides()
    assert types_of(choose(file_type, none), "ffn_down") == without
    assert types_of(choose(file_type, none, importance=True), "ffn_down") == with_one


def test_attn_v_of_iq3_xxs() -> None:
    none = parse_overrides()
    assert types_of(choose("IQ3_XXS", none), "attn_v") == ["IQ3_S"] * 16
    assert types_of(choose("IQ3_XXS", none, importance=True), "attn_v") == ["IQ3_XXS"] * 16


def test_the_first_pattern_holds() -> None:
    given = parse_overrides(tensor_types=[r"blk\.[01]\.ffn_down=q8_0", "FFN_DOWN=Q5_1", "ffn=F16"])
    choices = choose("Q4_K_M", given)
    assert types_of(choices, "ffn_down") == ["Q8_0"] * 2 + ["Q5_1"] * 14
    assert types_of(choices, "ffn_up") == ["F16"] * 16
    assert choices["output.weight"].type == "Q6_K"
    assert choices["output_norm.weight"].type == "F32"


def test_tensors_of_patterns_are_not_counted() -> None:
    """llama-quantize's rules count the tensors they see: the first four attn_v that are left."""
    given = parse_overrides(tensor_types=[r"blk\.[01]\.attn_v=Q8_0"])
    assert types_of(choose("Q4_K_S", given), "attn_v") == (
        ["Q8_0"] * 2 + ["Q5_K"] * 4 + ["Q4_K"] * 10
    )


def test_patterns_fall_back() -> None:
    choices = choose("Q8_0", parse_overrides(tensor_types=["ffn_up=Q4_K"]), width=96)
    up = choices["blk.3.ffn_up.weight"]
    assert (up.type, up.wanted) == ("Q5_0", "Q4_K")
    assert up.reason == "rows of 96 are not whole blocks of 256 (Q4_K)"


def test_output_and_embedding() -> None:
    given = parse_overrides(output="q5_k", embedding="Q2_K", tensor_types=["output=Q8_0", "t=F32"])
    choices = choose("Q4_K_M", given)
    assert choices["output.weight"] == Choice("Q5_K", "Q5_K")
    assert choices["token_embd.weight"] == Choice("Q2_K", "Q2_K")
    assert choices["blk.0.attn_output.weight"].type == "Q8_0"
    for file_type in ("F16", "F32"):
        choices = choose(file_type, parse_overrides(output="Q8_0", embedding="Q8_0"))
        assert choices["output.weight"].type == choices["token_embd.weight"].type == "Q8_0"
        assert choices["blk.0.attn_q.weight"].type == file_type


def test_an_embedding_that_is_the_head_too() -> None:
    assert choose("Q4_K_M", parse_overrides(), tied=True)["token_embd.weight"].type == "Q6_K"
    output = parse_overrides(output="Q5_K")
    assert choose("Q4_K_M", output, tied=True)["token_embd.weight"].type == "Q5_K"
    assert choose("Q4_K_M", output, tied=True, width=96)["token_embd.weight"].type == "Q5_1"
    both = parse_overrides(output="Q5_K", embedding="Q3_K")
    assert choose("Q4_K_M", both, tied=True)["token_embd.weight"].type == "Q3_K"


def test_the_second_embedding_may_have_a_pattern() -> None:
    given = parse_overrides(embedding="Q8_0", tensor_types=["per_layer_token_embd=Q4_0"])
    assert given.final("token_embd.weight") == "Q8_0"
    assert given.final("per_layer_token_embd.weight") == ""
    assert parse_overrides(embedding="Q8_0").final("per_layer_token_embd.weight") == "Q8_0"


@pytest.mark.parametrize(("option", "name"), [("output", "output"), ("embedding", "token_embd")])
def test_final_types_must_fit(option: str, name: str) -> None:
    given = parse_overrides(**{option: "Q6_K"})  # type: ignore[arg-type]
    words = (
        f"--{option}-type Q6_K: rows of 96 are not whole blocks of 256 (Q6_K) in tensor "
        f"{name}.weight; choose another type, such as Q8_0"
    )
    with pytest.raises(GGUFError, match=re.escape(words)):
        choose("Q4_K_M", given, width=96)


def test_pure() -> None:
    choices = choose("Q4_K_M", parse_overrides(pure=True))
    assert {c.type for name, c in choices.items() if "norm" not in name} == {"Q4_K"}
    choices = choose("Q3_K_L", parse_overrides(pure=True, output="F16", tensor_types=["down=Q6_K"]))
    assert choices["output.weight"].type == "F16"
    assert types_of(choices, "ffn_down") == ["Q6_K"] * 16
    assert types_of(choices, "attn_v") == ["Q3_K"] * 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_types": ["Q4_K"]}, "expected REGEX=TYPE"),
        ({"tensor_types": ["=Q4_K"]}, "expected REGEX=TYPE"),
        ({"tensor_types": ["a=Q4_K_M"]}, "type Q4_K_M cannot be written; known are F32, F16"),
        ({"tensor_types": ["a(=Q4_K"]}, "is no regular expression"),
        ({"tensor_types": ["a="]}, "cannot be written"),
        ({"output": "IQ2_XS"}, "--output-type: type IQ2_XS cannot be written"),
        ({"embedding": "\x1b"}, r"--embedding-type: type \\x1b cannot be written"),
    ],
)
def test_options_that_are_wrong(options: dict[str, object], words: str) -> None:
    with pytest.raises(GGUFError, match=words):
        parse_overrides(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "file_type", "words"),
    [
        ({"tensor_types": ["ffn_dwn=Q4_K"]}, "Q8_0", "--tensor-type ffn_dwn: no tensor of this"),
        ({"keep": ["output"]}, "Q8_0", "--keep output: no tensor of this model has such a name"),
        ({"tensor_types": ["ffn=Q4_K"]}, "F16", "--tensor-type was given with --type F16"),
        ({"pure": True}, "BF16", "--pure was given with --type BF16"),
    ],
)
def test_options_without_effect(options: dict[str, object], file_type: str, words: str) -> None:
    given = parse_overrides(**options)  # type: ignore[arg-type]
    found = BY_NAME[file_type]
    with pytest.raises(GGUFError, match=words):
        given.check(list(shapes_of()), is_mix=found.is_mix, file_type=found.name)


def test_what_needs_an_importance_matrix() -> None:
    q2_k_s, q2_k = find_file_type("q2_k_s"), find_file_type("Q2_K")
    assert needs_importance(q2_k_s, "blk.0.ffn_up.weight", "Q2_K")
    assert not needs_importance(q2_k_s, "blk.0.ffn_down.weight", "Q4_K")
    assert not needs_importance(q2_k_s, "token_embd.weight", "Q2_K")
    assert not needs_importance(q2_k_s, "output.weight", "Q2_K")
    assert not needs_importance(q2_k, "blk.0.ffn_up.weight", "Q2_K")
    assert needs_importance(q2_k, "blk.0.ffn_up.weight", "IQ2_XS")
