"""Scales of channels: which are chosen, what they save, and files that are made with them."""

from pathlib import Path

import numpy as np
import pytest

from gguf_tools.calibration import Calibrated, Settings, calibrate
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile, TensorInfo
from gguf_tools.recipes import find_file_type
from gguf_tools.self_check import Source
from runtime.model import Model
from runtime.program import Floats
from runtime.quality.channel_scaling import MOST, Factors, Reader, find_factors, find_scale, sampled
from runtime.quality.foldable import Columns, Elements, Group, Rows
from runtime.quality.rounding import Rounding
from runtime.sources import PlannedWeights
from runtime.tokenizer import Tokenizer
from tests.checkpoints import STORIES

ROOT = Path(__file__).resolve().parent.parent
K = 64


def group_of(channels: np.ndarray) -> Group:
    n_channels = int(channels.max()) + 1
    return Group(0, n_channels, (Rows("v", 0),), (Columns("o", None),), channels)


def reader_of(quant: str, inputs: Floats, weights: Floats | None = None) -> Reader:
    if weights is None:
        weights = np.random.default_rng(3).normal(0, 0.02, (96, len(inputs))).astype(np.float32)
    return Reader(weights, by_name(quant), (inputs**2).astype(np.float32))


def loss(reader: Reader, columns: Floats) -> float:
    """By the definition: the error of the outputs, of inputs that have nothing in common."""
    assert reader.quant.quantize is not None
    scaled = (reader.weights * columns).astype(np.float32)
    importance = (reader.importance / columns**2).astype(np.float32)
    made = reader.quant.dequantize(reader.quant.quantize(scaled, importance))
    return float((((made / columns) - reader.weights) ** 2 * reader.importance).sum())


def loud(n: int, factor: float = 30.0) -> Floats:
    """Inputs of which every eighth is so much larger."""
    inputs = np.ones(n, np.float32)
    inputs[::8] = factor
    return inputs


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_1", "IQ4_NL", "Q8_0"])
def test_loud_channels_are_rounded_more_finely(quant: str) -> None:
    reader = reader_of(quant, loud(K))
    scale = find_scale(group_of(np.arange(K)), [reader], threads=2)
    assert scale is not None and scale.shape == (K,)
    assert scale[::8].min() > 1.5 * np.delete(scale, np.s_[::8]).max()
    assert np.isclose(np.log(scale).mean(), 0, atol=1e-5)
    assert loss(reader, scale) < 0.8 * loss(reader, np.ones(K, np.float32))


def test_uneven_columns_are_made_even() -> None:
    sizes = np.exp(np.random.default_rng(4).normal(0, 0.7, K)).astype(np.float32)
    weights = reader_of("Q4_0", np.ones(K, np.float32)).weights * sizes
    reader = reader_of("Q4_0", 1 / sizes, weights)
    scale = find_scale(group_of(np.arange(K)), [reader], threads=1)
    assert scale is not None
    assert loss(reader, scale) < 0.6 * loss(reader, np.ones(K, np.float32))


def test_heads_that_share_values_share_a_scale() -> None:
    channels = np.tile(np.arange(16), 4)  # four query heads
    reader = reader_of("Q4_0", loud(K))
    scale = find_scale(group_of(channels), [reader], threads=1)
    assert scale is not None and scale.shape == (16,)
    assert scale[[0, 8]].min() > 1 > np.delete(scale, [0, 8]).max()


def test_nothing_is_scaled_where_it_saves_nothing() -> None:
    even = np.ones(K, np.float32)
    group = group_of(np.arange(K))
    signs = np.sign(np.random.default_rng(5).normal(size=(32, K))).astype(np.float32)
    assert find_scale(group, [reader_of("Q4_0", even, 8 * signs)], threads=1) is None
    assert find_scale(group, [reader_of("Q4_0", loud(K), 0 * signs)], threads=1) is None  # no loss
    assert find_scale(group, [reader_of("Q4_0", 0 * even)], threads=1) is None  # no input
    assert find_scale(group, [], threads=1) is None


def test_weights_that_were_trained_for_their_type_stay_as_they_are() -> None:
    """They lose nothing, whatever their inputs: scaled, they would not be what they were."""
    rng = np.random.default_rng(9)
    levels = rng.integers(-8, 8, (96, K // 32, 32))
    levels[::2, :, 0] = -8  # some blocks reach that far, others need not
    weights = levels * rng.uniform(0.01, 0.02, (96, K // 32, 1)).astype(np.float16)
    trained = weights.reshape(96, K).astype(np.float32)
    reader = reader_of("Q4_0", loud(K), trained)
    assert find_scale(group_of(np.arange(K)), [reader], threads=1) is None


def test_silent_channels_and_outliers_stay_within_bounds() -> None:
    inputs = np.ones(K, np.float32)
    inputs[:8], inputs[-1] = 0, 1e6
    weights = reader_of("Q4_0", inputs).weights.copy()
    weights[:, 5] = 0
    scale = find_scale(group_of(np.arange(K)), [reader_of("Q4_0", inputs, weights)], threads=1)
    assert scale is not None and np.isfinite(scale).all()
    assert scale.min() >= 1 / MOST and scale.max() <= MOST


def test_samples_come_from_all_over_a_matrix() -> None:
    weights = np.repeat(np.arange(4096, dtype=np.float32)[:, None], 1024, axis=1)
    some = sampled(weights, 1)[:, 0]
    assert 512 <= len(some) < 1024 and some[0] == 0 and some[-1] > 4000
    assert len(sampled(weights, 1000)) >= 8
    assert len(sampled(weights[:5], 1)) == 5


def test_factors_of_vectors_stacks_and_their_biases() -> None:
    f32 = by_name("F32")
    shapes = {"up": (3, 4, 2), "up.bias": (3, 4), "down": (3, 5, 4), "norm": (6,)}
    tensors = {name: TensorInfo(name, f32, shape, 0, 0) for name, shape in shapes.items()}
    scale = np.array([1, 2, 4, 8], np.float32)
    group = Group(
        0,
        4,
        (Rows("up", 4), Elements("up.bias", 0, 1), Elements("norm", 2)),
        (Columns("down", 1),),
        np.arange(4),
    )
    found = find_factors([(group, scale)], tensors)
    ones = {name: np.ones((int(np.prod(s[:-1])), s[-1]), np.float32) for name, s in shapes.items()}
    scaled = {name: found[name].apply(each) for name, each in ones.items()}
    expected = {name: each.copy() for name, each in ones.items()}
    expected["up"][4:8] /= scale[:, None]
    expected["up.bias"][1] /= scale
    expected["down"][5:10] *= scale
    expected["norm"][0, 2:] /= scale
    for name, each in expected.items():
        assert np.array_equal(scaled[name], each), name
    assert np.array_equal(found["down"].apply(ones["down"][3:7], 3), expected["down"][3:7])


def test_moments_of_inputs_are_scaled_with_them() -> None:
    inputs = np.random.default_rng(6).normal(size=(50, 8)).astype(np.float32)
    columns = np.exp(np.random.default_rng(7).normal(size=(2, 8))).astype(np.float32)
    factors = {"a_exps": Factors(np.ones(8, np.float32), columns)}
    nothing = PlannedWeights(Path(), (), {})
    rounding = Rounding(nothing, {}, "best", 1, factors=factors)
    for index in (0, 1):
        divided = inputs / columns[index]
        squares = rounding.divided(("a_exps", index), (inputs**2).mean(axis=0))
        assert np.allclose(squares, (divided**2).mean(axis=0), rtol=1e-5)
        moments = rounding.divided(("a_exps", index), inputs.T @ inputs)
        assert np.allclose(moments, divided.T @ divided, rtol=1e-4, atol=1e-4)
    assert rounding.divided(("another", None), squares) is squares


def made_by(method: str, text: Path, target: Path) -> Path:
    path = target / f"{method}.gguf"
    plan = plan_conversion(STORIES, find_file_type("Q4_0"))
    *_, last = calibrate(
        plan,
        Source(STORIES, is_checkpoint=True),
        path,
        Settings(text, method, 4),
        inputs=[STORIES],
        threads=1,
        force=False,
        resume=False,
    )
    assert isinstance(last, Calibrated)
    assert "30 of 30 matrices" in last.line
    for _ in convert(last.plan, path, threads=1):
        pass
    return path


def test_files_differ_less_from_their_source(tmp_path: Path) -> None:
    """Norms are scaled, too, and the file is one like any other."""
    text = tmp_path / "prose.txt"
    prose = (ROOT / "tests" / "data" / "prose.txt").read_text()
    text.write_text(prose * 8)
    methods = ("imatrix", "awq", "best")
    plain, scaled, best = (made_by(method, text, tmp_path) for method in methods)
    whole = tmp_path / "whole.gguf"
    for _ in convert(plan_conversion(STORIES, find_file_type("F32")), whole, threads=1):
        pass
    with GGUFFile(whole) as file:
        ids = Tokenizer(file.metadata).encode(prose)[:256]
    logits = {}
    for path in (whole, plain, scaled, best):
        with GGUFFile(path) as file, Model.load(file, n_ctx=256, threads=1) as model:
            logits[path] = model.forward(ids, all_logits=True)
    errors = [np.abs(logits[path] - logits[whole]).mean() for path in (plain, scaled, best)]
    assert errors[1] < errors[0] and errors[2] < 0.9 * errors[0], errors
    name = "blk.0.attn_norm.weight"
    with GGUFFile(plain) as first, GGUFFile(scaled) as second, GGUFFile(best) as third:
        assert second.metadata["gguf_tools.calibration.method"] == "awq"
        assert np.allclose(first.load("output_norm.weight"), second.load("output_norm.weight"))
        assert not np.allclose(first.load(name), second.load(name))
        assert np.allclose(second.load(name), third.load(name))
        types = [
            [(t.name, t.quant.name) for t in file.tensors.values()] for file in (first, second)
        ]
    assert types[0] == types[1]
