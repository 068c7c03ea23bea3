"""Types chosen as llama-quantize chooses them, against tables recorded from it."""

from itertools import chain
from pathlib import Path

import pytest

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.file_types import FILE_TYPES, FileType, RecipeFacts
from gguf_tools.quants import QUANTS
from gguf_tools.recipes import (
    available,
    choose_types,
    find_file_type,
    is_quantisable,
    sorted_names,
)

TABLES = sorted((Path(__file__).parent / "data" / "recipes").glob("*.txt"))
BY_NAME = {file_type.name: file_type for file_type in FILE_TYPES}
ISSUE = {"F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q5_K_M"}


def read_table(
    path: Path,
) -> tuple[RecipeFacts, dict[str, tuple[int, ...]], dict[str, dict[str, str]]]:
    """The model, its tensors' shapes, and for each file type the type of every tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    patterns: dict[str, list[str]] = {}
    tables: dict[str, dict[str, str]] = {}
    for line in path.read_text().splitlines():
        first, *rest = line.split() or [""]
        if first == "model":
            numbers = {
                key: int(value) for key, _, value in (part.partition("=") for part in rest[1:])
            }
            facts = RecipeFacts(
                rest[0],
                numbers["layers"],
                numbers["heads"],
                numbers["kv_heads"],
                numbers["experts"],
            )
        elif first == "tensor":
            layers = range(facts.n_layers) if "*" in rest[0] else range(1)
            patterns[rest[0]] = [rest[0].replace("*", str(layer)) for layer in layers]
            shape = tuple(int(size) for size in rest[1:] if size != "x")
            shapes.update(dict.fromkeys(patterns[rest[0]], shape))
        elif first.startswith("["):
            current = tables.setdefault(first.strip("[]"), dict.fromkeys(shapes, rest[0]))
        elif first in patterns:
            runs = (part.split("*") for part in rest)
            types = chain.from_iterable([name] * int(count) for name, count in runs)
            current.update(zip(patterns[first], types, strict=True))
    return facts, shapes, tables


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_decision_is_llama_quantizes(path: Path) -> None:
    facts, shapes, tables = read_table(path)
    assert len(tables) >= 15
    for name, expected in tables.items():
        choices = choose_types(BY_NAME[name], shapes, facts=facts)
        assert {tensor: choice.type for tensor, choice in choices.items()} == expected, name


def test_choices_do_not_depend_on_the_order_given() -> None:
    facts, shapes, _ = read_table(TABLES[0])
    backwards = dict(reversed(shapes.items()))
    file_type = BY_NAME["Q4_K_M"]
    assert choose_types(file_type, shapes, facts=facts) == choose_types(
        file_type, backwards, facts=facts
    )


def test_fallbacks_say_why() -> None:
    shapes = {
        "token_embd.weight": (10, 576),
        "blk.0.attn_q.weight": (576, 576),
        "blk.0.ffn_down.weight": (576, 100),
        "blk.0.ffn_up.weight": (512, 512),
    }
    choices = choose_types(BY_NAME["Q4_K_M"], shapes, facts=RecipeFacts("llama", 1, 9, 3))
    embedding, q, down, up = choices.values()
    assert (embedding.type, embedding.wanted) == ("Q8_0", "Q6_K")
    assert (q.type, q.wanted) == ("Q5_0", "Q4_K")
    assert q.reason == "rows of 576 are not whole blocks of 256 (Q4_K)"
    assert (down.type, down.wanted) == ("F16", "Q6_K")
    assert (up.type, up.wanted, up.reason) == ("Q4_K", "Q4_K", "")


def test_order_of_tensors() -> None:
    names = ["blk.10.a", "blk.2.b", "token_embd.weight", "blk.2.a", "output.weight"]
    assert sorted_names(names) == [
        "output.weight",
        "token_embd.weight",
        "blk.2.a",
        "blk.2.b",
        "blk.10.a",
    ]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (8, 8), True),
        ("blk.0.attn_q.bias", (8,), False),
        ("blk.0.attn_norm.weight", (8, 8), False),
        ("output_norm.weight", (8,), False),
        ("blk.0.ffn_gate_inp.weight", (8, 8), False),
        ("blk.0.ffn_gate_exps.weight", (4, 8, 8), True),
        ("rope_freqs.weight", (8,), False),
        ("position_embd.weight", (8, 8), False),
        ("blk.0.attn_v.weight", (1, 8), False),
    ],
)
def test_what_is_never_quantised(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_quantisable(name, shape) is expected


def test_file_types_by_name() -> None:
    assert {file_type.name for file_type in available()} >= ISSUE
    for name in ISSUE:
        assert find_file_type(name).name == name
        assert find_file_type(name.lower()).name == name
    with pytest.raises(UnsupportedQuantError, match="type q4_k_x is not known; known are F32, F16"):
        find_file_type("q4_k_x")


@pytest.mark.parametrize("file_type", available(), ids=lambda file_type: file_type.name)
def test_what_is_offered_can_be_written(file_type: FileType) -> None:
    """Every type in every recorded table of an offered file type has a quantiser."""
    can = {quant.name for quant in QUANTS if quant.quantize is not None}
    for path in TABLES:
        _, _, tables = read_table(path)
        assert set(tables.get(file_type.name, {}).values()) <= can
