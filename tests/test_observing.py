"""What observers are told: the inputs of a file's matrices, by both layerwise backends."""

from collections.abc import Iterator

import numpy as np
import pytest

from gguf_tools.conversion import plan_conversion
from gguf_tools.recipes import find_file_type
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.layerwise import LayerwiseModel, LayerwiseReference
from runtime.program import Floats, MatMul, Matrix, Show
from runtime.sources import PlannedWeights
from tests.architectures import FOLDER, NAMES, prompts

Inputs = dict[tuple[str, int | None], Floats]
LAST = "output.weight", "token_embd.weight"  # the head's matrix, where it has one and where not


def source_of(name: str) -> PlannedWeights:
    plan = plan_conversion(FOLDER / name, find_file_type("F32"))
    return PlannedWeights(FOLDER / name, plan.tensors, plan.metadata)


def ids_of(name: str, n: int) -> list[int]:
    *_, longest = prompts(name)
    return list(longest.ids[:n])


def inputs_of(model: LayerwiseModel | LayerwiseReference, x: Floats, n_layers: int) -> Inputs:
    """All that an observer is told in one window."""
    seen: Inputs = {}

    def observe(matrix: Matrix, inputs: Floats) -> None:
        assert inputs.shape[1] == matrix.n_columns and inputs.dtype == np.float32
        key = matrix.name, matrix.index
        is_head = matrix.name in LAST
        assert is_head or key not in seen, key  # of each once
        parts = [seen[key]] if key in seen else []
        seen[key] = np.concatenate([*parts, inputs])

    for layer in range(n_layers):
        x = model.layer(layer, x, observe)
    model.head(x, observe)
    return seen


@pytest.fixture(params=NAMES)
def observed(request: pytest.FixtureRequest) -> Iterator[tuple[PlannedWeights, Inputs, Inputs]]:
    """A checkpoint's source, what the compiled backend told of it, and the reference."""
    name = request.param
    source, ids = source_of(name), ids_of(name, 40)
    with LayerwiseModel(source, n_tokens=len(ids), threads=1) as model:
        x = model.embed(ids)
        n_layers = len(model.program.layers)
        compiled = inputs_of(model, x, n_layers)
        reference = LayerwiseReference(model.program, n_tokens=len(ids))
        yield source, compiled, inputs_of(reference, x, n_layers)


def test_both_backends_tell_the_same_of_all_matrices(
    observed: tuple[PlannedWeights, Inputs, Inputs],
) -> None:
    source, compiled, reference = observed
    assert list(compiled) == list(reference)
    for key, expected in reference.items():
        got = compiled[key]
        assert got.shape == expected.shape, key
        assert np.abs(got - expected).max() <= 5e-3 * np.abs(expected).max(), key
    # Every tensor that is multiplied with, in one piece or as a stack.
    names = {name for name, _ in compiled}
    lookups = {"position_embd.weight"} | ({"token_embd.weight"} - names)
    norms = ("_norm.weight",)
    expected_names = {
        tensor.name
        for tensor in source.tensors.values()
        if len(tensor.shape) > 1 and not tensor.name.endswith((*norms, ".bias"))
    }
    assert expected_names - lookups <= names <= source.tensors.keys()


def test_experts_are_told_of_their_own_tokens_alone() -> None:
    source, ids = source_of("mixtral"), ids_of("mixtral", 24)
    with LayerwiseModel(source, n_tokens=24, threads=1) as model:
        seen = inputs_of(model, model.embed(ids), len(model.program.layers))
        n_used = next(s.n_used for s in model.program.steps if hasattr(s, "n_used"))
    shape = source.tensors["blk.0.ffn_up_exps.weight"].shape
    rows = [
        len(inputs)
        for (name, index), inputs in seen.items()
        if name == "blk.0.ffn_up_exps.weight" and index in range(shape[0])
    ]
    assert sum(rows) == n_used * 24 and len(rows) <= shape[0]


def test_fused_tensors_are_told_of_once() -> None:
    source, ids = source_of("phi3"), ids_of("phi3", 8)
    with LayerwiseModel(source, n_tokens=8, threads=1) as model:
        products = [s for s in model.program.layers[0] if isinstance(s, MatMul)]
        seen = inputs_of(model, model.embed(ids), len(model.program.layers))
    fused = [step.matrix.name for step in products].count("blk.0.attn_qkv.weight")
    assert fused == 3 and len(seen["blk.0.attn_qkv.weight", None]) == 8


def test_queries_come_to_the_keys_of_latent_attention() -> None:
    """Scores are the same whether keys are expanded or queries multiplied with their matrix."""
    source, ids = source_of("deepseek2"), ids_of("deepseek2", 12)
    with LayerwiseModel(source, n_tokens=12, threads=1) as model:
        seen = inputs_of(model, model.embed(ids), len(model.program.layers))
    weights = source.load("blk.0.attn_k_b.weight")  # (n_heads, kv_rank, nope)
    assert [seen["blk.0.attn_k_b.weight", i].shape for i in range(len(weights))] == [
        (12, weights.shape[2])
    ] * len(weights)
    # attn_v_b's heads all have the latent, and are told of together.
    latent = seen["blk.0.attn_v_b.weight", None]
    assert latent.shape == (12, weights.shape[1])
    names = ("blk.0.attn_q_b.weight", "blk.0.attn_q.weight")
    name = next(each for each in names if each in source.tensors)
    heads = (seen[name, None] @ source.load(name).T).reshape(12, len(weights), -1)
    for head in range(len(weights)):
        expected = heads[:, head, : weights.shape[2]]
        got = seen["blk.0.attn_k_b.weight", head]
        assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_nothing_is_shown_where_a_model_is_run_whole() -> None:
    source = source_of("deepseek2")
    config = read_config(source)
    whole = build_program(source, config)
    assert not any(isinstance(step, Show) for step in whole.steps)
    streamed = build_program(source, config, stream=True)
    assert sum(isinstance(step, Show) for step in streamed.steps) == config.n_layers
