"""Channels that may be scaled: every architecture computes what it did when all of them are."""

from dataclasses import replace

import numpy as np
import pytest

from runtime.config import read_config
from runtime.decoders import build_program
from runtime.layerwise import LayerwiseReference
from runtime.program import Floats, Instruction, MatMul, Program, RMSNorm
from runtime.quality.channel_scaling import Factors, ScaledWeights, find_factors
from runtime.quality.foldable import Columns, Elements, Group, Rows, foldable_groups
from runtime.sources import PlannedWeights, Source
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


def _names(names) -> str:  # type: ignore[no-untyped-def]
    return " ".join(dict.fromkeys(name.removeprefix("blk.0.") for name in names))
