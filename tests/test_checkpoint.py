"""Hugging Face folders: what is read, and what a broken or half-downloaded one is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gguf_tools.checkpoint import open_checkpoint
from gguf_tools.errors import CheckpointError
from tests.checkpoints import STORIES, encode, make_llama, pack, safetensors, write_config


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    written = {
        "matrix": rng.standard_normal((7, 5), dtype=np.float32),
        "half": rng.standard_normal((4, 6)).astype(np.float16),
        "double": rng.standard_normal((3, 2)),
        "vector": rng.standard_normal(9, dtype=np.float32),
        "stack": rng.standard_normal((2, 3, 4), dtype=np.float32),
        "scalar": np.full((), 3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    write_config(tmp_path, {})
    save_file(written, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path).tensors
    assert tensors.keys() == written.keys()
    for name, values in written.items():
        tensor = tensors[name]
        assert tensor.shape == values.shape
        found = tensor.load(0, tensor.n_rows)
        assert found.dtype == np.float32
        assert found.shape == (tensor.n_rows, tensor.row_length)
        np.testing.assert_array_equal(found.reshape(values.shape), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_bands_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = np.arange(60, dtype=np.float32).reshape(10, 6) - 30  # exact in all of them
    write_config(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(pack({"x": values}, dtype))
    tensor = open_checkpoint(tmp_path).tensors["x"]
    assert tensor.dtype == dtype
    for first in range(10):
        for last in range(first, 11):
            np.testing.assert_array_equal(tensor.load(first, last), values[first:last])


def test_bf16_and_f16_bits() -> None:
    """All 65536 patterns, against ml_dtypes' idea of them."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from gguf_tools.safetensors_file import _to_float32

    bits = np.arange(65536, dtype="<u2").view(np.uint8)
    for dtype, theirs in (("BF16", ml_dtypes.bfloat16), ("F16", np.float16)):
        expected = bits.view(theirs).astype(np.float32)
        found = _to_float32(bits, dtype)
        real = ~np.isnan(expected)
        assert (np.isnan(found) == ~real).all()
        assert (found[real].view(np.uint32) == expected[real].view(np.uint32)).all()


@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_shards_are_one_checkpoint(tmp_path: Path, n_shards: int) -> None:
    written = make_llama(tmp_path, n_shards=n_shards)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) == n_shards
    assert checkpoint.tensors.keys() == written.keys()
    for name, values in written.items():
        tensor = checkpoint.tensors[name]
        found = tensor.load(0, tensor.n_rows).reshape(values.shape)
        np.testing.assert_array_equal(found, values)


def test_all_shards_without_index(tmp_path: Path) -> None:
    written = make_llama(tmp_path, n_shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert open_checkpoint(tmp_path).tensors.keys() == written.keys()


def test_links_to_files_elsewhere_are_followed(tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    make_llama(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (links / file.name).symlink_to(file)
    assert open_checkpoint(links).tensors


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    make_llama(tmp_path, n_shards=4)
    for number in (2, 4):
        (tmp_path / f"model-{number:05d}-of-00004.safetensors").unlink()
    message = refusal(tmp_path)
    assert "2 of 4 files" in message
    assert "model-00002-of-00004.safetensors, model-00004-of-00004.safetensors" in message


def test_tensors_not_where_the_index_says_are_all_named(tmp_path: Path) -> None:
    written = make_llama(tmp_path, n_shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second, *_ = written
    index["weight_map"]["absent.one"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["absent.two"] = "model-00002-of-00002.safetensors"
    index["weight_map"][first], index["weight_map"][second] = (
        index["weight_map"][second],
        index["weight_map"][first],
    )
    path.write_text(json.dumps(index))
    message = refusal(tmp_path)
    for name in ("absent.one", "absent.two", first, second):
        assert name in message


def test_duplicates_over_shards_are_all_named(tmp_path: Path) -> None:
    make_llama(tmp_path, n_shards=2)
    twice = pack({"one": np.ones(4), "two": np.ones(4)})
    for file in sorted(tmp_path.glob("*.safetensors")):
        file.write_bytes(twice)
    message = refusal(tmp_path)
    assert "one is in model-00001" in message
    assert "two is in model-00001" in message


@pytest.mark.parametrize("present", [(1,), (2,), (1, 3), (2, 3)])
def test_part_of_the_shards_without_index(tmp_path: Path, present: tuple[int, ...]) -> None:
    make_llama(tmp_path, n_shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    for number in {1, 2, 3} - set(present):
        (tmp_path / f"model-{number:05d}-of-00003.safetensors").unlink()
    message = refusal(tmp_path)
    assert "expected 3 safetensors files" in message
    assert all(str(number) in message for number in {1, 2, 3} - set(present))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "pytorch_model.bin.index.json"]
)
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    message = refusal(tmp_path)
    assert "safetensors" in message
    assert "save_pretrained" in message


def test_pickles_beside_safetensors_do_not_matter(tmp_path: Path) -> None:
    make_llama(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert open_checkpoint(tmp_path).tensors


def test_what_is_not_a_checkpoint_is_told_so(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty" in refusal(empty)
    made = tmp_path / "model.gguf"
    made.write_bytes(b"GGUF\3\0\0\0")
    assert "is a GGUF file already" in refusal(made)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "is a file" in refusal(text)
    whole = tmp_path / "whole"
    make_llama(whole)
    assert str(whole) in refusal(whole / "model.safetensors").split("try ")[1]
    (whole / "config.json").unlink()
    assert "has weights but no config.json" in refusal(whole)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "LoRA adapter"),
        ("model-Q8_0.gguf", "need no conversion"),
        ("params.json", "Hugging Face form"),
        ("README.md", "not a Hugging Face checkpoint"),
    ],
)
def test_folder_without_config(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).write_text("{}")
    message = refusal(tmp_path)
    assert "has no config.json" in message or "LoRA" in message
    assert words in message


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    assert "has no weights" in refusal(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(pack({"x": np.ones(1)}))
    assert "other.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "hqq", "bits": 4}, "not known (hqq)"),
        ({"quant_method": ["fp8"]}, "not known (['fp8'])"),
        ({"quant_method": 8}, "not known (8)"),
        ({"bits": 4}, "without quant_method"),
        ("fp8", "fp8 without quant_method"),
        ([1], "without quant_method"),
    ],
)
def test_unknown_quantisations_are_named(tmp_path: Path, quantization: object, words: str) -> None:
    make_llama(tmp_path, quantization_config=quantization)
    message = refusal(tmp_path)
    assert "quantised already" in message
    assert words in message
    assert "compressed-tensors, fbgemm_fp8, fp8" in message


@pytest.mark.parametrize("quantization", [None, {}])
def test_an_empty_quantisation_is_none(tmp_path: Path, quantization: object) -> None:
    make_llama(tmp_path, quantization_config=quantization)
    assert open_checkpoint(tmp_path).tensors


def test_reading_an_unreadable_dtype_names_it(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    header = {"w": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, bytes(4)))
    tensor = open_checkpoint(tmp_path).tensors["w"]
    with pytest.raises(CheckpointError, match="tensor w is F8_E4M3"):
        tensor.load(0, 1)


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "copy")
    folder = tmp_path / "copy"
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:200_000])
    tensor = checkpoint.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match="has shrunk"):
        tensor.load(0, 1)


def test_double_overflow_is_infinity_here(tmp_path: Path) -> None:
    """Conversion reports it with its position; reading does not warn."""
    write_config(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(pack({"x": np.array([1e300, 1.0])}, "F64"))
    values = open_checkpoint(tmp_path).tensors["x"].load(0, 1)
    assert np.isinf(values[0, 0])
    assert encode(values[0, 1:], "F32") == encode(np.ones(1), "F32")
