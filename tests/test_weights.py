"""Tensors by name and shape: experts stacked, or one tensor each; weights copied to memory."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from gguf_tools.errors import DeviceError, MissingTensorError
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from gguf_tools.writer import GGUFWriter, TensorSpec
from runtime.model import Model
from runtime.weights import Weights
from tests.tiny import llama_file

STACKED = "blk.0.ffn_up_exps.weight"


def write(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> GGUFFile:
    """A file of these tensors: a type and float32 weights each."""
    specs = [TensorSpec(name, by_name(kind), w.shape) for name, (kind, w) in tensors.items()]
    metadata = {"general.architecture": Value("str", "llama")}
    with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
        for name, (kind, weights) in tensors.items():
            quantize = by_name(kind).quantize
            assert quantize is not None
            writer.write(name, quantize(weights.reshape(-1, weights.shape[-1])))
    return GGUFFile(path)


def singles(weights: np.ndarray, kinds: Mapping[int, str]) -> dict[str, tuple[str, np.ndarray]]:
    return {
        f"blk.0.ffn_up.{i}.weight": (kinds.get(i, "Q8_0"), expert)
        for i, expert in enumerate(weights)
    }


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 6, 32)).astype(np.float32)


def test_stacked_and_single_experts_are_the_same(weights: np.ndarray, tmp_path: Path) -> None:
    stacked = Weights(write(tmp_path / "a.gguf", {STACKED: ("Q8_0", weights)}))
    single = Weights(write(tmp_path / "b.gguf", singles(weights, {})))
    for a, b in zip(
        stacked.experts(STACKED, 4, 6, 32), single.experts(STACKED, 4, 6, 32), strict=True
    ):
        assert np.array_equal(a.rows(slice(None)), b.rows(slice(None)))
        assert (b.n_rows, b.n_columns, b.quant.name) == (6, 32, "Q8_0")
    stacked.finish()
    single.finish()


def test_every_missing_expert_is_named(weights: np.ndarray, tmp_path: Path) -> None:
    tensors = singles(weights, {})
    del tensors["blk.0.ffn_up.2.weight"]
    found = Weights(write(tmp_path / "a.gguf", tensors))
    assert len(found.experts(STACKED, 4, 6, 32)) == 4
    with pytest.raises(MissingTensorError, match=r"blk\.0\.ffn_up\.2\.weight is missing$"):
        found.finish()


def test_experts_that_are_too_many_or_misshapen(weights: np.ndarray, tmp_path: Path) -> None:
    found = Weights(write(tmp_path / "a.gguf", singles(weights, {})))
    found.experts(STACKED, 3, 6, 32)
    with pytest.raises(MissingTensorError, match=r"blk\.0\.ffn_up\.3\.weight is not expected"):
        found.finish()
    found = Weights(write(tmp_path / "b.gguf", singles(weights, {})))
    found.experts(STACKED, 4, 5, 32)
    with pytest.raises(MissingTensorError, match=r"ffn_up\.0\.weight is 6 x 32, expected 5 x 32"):
        found.finish()


def test_experts_of_different_types(weights: np.ndarray, tmp_path: Path) -> None:
    found = Weights(write(tmp_path / "a.gguf", singles(weights, {2: "Q4_0"})))
    found.experts(STACKED, 4, 6, 32)
    with pytest.raises(MissingTensorError, match=r"ffn_up\.2\.weight is Q4_0, and .* Q8_0"):
        found.finish()


def test_none_of_the_experts(tmp_path: Path) -> None:
    some = {"x": ("F32", np.ones((1, 32), np.float32))}
    found = Weights(write(tmp_path / "a.gguf", some))
    found.experts(STACKED, 4, 6, 32)
    with pytest.raises(MissingTensorError, match=r"blk\.0\.ffn_up_exps\.weight is missing"):
        found.finish()


def test_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama_file(tmp_path / "m.gguf", tied=False)
    with GGUFFile(path) as file:
        with Model.load(file) as model:
            mapped = model.forward([1, 2, 3])
        with Model.load(file, in_memory=True) as model:
            assert np.array_equal(model.forward([1, 2, 3]), mapped)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(DeviceError, match=r"1,000 bytes of memory are free.*--mmap"):
            Model.load(file, in_memory=True)
