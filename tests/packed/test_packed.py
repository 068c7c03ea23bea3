"""Quantised checkpoints: what each scheme's library reads out of what it wrote, to the last bit."""

from pathlib import Path

import numpy as np
import pytest

from gguf_tools import conversion
from gguf_tools.checkpoint import open_checkpoint
from gguf_tools.packed import columns
from gguf_tools.reader import GGUFFile
from tests.packed.recorded import NAMES, make, read
from tests.test_conversion import convert_to, expected_tensors

# Where the library itself rounds to 16 bits what we keep in 32.
ROUNDED = {"ct-nvfp4": 2.0**-8, "bnb-int8": 2.0**-22}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_what_the_library_reads(tmp_path: Path, name: str) -> None:
    weights = make(tmp_path / "model", read(name))
    plan = convert_to(tmp_path / "model", tmp_path / "out.gguf")
    expected = expected_tensors(weights, 4, 2)
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert set(file.tensors) == set(expected)
        for tensor, values in expected.items():
            np.testing.assert_allclose(
                file.load(tensor), values, rtol=ROUNDED.get(name, 0), atol=0, err_msg=tensor
            )
    assert "quantised already" in plan.notes[-1]


@pytest.mark.parametrize("name", NAMES)
def test_bands_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each row alone is what all rows together are."""
    make(tmp_path / "model", read(name))
    for tensor in open_checkpoint(tmp_path / "model").tensors.values():
        whole = tensor.load(0, tensor.n_rows)
        rows = [tensor.load(row, row + 1) for row in range(tensor.n_rows)]
        np.testing.assert_array_equal(np.concatenate(rows), whole)
    monkeypatch.setattr(conversion, "BAND", 64 * 7)
    convert_to(tmp_path / "model", tmp_path / "bands.gguf", "Q8_0")
    monkeypatch.undo()
    plan = convert_to(tmp_path / "model", tmp_path / "whole.gguf", "Q8_0")
    assert (tmp_path / "bands.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert "Q8_0 quantise its weights a second time" in plan.notes[-1]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.startswith(("gptq", "awq", "bnb"))]
)
def test_panels_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Columns read in panels narrower than a band."""
    make(tmp_path / "model", read(name))
    tensors = open_checkpoint(tmp_path / "model").tensors
    whole = {key: tensor.load(0, tensor.n_rows) for key, tensor in tensors.items()}
    monkeypatch.setattr(columns, "PANEL_BYTES", 256)
    monkeypatch.setattr(columns, "READ_BYTES", 500)
    for key, tensor in open_checkpoint(tmp_path / "model").tensors.items():
        np.testing.assert_array_equal(tensor.load(0, tensor.n_rows), whole[key])
