"""Weights to quantise that come out the same everywhere, today and in ten years.

NumPy's random generators may change their streams; recorded answers may not. So the numbers here
come from integer arithmetic alone.
"""

import numpy as np

HARD_WIDTH = 256


def bell(n: int, *, seed: int) -> np.ndarray:
    """n float32 around 0, of standard deviation close to 1: sums of four uniform numbers."""
    total = np.zeros(n, np.int64)
    for part in range(4):
        state = np.arange(n, dtype=np.uint64) + np.uint64(seed * 1_000_003 + part * 7_919)
        for shift in (30, 27, 31):  # splitmix64
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
        total += (state >> np.uint64(44)).astype(np.int64) - (1 << 19)
    return total.astype(np.float32) * np.float32(2**-20 / 0.577)


def plain_rows(n_rows: int, k: int, *, seed: int = 1) -> np.ndarray:
    """(n_rows, k): rows like those of trained matrices, of sizes from 0.001 to 1000."""
    rows = bell(n_rows * k, seed=seed).reshape(n_rows, k)
    sizes = np.array([0.02, 0.02, 1, 0.001, 1000, 0.1], np.float32)
    rows *= sizes[np.arange(n_rows) % len(sizes)][:, None]
    rows[::7, ::37] *= 8  # outliers
    return rows


def importance(k: int) -> np.ndarray:
    """How much an error counts in each of k columns: of many sizes, and some not at all."""
    squares = bell(k, seed=77) ** 2
    sizes = np.float32(10) ** (np.arange(k) % 7 - 4).astype(np.float32)
    squares = (squares * sizes).astype(np.float32)
    squares[::11] = 0
    squares[64:96] = 0  # a group of 32
    return squares


def hard_rows() -> dict[str, np.ndarray]:
    """Rows of HARD_WIDTH finite weights that quantisers stumble over, by name."""
    n = HARD_WIDTH
    noise = bell(n, seed=2)
    ramp = np.arange(n, dtype=np.float32)
    one = np.ones(n, np.float32)
    zeros = np.zeros(n, np.float32)
    first_only, last_only, two_equal = zeros.copy(), zeros.copy(), zeros.copy()
    first_only[0], last_only[-1] = 1, -3
    two_equal[5::16], two_equal[9::16] = -2, 2
    outlier = noise * np.float32(0.01)
    outlier[100] = 50
    gap = noise.copy()
    gap[64:192] = 0
    zero_signs = np.where(ramp % 3 == 0, -zeros, zeros)
    signed_zero_first = np.abs(noise)
    signed_zero_first[::32], signed_zero_first[1::32] = -0.0, 0.0
    mixed = noise * np.float32(10) ** (np.arange(n) // 32 * 2 - 8).astype(np.float32)
    rows = {
        "zeros": zeros,
        "zeros of both signs": zero_signs,
        "a negative zero, then a positive one, below all others": signed_zero_first,
        "the same positive number": one * np.float32(0.3),
        "the same negative number": one * np.float32(-0.3),
        "one weight at the start": first_only,
        "one weight at the end": last_only,
        "largest magnitude met twice, with both signs": two_equal,
        "one outlier": outlier,
        "groups of zeros": gap,
        "positive only": np.abs(noise) + np.float32(0.1),
        "negative only": -np.abs(noise) - np.float32(0.1),
        "far from zero": noise * np.float32(0.001) + np.float32(5),
        "far below zero": noise * np.float32(0.001) - np.float32(5),
        "a ramp": ramp,
        "a falling ramp through zero": np.float32(127.5) - ramp,
        "halves, all ties": np.where(ramp % 2 == 0, ramp / 2 - 63.5, 63.5 - ramp / 2),
        "plus and minus one": np.where(ramp % 2 == 0, one, -one),
        "ternary": np.sign(noise) * (np.abs(noise) > 0.7),
        "groups of very different sizes": mixed,
        "the largest half": noise * np.float32(65504 / 4),
        "scales beyond half": noise * np.float32(3e7),
        "largest float": np.where(ramp % 2 == 0, np.finfo(np.float32).max, -one),
        "all largest floats": np.sign(noise) * np.finfo(np.float32).max,
    }
    for exponent in (-4, -6, -8, -10, -12, -15, -18, -20, -25, -30, -36, -38, -39, -40, -42, -44):
        rows[f"near 1e{exponent}"] = (noise * 10.0**exponent).astype(np.float32)
        rows[f"the same 1e{exponent}"] = np.full(n, 10.0**exponent, np.float32)
    for exponent in (5, 8, 12, 16, 18, 19, 20, 25, 30, 36, 37):
        rows[f"near 1e{exponent}"] = (noise * 10.0**exponent).astype(np.float32)
    return {name: np.asarray(row, np.float32) for name, row in rows.items()}


def hard_matrix() -> np.ndarray:
    """(n_rows, HARD_WIDTH) of all hard rows, in order."""
    return np.stack(list(hard_rows().values()))
