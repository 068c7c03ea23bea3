import numpy as np
import pytest
from numba import config

from runtime.backends import cuda_check
from runtime.kernels.cuda.tiles import TILES


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator, being slow, checks the formats of a model only in the test of that."""
    if config.ENABLE_CUDASIM:
        monkeypatch.setattr(cuda_check, "_checked", {(0, name) for name in TILES})
