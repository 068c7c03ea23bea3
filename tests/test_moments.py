"""Second moments of what matrices are multiplied with: which share theirs, and first tokens'."""

from collections.abc import Iterator

import numpy as np
import pytest

from gguf_tools.conversion import plan_conversion
from gguf_tools.recipes import find_file_type
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats, Matrix
from runtime.quality.attention_moments import AttentionMoments, find_attention
from runtime.quality.first_tokens import FirstTokens
from runtime.quality.moments import (
    FEW,
    SHRINK,
    SINK,
    Collector,
    Inputs,
    Key,
    in_passes,
    shared_inputs,
    shrink,
)
from runtime.sources import PlannedWeights
from tests.architectures import FOLDER, NAMES, prompts

ROOM = 1 << 30


def opened(name: str, n_tokens: int) -> LayerwiseModel:
    plan = plan_conversion(FOLDER / name, find_file_type("F32"))
    source = PlannedWeights(FOLDER / name, plan.tensors, plan.metadata)
    return LayerwiseModel(source, n_tokens=n_tokens, threads=1, compiles=False)


def ids_of(name: str, n: int) -> list[int]:
    *_, longest = prompts(name)
    return list(longest.ids[:n])


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Iterator[LayerwiseModel]:
    with opened(request.param, 24) as model:
        model.name = request.param  # type: ignore[attr-defined]
        yield model


def seen_in(model: LayerwiseModel, index: int, x: Floats) -> tuple[dict[Key, Floats], Floats]:
    seen: dict[Key, Floats] = {}

    def observe(matrix: Matrix, inputs: Floats) -> None:
        seen[matrix.name, matrix.index] = inputs.copy()

    return seen, model.layer(index, x, observe)


def test_matrices_of_a_group_have_the_same_inputs_and_others_not(model: LayerwiseModel) -> None:
    x = model.embed(ids_of(model.name, 24))  # type: ignore[attr-defined]
    for index, layer in enumerate(model.program.layers):
        groups = shared_inputs(layer)
        seen, x = seen_in(model, index, x)
        keys = [key for group in groups for key in group.members]
        assert len(keys) == len(set(keys)) and set(seen) <= set(keys)
        firsts = []
        for group in groups:
            told = [seen[key] for key in group.members if key in seen]
            if not told:  # an expert that no token came to
                assert group.members[0][1] is not None
                continue
            # What a collector adds up is what its first member is told.
            assert group.members[0] in seen and told[0].shape[1] == group.n_columns
            assert all(np.array_equal(told[0], other) for other in told)
            firsts.append(told[0])
        for i, one in enumerate(firsts):
            assert not any(
                one.shape == two.shape and np.array_equal(one, two) for two in firsts[:i]
            )


def test_first_tokens_are_what_windows_of_one_token_are(model: LayerwiseModel) -> None:
    ids = ids_of(model.name, 5)  # type: ignore[attr-defined]
    alone = FirstTokens(model.program)
    together = np.concatenate([model.embed([token]) for token in ids])
    singly = [model.embed([token]) for token in ids]
    for index in range(len(model.program.layers)):
        if not alone.can_run(index):
            assert model.config.architecture == "gpt-oss"  # which has sinks of its own
            return
        together = alone.layer(index, together)
        singly = [model.layer(index, x) for x in singly]
        expected = np.concatenate(singly)
        assert np.abs(together - expected).max() <= 1e-3 * np.abs(expected).max()


def test_moments_are_those_of_the_text_and_of_first_tokens() -> None:
    rng = np.random.default_rng(0)
    matrix = Matrix("blk.0.attn_q.weight", None, 4, 8, np.empty((4, 0), np.uint8))  # type: ignore
    group = Inputs(8, ((matrix.name, None), ("blk.0.attn_k.weight", None)))
    text = rng.normal(size=(FEW + 44, 8)).astype(np.float32)
    first = 30 * rng.normal(size=(5, 8)).astype(np.float32)
    collector = Collector([group], n_tokens=len(text), n_first=5, whole=True)
    collector.observe(matrix, text[:100])
    collector.observe(matrix, text[100:])
    collector.observe_first(matrix, first)
    collector.finish()
    sums = collector.sums[group.members[0]]
    plain = text.T @ text / len(text)
    expected = plain + SINK * first.T @ first / 5
    assert sums.weighted is not None and sums.importance is not None
    assert np.allclose(sums.weighted, expected, rtol=1e-4, atol=1e-4)
    assert np.allclose(sums.importance, np.diagonal(plain), rtol=1e-4)
    moments = sums.take_moments()
    assert moments is not None and sums.take_moments() is None
    assert np.allclose(np.diagonal(moments), np.diagonal(expected), rtol=1e-4)
    assert np.allclose(moments[0, 1], (1 - SHRINK) * expected[0, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_columns", [1, 20, 48])
def test_moments_are_added_up_by_tiles(monkeypatch: pytest.MonkeyPatch, n_columns: int) -> None:
    monkeypatch.setattr("runtime.quality.moments.TILE", 16)
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(40, n_columns + 3)).astype(np.float32)[:, :n_columns]  # a view
    quant = np.empty((4, 0), np.uint8)
    matrix = Matrix("blk.0.ffn_down.weight", None, 4, n_columns, quant)  # type: ignore
    group = Inputs(n_columns, ((matrix.name, None),))
    collector = Collector([group], n_tokens=40, n_first=1, whole=True)
    collector.observe(matrix, inputs[:24])
    collector.observe(matrix, inputs[24:])
    collector.finish()
    weighted = collector.sums[group.members[0]].weighted
    assert weighted is not None
    assert np.allclose(weighted, inputs.T @ inputs / 40, rtol=1e-5, atol=1e-5)
    assert np.array_equal(weighted, weighted.T)


def test_of_an_expert_that_saw_few_tokens_the_diagonal_is_believed() -> None:
    matrix = Matrix("blk.0.ffn_up_exps.weight", None, 4, 8, np.empty((4, 0), np.uint8), 3)  # type: ignore
    group = Inputs(8, ((matrix.name, 3),))
    collector = Collector([group], n_tokens=1000, n_first=1, whole=True)
    inputs = np.random.default_rng(1).normal(size=(FEW - 1, 8)).astype(np.float32)
    collector.observe(matrix, inputs)
    collector.finish()
    moments = collector.sums[matrix.name, 3].take_moments()
    assert moments is not None
    assert np.allclose(moments, np.diag(np.diagonal(moments))) and moments[0, 0] > 0


def test_passes_hold_what_fits_and_at_least_one_group() -> None:
    groups = [Inputs(n, ((str(i), None),)) for i, n in enumerate((10, 10, 50, 10, 10))]
    room = 2 * groups[0].moments_bytes
    assert [[g.n_columns for g in p] for p in in_passes(groups, room)] == [[10, 10], [50], [10, 10]]
    assert [len(p) for p in in_passes(groups, 1 << 20)] == [5]


def test_shrinking_leaves_the_diagonal() -> None:
    moments = np.array([[4.0, 2.0], [2.0, 9.0]], np.float32)
    shrink(moments, 0.25)
    assert np.allclose(moments, [[4.0, 1.5], [1.5, 9.0]])


def test_values_and_keys_are_weighed_as_attention_weighs_them() -> None:
    """Against the definition: (A X)^T (A X), and the tokens' weights one by one."""
    with opened("llama", 12) as model:
        found = find_attention(model.program, 0)
        assert found is not None
        x = model.embed(ids_of("llama", 12))
        summed = AttentionMoments(model.program, 0, found, room=ROOM)
        summed.add(x)
        seen, _ = seen_in(model, 0, x)
        shape = model.program.caches[0]
        inputs = seen["blk.0.attn_v.weight", None]
        outputs = seen["blk.0.attn_output.weight", None].reshape(12, shape.n_heads, -1)
        weights = found.values.rows(slice(0, found.values.n_rows))
        values = (inputs @ weights.T).reshape(12, shape.n_kv_heads, -1)
    group = shape.n_heads // shape.n_kv_heads
    assert len(summed.values) == shape.n_kv_heads > 1
    for head, moments in enumerate(summed.values):
        # W H W^T is the square of what attention gives for these heads.
        own = weights.reshape(shape.n_kv_heads, -1, weights.shape[1])[head]
        given = outputs[:, head * group : (head + 1) * group].reshape(12 * group, -1)
        square = given.T @ given
        assert np.abs(own @ moments @ own.T - square).max() < 2e-3 * np.abs(square).max()
    assert values.shape == (12, shape.n_kv_heads, shape.value_dim)
    for moments in summed.keys:
        assert np.all(np.linalg.eigvalsh(moments.astype(np.float64)) > -1e-4 * moments.max())
    # The first query sees itself alone: nothing about its key matters there, but for later ones.
    assert all(np.diagonal(moments).max() > 0 for moments in summed.keys)


def test_moments_of_all_heads_together_are_the_sum() -> None:
    with opened("llama", 12) as model:
        found = find_attention(model.program, 0)
        assert found is not None
        x = model.embed(ids_of("llama", 12))
        each, one = (AttentionMoments(model.program, 0, found, room=r) for r in (ROOM, 1))
        each.add(x)
        one.add(x)
    assert len(one.values) == 1 and np.allclose(one.values[0], sum(each.values), rtol=1e-4)
    assert np.allclose(one.keys[0], sum(each.keys), rtol=1e-4)
    assert one.take("blk.0.attn_q.weight") is None
    assert len(one.take("blk.0.attn_v.weight") or ()) == 1 and not one.values


def test_fused_and_latent_attention_have_plain_moments() -> None:
    for name in ("phi3", "deepseek2", "gptoss"):
        with opened(name, 8) as model:
            assert find_attention(model.program, 0) is None, name
