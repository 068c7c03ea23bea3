"""Channels that may be scaled: every architecture computes what it did when all of them are."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from runtime.config import read_config
from runtime.decoders import build_program
from runtime.layerwise import LayerwiseReference
from runtime.program import (
    Activate,
    Add,
    Attend,
    Floats,
    Gate,
    Instruction,
    MatMul,
    Program,
    RMSNorm,
    Rope,
    SoftCap,
    StoreKV,
)
from runtime.quality.channel_scaling import ScaledWeights, find_factors
from runtime.quality.foldable import Group, foldable_groups
from runtime.sources import Source
from tests.architectures import NAMES
from tests.test_observing import ids_of, source_of

N_TOKENS = 24
# What is in all layers of each: (what is divided, what is multiplied), without the prefix.
NORM_TO_QKV = ("attn_norm.weight", "attn_q.weight attn_k.weight attn_v.weight")
V_TO_OUTPUT = ("attn_v.weight", "attn_output.weight")
NORM_TO_FFN = ("ffn_norm.weight", "ffn_gate.weight ffn_up.weight")
UP_TO_DOWN = ("ffn_up.weight", "ffn_down.weight")
EXPECTED = {
    "llama": (NORM_TO_QKV, V_TO_OUTPUT, NORM_TO_FFN, UP_TO_DOWN),
    "gemma3": (NORM_TO_QKV, V_TO_OUTPUT, NORM_TO_FFN, UP_TO_DOWN),
    "olmo2": (V_TO_OUTPUT, UP_TO_DOWN),  # no norm before
    "phi3": (
        ("attn_norm.weight", "attn_qkv.weight"),
        ("attn_qkv.weight", "attn_output.weight"),
        ("ffn_norm.weight", "ffn_up.weight"),
        UP_TO_DOWN,
    ),
    "gpt2": (  # a feed-forward that is not linear
        ("attn_norm.weight attn_norm.bias", "attn_qkv.weight"),
        ("attn_qkv.weight attn_qkv.bias", "attn_output.weight"),
        ("ffn_norm.weight ffn_norm.bias", "ffn_up.weight"),
    ),
    "deepseek3": (  # the norm of the latent is read by a matrix that is transposed in the file
        ("attn_norm.weight", "attn_q_a.weight attn_kv_a_mqa.weight"),
        ("attn_q_a_norm.weight", "attn_q_b.weight"),
        ("attn_v_b.weight", "attn_output.weight"),
        NORM_TO_FFN,
        UP_TO_DOWN,
    ),
    "stablelm-parallel": (  # one norm for attention and feed-forward
        (
            "attn_norm.weight attn_norm.bias",
            "attn_q.weight attn_k.weight attn_v.weight ffn_gate.weight ffn_up.weight",
        ),
        V_TO_OUTPUT,
        UP_TO_DOWN,
    ),
    "gptoss": (  # its gate clamps `up`, and adds one
        NORM_TO_QKV,
        ("attn_v.weight attn_v.bias", "attn_output.weight"),
        (
            "post_attention_norm.weight",
            "ffn_gate_inp.weight ffn_gate_exps.weight ffn_up_exps.weight",
        ),
    ),
}
TIED = ("gemma", "gemma2", "gemma3", "gpt2", "llama-tied", "qwen2-tied", "starcoder2-tied")


def streamed_program(source: Source) -> Program:
    return build_program(source, read_config(source), stream=True)


def logits_of(source: Source, ids: list[int]) -> Floats:
    program = streamed_program(source)
    model = LayerwiseReference(program, n_tokens=len(ids))
    x = program.embed(np.array(ids), 0)
    for layer in range(len(program.layers)):
        x = model.layer(layer, x)
    return model.head(x)


def scaled(source: Source, scales: list[tuple[Group, Floats]]) -> ScaledWeights:
    return ScaledWeights(source, find_factors(scales, source.tensors))


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_what_they_are(name: str) -> None:
    source, ids = source_of(name), ids_of(name, N_TOKENS)
    groups = foldable_groups(streamed_program(source))
    assert groups
    expected = logits_of(source, ids)
    rng = np.random.default_rng(len(name))
    powers = [(g, np.exp2(rng.integers(-2, 3, g.n_channels)).astype(np.float32)) for g in groups]
    assert np.array_equal(logits_of(scaled(source, powers), ids), expected)
    others = [(g, np.exp(rng.normal(0, 1, g.n_channels)).astype(np.float32)) for g in groups]
    got = logits_of(scaled(source, others), ids)
    assert not np.array_equal(got, expected)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_a_layer(name: str) -> None:
    groups = foldable_groups(streamed_program(source_of(name)))
    found = [
        (_names(part.name for part in g.divided), _names(part.name for part in g.multiplied))
        for g in groups
        if g.layer == 0
    ]
    assert found == list(EXPECTED[name])


QKV, VALUES, FFN, DOWN = range(4)  # the groups of a llama's layer, in order


@pytest.fixture(scope="module")
def llama() -> Program:
    return streamed_program(source_of("llama"))


def left(program: Program) -> list[int]:
    """Which of the groups of the first layer there are."""
    firsts = [NORM_TO_QKV[0], V_TO_OUTPUT[0], NORM_TO_FFN[0], UP_TO_DOWN[0]]
    groups = [group for group in foldable_groups(program) if group.layer == 0]
    return [firsts.index(group.divided[0].name.removeprefix("blk.0.")) for group in groups]


def with_steps(program: Program, steps: Iterable[Instruction]) -> Program:
    return replace(program, layers=(tuple(steps), *program.layers[1:]))


def position(program: Program, kind: type, number: int = 0) -> int:
    places = [i for i, step in enumerate(program.layers[0]) if isinstance(step, kind)]
    return places[number]


INSERTED = {
    "the norm is read elsewhere": (MatMul, 0, Add("normed", "x"), [VALUES, FFN, DOWN]),
    "values are capped": (StoreKV, 0, SoftCap("v", 1.0), [QKV, FFN, DOWN]),
    "values turn": (StoreKV, 0, "rope", [QKV, FFN, DOWN]),
    "values are read elsewhere": (StoreKV, 0, Add("v", "k"), [QKV, FFN, DOWN]),
    "heads are normed": (Attend, 1, "norm", [QKV, FFN, DOWN]),
    "up is capped": (Gate, 0, SoftCap("up", 1.0), [QKV, VALUES, FFN]),
    "up is read elsewhere": (Gate, 0, Add("up", "gate"), [QKV, VALUES, FFN]),
    "the gated is capped": (Gate, 1, SoftCap("gate", 1.0), [QKV, VALUES, FFN]),
}


@pytest.mark.parametrize("case", INSERTED)
def test_what_lies_between_is_in_the_way(llama: Program, case: str) -> None:
    kind, after, step, expected = INSERTED[case]
    steps = list(llama.layers[0])
    if step == "rope":
        turn = steps[position(llama, Rope, 1)]
        assert isinstance(turn, Rope)
        step = replace(turn, target="v")
    elif step == "norm":
        step = RMSNorm("attended", "attended", np.ones(16, np.float32), 1e-5)
    assert not isinstance(step, str)
    steps.insert(position(llama, kind) + after, step)
    assert left(with_steps(llama, steps)) == expected


@pytest.mark.parametrize(
    ("kind", "number", "change", "expected"),
    [
        (Gate, 0, {"activation": "swiglu_oai"}, [QKV, VALUES, FFN]),
        (StoreKV, 0, {"keys": "v"}, [QKV, FFN, DOWN]),
        (StoreKV, 0, {"values": "q"}, [QKV, FFN, DOWN]),
        (RMSNorm, 0, {"name": ""}, [VALUES, FFN, DOWN]),
        (RMSNorm, 0, {"name": "blk.0.ffn_norm.weight"}, [VALUES, DOWN]),
        (RMSNorm, 0, {"name": "output_norm.weight"}, [VALUES, FFN, DOWN]),
        (MatMul, 0, {"source": "x"}, [QKV, VALUES, FFN, DOWN]),  # q is not in the group, then
    ],
)
def test_other_instructions(
    llama: Program, kind: type, number: int, change: dict[str, str], expected: list[int]
) -> None:
    steps = list(llama.layers[0])
    place = position(llama, kind, number)
    steps[place] = replace(steps[place], **change)  # type: ignore[type-var]
    assert left(with_steps(llama, steps)) == expected


def test_tensors_that_are_shared_stay_as_they_are(llama: Program) -> None:
    q = llama.layers[0][position(llama, MatMul)]
    v = llama.layers[0][position(llama, MatMul, 2)]
    assert isinstance(q, MatMul) and isinstance(v, MatMul)
    tied = replace(llama, embedding=q.matrix)
    assert left(tied) == [VALUES, FFN, DOWN]
    again = with_steps(llama, (*llama.layers[0], replace(q, source="x", target="q")))
    assert left(again) == [VALUES, FFN, DOWN]
    # Values that are made twice of the same rows, of the same source.
    twice = with_steps(llama, (*llama.layers[0][:4], replace(v, target="k"), *llama.layers[0][4:]))
    assert left(twice) == [QKV, FFN, DOWN]


def test_a_cache_that_two_layers_read(llama: Program) -> None:
    place = position(llama, Attend)
    first, second = llama.layers[0], list(llama.layers[1])
    own = second[place]
    assert isinstance(own, Attend)
    second[place] = replace(own, layer=0)
    shared = replace(llama, layers=(first, tuple(second), *llama.layers[2:]))
    assert left(shared) == [QKV, FFN, DOWN]


def test_matrices_in_another_form_than_the_files(llama: Program) -> None:
    steps = list(llama.layers[0])
    place = position(llama, MatMul)
    q = steps[place]
    assert isinstance(q, MatMul)
    steps[place] = replace(q, matrix=replace(q.matrix, data=np.asarray(q.matrix.data)))
    assert left(with_steps(llama, steps)) == [VALUES, FFN, DOWN]


def test_a_relu_keeps_factors() -> None:
    program = streamed_program(source_of("gpt2"))
    steps = [replace(s, activation="relu") if isinstance(s, Activate) else s for s in program.steps]
    n = len(program.layers[0])
    groups = foldable_groups(replace(program, layers=(tuple(steps[:n]), *program.layers[1:])))
    of_first = [group for group in groups if group.layer == 0]
    assert of_first[-1].names == {
        "blk.0.ffn_up.weight",
        "blk.0.ffn_up.bias",
        "blk.0.ffn_down.weight",
    }


def _names(names: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(name.removeprefix("blk.0.") for name in names))
