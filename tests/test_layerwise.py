"""Models run layer by layer from a checkpoint's own weights, or from a GGUF file's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.writer import GGUFWriter, TensorSpec
from runtime.backends import streaming
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.layerwise import LayerwiseModel
from runtime.model import Model
from runtime.sources import PlannedWeights, Source
from runtime.streamed_rows import StreamedRows
from tests.architectures import FOLDER, NAMES, converted, prompts


def planned(folder: Path) -> PlannedWeights:
    plan = plan_conversion(folder, find_file_type("Q8_0"))
    return PlannedWeights(folder, plan.tensors, plan.metadata)


def ids_of(name: str, n: int) -> list[int]:
    *_, longest = prompts(name)
    return list(longest.ids[:n])


def write_like(source: Path, target: Path, kind: str) -> Path:
    """The file with its first matrix in another type."""
    name, quant = "blk.0.ffn_up.weight", by_name(kind)
    with GGUFFile(source) as file:
        specs = [
            TensorSpec(t.name, quant if t.name == name else t.quant, t.shape)
            for t in file.tensors.values()
        ]
        metadata = {key: file.encoded(key) for key in file.metadata}
        with GGUFWriter(target, metadata=metadata, tensors=specs) as writer:
            for tensor in file.tensors.values():
                blocks = file.raw(tensor.name)
                if tensor.name == name:
                    blocks = np.random.default_rng(0).integers(
                        0, 40, (tensor.n_rows, quant.row_bytes(tensor.row_length)), np.uint8
                    )
                writer.write(tensor.name, blocks)
    return target


@contextmanager
def layerwise(source: Source, ids: list[int], threads: int = 1) -> Iterator[LayerwiseModel]:
    with LayerwiseModel(source, n_tokens=len(ids), threads=threads) as model:
        yield model


def whole(path: Path, ids: list[int]) -> np.ndarray:
    """The logits of a file run as `run` does."""
    with GGUFFile(path) as file, Model.load(file, n_ctx=len(ids), threads=1) as model:
        return model.forward(ids, all_logits=True)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_gives_the_logits_of_its_file(name: str, tmp_path: Path) -> None:
    ids = ids_of(name, 40)
    path = converted(name, tmp_path)
    expected = whole(path, ids)
    with layerwise(planned(FOLDER / name), ids) as model:
        (got,) = model.logits([ids])
    # Weights are the same numbers; only a product's type, and so the order of its sums, may differ.
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "phi3", "deepseek2", "mixtral", "gptoss"])
def test_bands_and_windows_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(name, 24)
    windows = [ids, ids[5:9], ids[:1]]
    with layerwise(planned(FOLDER / name), ids) as model:
        expected = list(model.logits(windows))
    monkeypatch.setattr(streaming, "BAND_BYTES", 1)  # 32 rows at a time
    with layerwise(planned(FOLDER / name), ids, threads=2) as model:
        for got, one in zip(model.logits(windows), expected, strict=True):
            assert np.array_equal(got, one)
    assert [len(one) for one in expected] == [24, 4, 1]


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi3", "starcoder2"])
def test_the_head_is_read_once_in_bands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more tokens than there is room for all logits of; the observer is told once."""
    ids = ids_of(name, 24)
    told: list[np.ndarray] = []
    source = planned(FOLDER / name)
    with layerwise(source, ids) as model:
        (expected,) = model.logits([ids])
    monkeypatch.setattr(streaming, "BAND_ROWS", 7)
    read: list[tuple[str, int, int]] = []
    rows = source.rows

    def watched(name: str, first: int, last: int) -> np.ndarray:
        read.append((name, first, last))
        return rows(name, first, last)

    source.rows = watched  # type: ignore[method-assign]
    with layerwise(source, ids) as model:
        x = model.embed(ids)
        for index in range(len(model.program.layers)):
            x = model.layer(index, x)
        read.clear()
        got = model.head(x, lambda matrix, inputs: told.append(inputs.copy()))
    assert np.array_equal(got, expected)
    assert [len(inputs) for inputs in told] == [24]
    heights = [last - first for _, first, last in read]
    assert len(heights) >= 4 and sum(heights) == got.shape[1]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q8_0"])
def test_quantised_file_gives_what_it_gives_whole(file_type: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    plan = plan_conversion(FOLDER / "llama", find_file_type(file_type))
    for _ in convert(plan, path, threads=1):
        pass
    ids = ids_of("llama", 24)
    with GGUFFile(path) as file, layerwise(file, ids, threads=2) as model:
        (got,) = model.logits([ids])
    assert np.array_equal(got, whole(path, ids))


def test_formats_without_kernels(tmp_path: Path) -> None:
    """Q8_1 has none: NumPy multiplies."""
    path = write_like(converted("llama", tmp_path), tmp_path / "x.gguf", "Q8_1")
    ids = ids_of("llama", 8)
    with GGUFFile(path) as file, layerwise(file, ids) as model:
        (got,) = model.logits([ids])
    assert np.array_equal(got, whole(path, ids))


def test_some_layers_are_the_model_without_the_others(tmp_path: Path) -> None:
    ids = ids_of("llama", 24)
    with GGUFFile(converted("llama", tmp_path)) as file:
        last = read_config(file).n_layers - 1
        with layerwise(file, ids) as model:
            x = model.embed(ids)
            expected = model.head(model.layer(last, model.layer(0, x)))
        with LayerwiseModel(file, n_tokens=24, threads=1, layers=[0, last]) as model:
            (got,) = model.logits([ids])
    assert np.array_equal(got, expected)


def test_no_weight_is_read_before_it_is_needed() -> None:
    """A layer's matrices are read when it runs; of the embedding only the rows asked for."""
    source = planned(FOLDER / "llama")
    names: list[str] = []
    rows = source.rows

    def watched(name: str, first: int, last: int) -> np.ndarray:
        names.append(name)
        return rows(name, first, last)

    source.rows = watched  # type: ignore[method-assign]
    with layerwise(source, [1, 2, 3]) as model:
        assert not [name for name in names if len(source.tensors[name].shape) > 1]
        names.clear()
        x = model.embed([1, 2, 3])
        assert names == ["token_embd.weight"]
        names.clear()
        model.layer(0, x)
        assert names and all(name.startswith("blk.0.") for name in names)


def test_smollm2(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    folder = smollm2_checkpoint
    path = tmp_path / "x.gguf"
    for _ in convert(plan_conversion(folder, find_file_type("BF16")), path, threads=2):
        pass
    ids = [1, 504, 2365, 6354, 18205, 690, 260, 14732, 2767, 30]
    expected = whole(path, ids)
    with layerwise(planned(folder), ids, threads=2) as model:
        (got,) = model.logits([ids])
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_streamed_rows_are_read_as_an_array_is() -> None:
    data = np.arange(60, dtype=np.uint8).reshape(10, 6)
    rows = StreamedRows(lambda first, last: data[first:last], 0, 10, 6)
    assert rows.shape == data.shape and rows.size == rows.nbytes == data.nbytes
    assert np.array_equal(np.asarray(rows[2:7][1:3]), data[3:5])
    assert len(rows[8:99]) == 2 and len(rows[5:2]) == 0
    chosen = np.array([0, 1, 2, 9, 3, 3])
    assert np.array_equal(rows[chosen], data[chosen])
    assert rows[chosen[:0]].shape == (0, 6)
    with pytest.raises(IndexError):
        rows[np.array([10])]
    with pytest.raises(ValueError, match="by 2"):
        rows[::2]


def test_streamed_program_has_no_weights(tmp_path: Path) -> None:
    with GGUFFile(converted("qwen3moe", tmp_path)) as file:
        program = build_program(file, read_config(file), stream=True)
    assert isinstance(program.embedding.data, StreamedRows)
