"""Blocks whose weights are whole multiples of one number, as training for a type leaves them.

Quantisation-aware training, and quantising for another program, leave blocks of scale * k with
whole k. Q4_0, Q5_0 and Q8_0 can hold such a block as it is, but ggml's quantisers miss it: they
take the weight of largest magnitude for the last level, whatever multiple it is. Weights of -7 to
7 times a scale come out as multiples of 7/8 of it, 10 % off, and what the training was for is
lost (llama.cpp's pull requests 17064 and 24603 tell of two such models).

Here scale and multiples are found again. A checkpoint may have rounded its weights to 16 bits after
that, and the scale may have more digits than a block's 16 bits hold; so a block counts as found
when every weight is as close to scale * k as these two roundings bring it. Then

- the k are those that the weights were made with;
- if a 16-bit scale can do it, every weight that is stored, rounded as the checkpoint's were, is
  the checkpoint's to the bit (in particular: weights that were not rounded come out exactly);
- otherwise the scale is the nearest one, and adds no more than 2^-11 of each weight.

Anything else stays as ggml's quantiser made it: blocks that are to the bit already, and the whole
of a checkpoint that was not made so, as `keep_multiples` first looks at a few blocks, of which
nearly all must be found. In a checkpoint of floats only Q4_0 is looked for, which models are
trained for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_tools.quants.quanttype import Array, Bytes, Floats, QuantType

PROBED = 32  # blocks of a band that are looked at before all are
SHARE = 0.9  # of them that must be found
TOGETHER = 1 << 12  # blocks that are searched at once, for the sake of memory
NEAR, EXACT = 1, 2  # all weights are met but for the scale's rounding, or to the bit
SCALE_ROUNDING = 2.0**-11  # relative, of a 16-bit float

Doubles: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Multiples:
    """Blocks of scale * k as a type stores them: lowest <= k <= highest."""

    lowest: int
    highest: int
    pack: Callable[[npt.NDArray[np.float16], Array], Array]  # (n,) scales, (n, 32) k -> blocks
    trained: bool = False  # models are trained for it: looked for in floats, too

    @property
    def reach(self) -> float:
        """How many times the smallest weight of a block may go into the largest, about."""
        return max(-self.lowest, self.highest) + 0.5


@dataclass(frozen=True)
class Found:
    """Blocks and what they are multiples of."""

    index: npt.NDArray[np.int64]  # (n,) of the blocks
    scale: npt.NDArray[np.float16]  # (n,)
    k: npt.NDArray[np.int32]  # (n, block_size)


def keep_multiples(quant: QuantType, weights: Floats, data: Bytes) -> Bytes:
    """`data`, what `quant` made of the weights, with trained blocks as they were trained.

    The result depends on these rows alone, whose weights are finite. `data` itself is given back
    if the weights were not made so.
    """
    multiples = quant.multiples
    x = weights.reshape(-1, quant.block_size)
    if multiples is None or not len(x):
        return data
    probe = x[:: -(-len(x) // PROBED)]
    probe = probe[probe.any(axis=1)]
    needed = max(1.0, SHARE * len(probe))
    if np.count_nonzero(_range(probe) <= multiples.reach) < needed:  # as in most cases
        return data
    digits = _spare_digits(probe)
    if len(find_multiples(probe, multiples, digits).index) < needed:
        return data
    kept: Bytes = data.reshape(len(x), -1).copy()
    made = quant.dequantize(kept)
    inexact = np.flatnonzero((_rounded(made, digits) != x).any(axis=1))
    for begin in range(0, len(inexact), TOGETHER):
        some = inexact[begin : begin + TOGETHER]
        found = find_multiples(x[some], multiples, digits)
        packed = multiples.pack(found.scale, found.k).view(np.uint8)
        kept[some[found.index]] = packed.reshape(-1, kept.shape[1])
    return kept.reshape(data.shape)


def find_multiples(x: Floats, multiples: Multiples, digits: int) -> Found:
    """The blocks of x (n, block_size) that are multiples of one number each, which is not 0.

    `digits` is how many binary digits a checkpoint's number has less than a float32.
    """
    scale = np.zeros(len(x), np.float16)
    k = np.zeros(x.shape, np.int32)
    quality = np.zeros(len(x), np.int8)
    range_, smallest = _range(x), _smallest(np.abs(x))
    index = np.flatnonzero(smallest < np.inf)
    divisor = 1  # the smallest weight is this multiple
    while True:
        index = index[(quality[index] < EXACT) & (range_[index] * divisor <= multiples.reach)]
        if not len(index):
            break
        fit = _fit(x[index], smallest[index] / np.float32(divisor), multiples, digits)
        better = fit.quality > quality[index]
        at = index[better]
        scale[at], k[at], quality[at] = fit.scale[better], fit.k[better], fit.quality[better]
        divisor += 1
    index = np.flatnonzero(quality)
    return Found(index, scale[index], k[index])


@dataclass(frozen=True)
class _Fit:
    scale: npt.NDArray[np.float16]  # (n,)
    k: npt.NDArray[np.int32]  # (n, block_size)
    quality: npt.NDArray[np.int8]  # (n,) 0, NEAR or EXACT


def _fit(x: Floats, guess: Floats, multiples: Multiples, digits: int) -> _Fit:
    """Scale and multiples of each block with a scale near the guess, and how they fit."""
    sizes = np.abs(x).astype(np.float64)
    counts = np.rint(sizes / guess[:, None])
    most = counts.max(axis=1)
    below, above = _rounding_to(x, digits)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Each weight allows the scales that, times its multiple, round to it. What all of them
        # allow has the nearest 16-bit number to its middle in it, if there is one in it at all.
        low = np.where(counts > 0, (sizes - below) / counts, 0).max(axis=1)
        high = np.where(counts > 0, (sizes + above) / counts, np.inf).min(axis=1)
        scale = ((low + high) / 2).astype(np.float16)
        # One that gives the numbers themselves is better than others that round to them.
        same = (counts * guess.astype(np.float16)[:, None] == sizes).all(axis=1)
        scale[same] = guess[same]
        error = counts * scale.astype(np.float64)[:, None] - sizes
        exact = ((error >= -below) & (error <= above)).all(axis=1)
        near = (np.abs(error) <= above + SCALE_ROUNDING * sizes).all(axis=1)
    # Beyond this the rounding of weights leaves it open which multiples they were.
    near &= most <= 2.0 ** (22 - digits)
    k = np.copysign(np.minimum(counts, 2 * multiples.reach), x).astype(np.int32)
    turned = k.max(axis=1) > multiples.highest  # types have one level more below 0
    k[turned] *= -1
    scale[turned] *= -1
    near &= (k.max(axis=1) <= multiples.highest) & (k.min(axis=1) >= multiples.lowest)
    return _Fit(scale, k, np.where(near, np.where(exact, EXACT, NEAR), 0).astype(np.int8))


def _smallest(sizes: Floats) -> Floats:
    """(n_blocks,) of the weights that are not zero."""
    smallest: Floats = np.where(sizes > 0, sizes, np.inf).min(axis=1, initial=np.inf)
    return smallest


def _range(x: Floats) -> Floats:
    """(n_blocks,) how many times the smallest weight goes into the largest."""
    sizes = np.abs(x)
    range_: Floats = sizes.max(axis=1, initial=0) / _smallest(sizes)
    return range_


def _rounding_to(x: Floats, digits: int) -> tuple[Doubles, Doubles]:
    """How much smaller, and larger, the magnitude of a number may be that was rounded to x.

    Half a step of the shorter type. A power of two has smaller steps below it; and a number in the
    middle of two is rounded to the even one.
    """
    odd = x.view(np.uint32) >> digits & 1
    half = np.where(odd, 2.0 ** (digits - 1) * (1 - 2.0**-20), 2.0 ** (digits - 1))
    sizes = np.abs(x)
    below = np.spacing(np.nextafter(sizes, np.float32(0))).astype(np.float64)
    return half * np.abs(below), half * np.spacing(sizes).astype(np.float64)


def _rounded(x: Floats, digits: int) -> Floats:
    """Numbers as a type that has so many digits less than float32 holds them: half to even."""
    if digits == 0:
        return x
    with np.errstate(over="ignore"):
        if digits == 13:
            return x.astype(np.float16).astype(np.float32)
        bits = x.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + (bits >> 16 & 1) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)


def _spare_digits(x: Floats) -> int:
    """How many binary digits less than float32 these numbers have: those of BF16, F16 or F32."""
    if not (x.view(np.uint32) & 0xFFFF).any():
        return 16
    with np.errstate(over="ignore"):
        return 13 if np.array_equal(x.astype(np.float16).astype(np.float32), x) else 0
