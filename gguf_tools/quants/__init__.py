"""ggml's types, one file per format: what the bytes of a tensor mean.

`QUANTS` lists every type a GGUF file can hold. Importing this package costs little: compilers are
loaded when something is quantised for the first time.
"""

from gguf_tools.errors import UnsupportedQuantError, printable
from gguf_tools.quants.bf16 import BF16
from gguf_tools.quants.f16 import F16
from gguf_tools.quants.f32 import F32
from gguf_tools.quants.iq4_nl import IQ4_NL
from gguf_tools.quants.iq4_xs import IQ4_XS
from gguf_tools.quants.plain_numbers import F64, I8, I16, I32, I64
from gguf_tools.quants.q1_0 import Q1_0
from gguf_tools.quants.q2_0 import Q2_0
from gguf_tools.quants.q2_k import Q2_K
from gguf_tools.quants.q3_k import Q3_K
from gguf_tools.quants.q4_0 import Q4_0
from gguf_tools.quants.q4_1 import Q4_1
from gguf_tools.quants.q4_k import Q4_K
from gguf_tools.quants.q5_0 import Q5_0
from gguf_tools.quants.q5_1 import Q5_1
from gguf_tools.quants.q5_k import Q5_K
from gguf_tools.quants.q6_k import Q6_K
from gguf_tools.quants.q8_0 import Q8_0
from gguf_tools.quants.q8_1 import Q8_1
from gguf_tools.quants.q8_k import Q8_K
from gguf_tools.quants.quanttype import QuantType
from gguf_tools.quants.read_only import READ_ONLY

__all__ = ["QUANTS", "QuantType", "by_id", "by_name"]

QUANTS: tuple[QuantType, ...] = (
    *(F32, F16, BF16),
    *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS),
    *(Q1_0, Q2_0, Q8_1, Q8_K),
    *READ_ONLY,
    *(I8, I16, I32, I64, F64),
)

_BY_ID = {quant.type_id: quant for quant in QUANTS}
_BY_NAME = {quant.name: quant for quant in QUANTS}


def by_id(type_id: int) -> QuantType:
    """The type with this number in GGUF files."""
    found = _BY_ID.get(type_id)
    if found is None:
        known = ", ".join(f"{quant.type_id} {quant.name}" for quant in _sorted())
        raise UnsupportedQuantError(f"tensor type {type_id} is not known; known are {known}")
    return found


def by_name(name: str) -> QuantType:
    """The type ggml calls so, such as `Q4_K`."""
    found = _BY_NAME.get(name)
    if found is None:
        known = ", ".join(quant.name for quant in _sorted())
        raise UnsupportedQuantError(f"type {printable(name)} is not known; known are {known}")
    return found


def _sorted() -> list[QuantType]:
    return sorted(QUANTS, key=lambda quant: quant.type_id)
