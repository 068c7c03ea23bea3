"""What is said where a GPU cannot be used."""

from importlib.util import find_spec

import pytest

from runtime.backends.cuda_toolkit import REMEDY, missing_packages
from runtime.devices import Device
from runtime.offload import why_unusable

GIB = 1 << 30


def test_an_old_gpu() -> None:
    told = why_unusable(Device("cuda:0", "an old one", GIB, GIB, (5, 2)))
    assert told == "cuda:0 (an old one) has compute capability 5.2, and 6.1 is needed"


def test_missing_packages() -> None:
    missing = missing_packages()
    if missing is None:
        pytest.skip("the CUDA extra is installed")
    lacks = "the CUDA toolkit lacks" if find_spec("numba_cuda") else "the CUDA extra is needed"
    assert missing.startswith(lacks) and missing.endswith(REMEDY)
    told = why_unusable(Device("cuda:1", "a GPU", GIB, GIB, (9, 0)))
    assert told == f"cuda:1 (a GPU) cannot be used: {missing}"
