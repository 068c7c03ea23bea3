"""Record what ggml makes of the sample weights: python record.py PATH/libggml-base.so

Writes ggml.npz beside this file: the bytes of the hard rows and of a few plain ones, and the
SHA-256 of many plain ones, for every type the library quantises without an importance matrix.
"""

import ctypes
import hashlib
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent.parent))

from gguf_tools.quants import QUANTS  # noqa: E402
from tests.quants.samples import hard_matrix, plain_rows  # noqa: E402

NAMES = (
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
FEW, MANY = (12, 512), (700, 1024)  # rows, width


class Library:
    """libggml-base, called through ctypes."""

    def __init__(self, path: str) -> None:
        self.functions = ctypes.CDLL(path)
        self.functions.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.functions.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]

    def quantize(self, type_id: int, row_bytes: int, weights: np.ndarray) -> np.ndarray:
        """(n_rows, row_bytes), as llama-quantize makes them without an importance matrix."""
        weights = np.ascontiguousarray(weights, np.float32)
        n_rows, k = weights.shape
        data = np.zeros((n_rows, row_bytes), np.uint8)
        written = self.functions.ggml_quantize_chunk(
            type_id, weights.ctypes.data, data.ctypes.data, 0, n_rows, k, None
        )
        if written != data.size:
            raise SystemExit(f"type {type_id}: ggml wrote {written} bytes, expected {data.size}")
        return data


def main(path: str) -> None:
    library = Library(path)
    samples = {"hard": hard_matrix(), "few": plain_rows(*FEW), "many": plain_rows(*MANY, seed=3)}
    answers = {}
    for quant in QUANTS:
        if quant.name not in NAMES:
            continue
        for sample, weights in samples.items():
            row_bytes = quant.row_bytes(weights.shape[1])
            data = library.quantize(quant.type_id, row_bytes, weights)
            if sample == "many":
                data = np.frombuffer(hashlib.sha256(data.tobytes()).digest(), np.uint8)
            answers[f"{quant.name} {sample}"] = data
    np.savez_compressed(HERE / "ggml.npz", **answers)
    print(f"{len(answers)} answers of {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
