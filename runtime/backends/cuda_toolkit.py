"""Whether the packages that the CUDA backend needs are here. Imports none of the heavy ones."""

from __future__ import annotations

from importlib.util import find_spec

REMEDY = "pip install 'gguf-tools[cuda]'"
LIBRARIES = ("nvvm", "nvrtc")  # what numba-cuda makes code with
LEAST_CAPABILITY = (6, 1)  # of a GPU: the kernels multiply four int8 at a time


def missing_packages() -> str | None:
    """What is missing, and the remedy; None when kernels can be compiled."""
    if find_spec("numba_cuda") is None:
        return f"the CUDA extra is needed: {REMEDY}"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    for library in LIBRARIES:
        try:
            load_nvidia_dynamic_lib(library)
        except DynamicLibNotFoundError:
            return f"the CUDA toolkit lacks {library}: {REMEDY}"
    return None
