"""The formats that have kernels of their own, by ggml's name.

A format's module is read when it is first asked for: a model has two or three of them, and all
would take a tenth of the time to its first token.
"""

import importlib
from collections.abc import Iterator, Mapping

from runtime.kernels.formats import FormatKernels

PLACES = {  # module of runtime.kernels, and the name there
    "F32": ("floats", "F32"),
    "F16": ("floats", "F16"),
    "BF16": ("floats", "BF16"),
    **{
        name: (name.lower(), "KERNELS")
        for name in (
            *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
            *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
            *("IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4", "NVFP4", "Q2_0", "Q1_0"),
        )
    },
}


class Formats(Mapping[str, FormatKernels]):
    """The kernels of each format in PLACES."""

    def __getitem__(self, name: str) -> FormatKernels:
        module, attribute = PLACES[name]
        kernels: FormatKernels = getattr(
            importlib.import_module(f"runtime.kernels.{module}"), attribute
        )
        return kernels

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)

    def __contains__(self, name: object) -> bool:
        return name in PLACES


FORMATS = Formats()
