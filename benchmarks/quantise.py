"""How fast weights are quantised: python benchmarks/quantise.py [--ggml PATH/libggml-base.so]

Millions of weights a second on one thread, and on all of them with --threads; medians of rounds in
which every type and both programs take turns, so that a busy moment hits all alike. With --ggml
the same rows go through ggml's own routines, and the bytes are compared. With --imatrix both weigh
errors by an importance of the columns, which is another algorithm.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from gguf_tools.quants import QUANTS, QuantType


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", metavar="LIBRARY", help="libggml-base, to compare with")
    parser.add_argument("--imatrix", action="store_true", help="weigh errors by column")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1024, help="rows of 4096 weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("types", nargs="*", help="such as Q4_K; default: all that can be made")
    options = parser.parse_args()

    weights = np.random.default_rng(0).standard_normal((options.rows, 4096), np.float32)
    columns = np.random.default_rng(1).random(4096, np.float32) if options.imatrix else None
    library = ctypes.CDLL(options.ggml) if options.ggml else None
    quants = [quant for quant in QUANTS if quant.quantize and quant.name != "F32"]
    if options.types:
        quants = [quant for quant in quants if quant.name in options.types]
    ways: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {}
    for quant in quants:
        ways[quant.name, "ours"] = partial(quant.quantize, importance=columns)
        if library:
            ways[quant.name, "ggml"] = ggml_quantize(library, quant, columns)

    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    with ThreadPoolExecutor(options.threads) as pool:
        for quantize in ways.values():
            quantize(weights[:16])  # compiles
        for _ in range(options.rounds):
            for way, quantize in ways.items():
                start = time.perf_counter()
                list(pool.map(quantize, np.array_split(weights, options.threads)))
                seconds[way].append(time.perf_counter() - start)

    print(f"{weights.size / 1e6:.0f} M weights, {options.threads} thread(s), M weights/s")
    print("type       ours" + ("      ggml     times     bytes" if library else ""))
    for quant in quants:
        ours = weights.size / 1e6 / np.median(seconds[quant.name, "ours"])
        line = f"{quant.name:<7}{ours:8.0f}"
        if library:
            ggml = weights.size / 1e6 / np.median(seconds[quant.name, "ggml"])
            few = weights[:64]
            same = np.array_equal(ways[quant.name, "ours"](few), ways[quant.name, "ggml"](few))
            line += f"  {ggml:8.0f}  {ours / ggml:8.1f}  {'equal' if same else 'DIFFER':>8}"
        print(line)


def ggml_quantize(
    library: ctypes.CDLL, quant: QuantType, columns: np.ndarray | None
) -> Callable[[np.ndarray], np.ndarray]:
    """ggml's routine for the type; it releases the GIL too."""
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]

    def quantize(weights: np.ndarray) -> np.ndarray:
        n_rows, k = weights.shape
        data = np.empty((n_rows, quant.row_bytes(k)), np.uint8)
        importance = None if columns is None else columns.ctypes.data
        function(quant.type_id, weights.ctypes.data, data.ctypes.data, 0, n_rows, k, importance)
        return data

    return quantize


if __name__ == "__main__":
    main()
