"""Weights: mapped or in memory."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from gguf_tools.errors import DeviceError
from gguf_tools.reader import GGUFFile
from runtime.model import Model
from tests.tiny import llama_file


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
