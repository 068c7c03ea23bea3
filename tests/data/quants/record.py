"""Record what ggml makes of the sample weights: python record.py PATH/libggml-base.so

Writes two files beside this one: the bytes of the hard rows and of a few plain ones, and the
SHA-256 of many plain ones; ggml.npz without an importance matrix, ggml-weighted.npz with one.
"""

import ctypes
import hashlib
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent.parent))

from gguf_tools.quants import QUANTS  # noqa: E402
from tests.quants.samples import hard_matrix, importance, plain_rows  # noqa: E402

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

    def quantize(
        self, type_id: int, row_bytes: int, weights: np.ndarray, column_weights: np.ndarray | None
    ) -> np.ndarray:
        """(n_rows, row_bytes), as llama-quantize makes them."""
        weights = np.ascontiguousarray(weights, np.float32)
        n_rows, k = weights.shape
        data = np.zeros((n_rows, row_bytes), np.uint8)
        written = self.functions.ggml_quantize_chunk(
            *(type_id, weights.ctypes.data, data.ctypes.data, 0, n_rows, k),
            None if column_weights is None else column_weights.ctypes.data,
        )
        if written != data.size:
            raise SystemExit(f"type {type_id}: ggml wrote {written} bytes, expected {data.size}")
        return data


def main(path: str) -> None:
    library = Library(path)
    samples = {"hard": hard_matrix(), "few": plain_rows(*FEW), "many": plain_rows(*MANY, seed=3)}
    for file, weighted in (("ggml.npz", False), ("ggml-weighted.npz", True)):
        answers = record(library, samples, weighted=weighted)
        np.savez_compressed(HERE / file, **answers)
        print(f"{len(answers)} answers of {path}")


def record(
    library: Library, samples: dict[str, np.ndarray], *, weighted: bool
) -> dict[str, np.ndarray]:
    answers = {}
    for quant in QUANTS:
        if quant.name not in NAMES:
            continue
        for sample, weights in samples.items():
            row_bytes = quant.row_bytes(weights.shape[1])
            column_weights = importance(weights.shape[1]) if weighted else None
            data = library.quantize(quant.type_id, row_bytes, weights, column_weights)
            if sample == "many":
                data = np.frombuffer(hashlib.sha256(data.tobytes()).digest(), np.uint8)
            answers[f"{quant.name} {sample}"] = data
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
