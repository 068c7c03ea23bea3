"""Which instructions share a launch, and which must not."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install '.[dev]'", allow_module_level=True)

from runtime.backends.cuda_fusion import Fusion, next_int8
from runtime.program import (
    Activate,
    Add,
    AddBias,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    Instruction,
    KVShape,
    MatMul,
    Program,
    RMSNorm,
    Rope,
    RopeTable,
    Scale,
    StoreKV,
)
from tests.cuda.test_code import ONE, TILE, kernel_name, launches
from tests.programs import decoder_layer, mixture, random_experts, random_matrix, random_vector

RNG = np.random.default_rng(0)
WIDTHS = {"x": 32, "n": 32, "y": 32, "z": 32, "s": 16, "wide": 64, "r": 4}
HEADS = {"q": 64, "k": 32, "v": 32, "k2": 32}
SHAPE = KVShape(2, 1, 32, 32)


def product(source: str, target: str, quant: str = "F32") -> MatMul:
    return MatMul(source, target, random_matrix(RNG, WIDTHS[target], WIDTHS[source], quant))


def bias(target: str, size: int = 32) -> AddBias:
    return AddBias(target, random_vector(RNG, size))


def norm(source: str, target: str, size: int = 32) -> RMSNorm:
    return RMSNorm(source, target, random_vector(RNG, size, 1.0), 1e-5)


def sizes(steps: Sequence[Instruction], *, joins_products: bool = True) -> list[int]:
    """How many steps each group has."""
    width = {**WIDTHS, **HEADS}.__getitem__
    fusion = Fusion(width, [SHAPE], joins_products=joins_products)
    groups = [group for group, _ in fusion.groups(steps)]
    assert [step for group in groups for step in group] == list(steps)
    return [len(group) for group in groups]


PRODUCTS = {
    "one with its bias and a sum": ([product("n", "y"), bias("y"), Add("y", "x")], [3]),
    "biases after": ([product("n", "y"), product("n", "z"), bias("y"), bias("z")], [4]),
    "biases between": ([product("n", "y"), bias("y"), product("n", "z"), bias("z")], [4]),
    "a sum of the last": ([product("n", "y"), product("n", "z"), Add("z", "x")], [2, 1]),
    "another source": ([product("n", "y"), product("x", "z")], [1, 1]),
    "one after the other": ([product("n", "y"), product("y", "z")], [1, 1]),
    "the same target": ([product("n", "y"), product("n", "y")], [1, 1]),
    "a target that is the source": ([product("n", "y"), product("n", "n")], [1, 1]),
    "a source that is the target": ([product("n", "n"), product("n", "y")], [1, 1]),
    "a sum that is the source": ([product("n", "y"), Add("y", "n")], [1, 1]),
    "a sum of another": ([product("n", "y"), Add("z", "x")], [1, 1]),
    "a part of what is made": ([product("n", "y"), Add("y", "s")], [1, 1]),
    "two biases": ([product("n", "y"), bias("y"), bias("y")], [2, 1]),
    "a bias of a part": ([product("n", "y"), bias("y", 16)], [1, 1]),
    "a bias of another": ([product("n", "y"), bias("z")], [1, 1]),
    "a bias after the sum": ([product("n", "y"), Add("y", "x"), bias("y")], [2, 1]),
    "something between": ([product("n", "y"), Activate("y", "gelu"), bias("y")], [1, 1, 1]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    steps, expected = PRODUCTS[name]
    assert sizes(steps) == expected
    assert sizes(steps, joins_products=False) == [1] * len(steps)


def test_experts() -> None:
    matrices = random_experts(RNG, 3, 16, 32)
    expert = ExpertMatMul("n", "y", "r", 2, matrices)
    biases = random_vector(RNG, 48).reshape(3, 16)
    assert sizes([expert, ExpertBias("y", "r", 2, biases)]) == [2]
    assert sizes([expert, ExpertBias("z", "r", 2, biases)]) == [1, 1]
    assert sizes([expert, ExpertBias("y", "r", 2, biases[:, :8])]) == [1, 1]
    assert sizes([ExpertSum("wide", "r", 2, "y"), Add("y", "x")]) == [2]
    assert sizes([ExpertSum("wide", "r", 2, "y"), Add("y", "wide")]) == [1, 1]


def test_norms_that_are_added() -> None:
    assert sizes([norm("y", "y"), Add("y", "x"), norm("x", "n")]) == [2, 1]
    assert sizes([norm("x", "n"), Add("n", "x")]) == [1, 1]
    assert sizes([norm("y", "y", 8), Add("y", "x")]) == [2]
    assert sizes([norm("x", "n"), Add("n", "s")]) == [1, 1]


def turn(target: str, n_heads: int, table: RopeTable, head_dim: int = 32) -> Rope:
    return Rope(target, n_heads, head_dim, table)


def test_heads() -> None:
    """Both norms, both turns, and what is stored: all of one attention, or none of it."""
    table, other = (RopeTable(16, False, 0.5 ** np.arange(8), 1.0) for _ in range(2))
    q, k, store = turn("q", 2, table), turn("k", 1, table), StoreKV("k", "v", 0)
    norms = [norm("q", "q"), norm("k", "k")]
    assert sizes([*norms, q, k, store]) == [5]
    assert sizes([*norms, store]) == [3]
    assert sizes([q, k, store]) == [3]
    assert sizes([store]) == [1]
    apart = (
        [q, store],
        [k, q, store],
        [q, k],
        [q, turn("k", 1, other), store],
        [q, turn("k2", 1, table), store],
        [q, k, StoreKV("k", "k", 0)],
        [q, k, StoreKV("k", "q", 0)],
        [turn("k", 1, table), k, store],
        [turn("q", 4, table, 16), turn("k", 2, table, 16), store],
        [norm("q", "q", 64), norm("k", "k"), store],
        [norm("q", "q"), norm("k", "k2"), store],
        [norms[0], norm("k", "k", 16), store],
    )
    for steps in apart:
        assert sizes(steps) == [1] * len(steps)
    assert sizes([*norms, q, turn("k", 1, other), store]) == [1] * 5


def test_who_takes_int8_next() -> None:
    taker, floats = product("n", "y", "Q8_0"), product("n", "z")
    steps = (Activate("z", "silu"), floats, taker)
    assert next_int8(steps, 0, "n") is taker
    assert next_int8(steps, 0, "x") is None
    assert next_int8((Activate("n", "silu"), taker), 0, "n") is None  # it is another by then
    assert next_int8((Activate("n", "silu"), taker), 1, "n") is taker
    assert next_int8((product("x", "y", "Q8_0"), taker), 0, "n") is None  # its int8 come between
    assert next_int8((floats,), 0, "n") is None


def kernels(program: Program, n_tokens: int = ONE) -> list[str]:
    return [kernel_name(launch) for launch in launches(program, n_tokens)]


Q4_K_M = {
    **dict.fromkeys(("q", "k", "o", "gate", "up"), "Q4_K"),
    **dict.fromkeys(("v", "down"), "Q6_K"),
}


def layer(quants: dict[str, str], **options: bool) -> Program:
    shape = KVShape(4, 2, 64, 64)
    return decoder_layer(RNG, dim=256, ffn_dim=512, shape=shape, quants=quants, **options)


def test_a_llama_layer() -> None:
    """A token of a layer as Q4_K_M has it: in half of the layers, v and down are finer."""
    attention, products = ["store", "attend", "combine", "matvec"], ["rms_norm", "matvecs"]
    expected = [*products, *attention, *products, "gate", "matvec"]
    assert kernels(layer(Q4_K_M)) == expected and len(expected) == 10
    assert kernels(layer({**Q4_K_M, "v": "Q4_K"})) == expected
    three = {**Q4_K_M, "k": "Q8_0"}
    assert kernels(layer(three))[:5] == ["rms_norm", *["matvec"] * 3, "store"]


@pytest.mark.parametrize("form", ["biases", "head_norms", "layer_norms", "after_norms"])
def test_other_layers(form: str) -> None:
    """Biases and other norms take no launch of their own."""
    extra = {"after_norms": 2}.get(form, 0)  # what is added is normed by a launch that waits
    assert len(kernels(layer(Q4_K_M, **{form: True}))) == 10 + extra


def test_a_prompt() -> None:
    """Tiles leave biases and sums to others."""
    made = kernels(layer(Q4_K_M, biases=True), TILE)
    tile = ["matmul"]
    assert made == [
        *("rms_norm", *tile, "add_bias", *tile, "add_bias", *tile, "add_bias"),
        *("store", "attend", "combine", *tile, "add_bias", "add"),
        *("rms_norm", *tile, "add_bias", *tile, "add_bias", "gate", *tile, "add_bias", "add"),
    ]


def test_a_mixture_layer() -> None:
    program = mixture(RNG, dim=64, ffn_dim=96, quant="Q8_0", biases=True)
    expert = "expert_matvec"
    products = ["matvec", "route", expert, expert, "gate", expert]
    assert kernels(program) == ["rms_norm", *products, "expert_sum"]


def small(*steps: Instruction) -> Program:
    return Program(WIDTHS, product("x", "y").matrix, (steps,), (), (SHAPE,))


def test_who_quantises() -> None:
    """The kernel that makes what is taken next, all of it; else a launch of its own."""
    made = kernels(layer({**Q4_K_M, "k": "F32", "v": "Q4_K"}))
    assert "quantise" not in made and made[:4] == ["rms_norm", "matvecs", "matvec", "store"]
    first, second = product("n", "z", "Q8_0"), product("y", "s", "Q8_0")
    each = ["quantise", "matvec"]
    assert kernels(small(Gate("x", "x", "y"), first, second)) == ["gate", *each, *each]
    narrow = MatMul("wide", "y", random_matrix(RNG, 32, 32, "Q8_0"))
    assert kernels(small(norm("wide", "wide", 64), narrow)) == ["rms_norm", *each]
    assert kernels(small(norm("wide", "n", 16), first)) == ["rms_norm", *each]


def test_int8_of_what_is_no_more() -> None:
    again = (norm("x", "n"), product("n", "y", "Q8_0"), Scale("n", 2.0), product("n", "z", "Q8_0"))
    assert kernels(small(*again)) == ["rms_norm", "matvec", "scale", "quantise", "matvec"]


def test_heads_that_share_a_scale() -> None:
    program = decoder_layer(RNG, shape=KVShape(4, 2, 32, 16), quants={"o": "Q8_0"})
    made = kernels(program)
    assert made[made.index("combine") + 1] == "quantise"
