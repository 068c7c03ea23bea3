"""The formats that have kernels of their own, by ggml's name."""

from runtime.kernels import (
    floats,
    iq4_nl,
    iq4_xs,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
)
from runtime.kernels.formats import FormatKernels

FORMATS: dict[str, FormatKernels] = {
    "F32": floats.F32,
    "F16": floats.F16,
    "BF16": floats.BF16,
    "Q4_0": q4_0.KERNELS,
    "Q4_1": q4_1.KERNELS,
    "Q5_0": q5_0.KERNELS,
    "Q5_1": q5_1.KERNELS,
    "Q8_0": q8_0.KERNELS,
    "Q2_K": q2_k.KERNELS,
    "Q3_K": q3_k.KERNELS,
    "Q4_K": q4_k.KERNELS,
    "Q5_K": q5_k.KERNELS,
    "Q6_K": q6_k.KERNELS,
    "IQ4_NL": iq4_nl.KERNELS,
    "IQ4_XS": iq4_xs.KERNELS,
}
