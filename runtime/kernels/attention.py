"""Attention on an f16 KV cache, one pass over keys and values (online softmax).

The cache of a layer is [kv head][position][dim padded to 16] f16, keys and values apart.

One token (decode): the visible positions are cut into chunks; a thread takes (kv head, chunk),
serves all query heads that share the kv head, and leaves a partial result; `combine` adds them
up. How positions are cut depends on their number alone, so the result does not depend on the
number of threads.

Many tokens (prompt): a thread takes (kv head, some tokens), walks along blocks of KEYS positions
turned to float32 once, and multiplies with the float32 tile for 6 rows of queries at a time.
"""

from numba import float32

from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    cvt_f32x16,
    fma,
    hmax,
    hsum,
    ld_f16x16,
    ld_f32,
    ld_f32x16,
    splat_f32x16,
    st,
    st_f32,
    transpose16,
    vmax,
    zero_f32x16,
)
from gguf_tools.tiles import dots16, f32_tile
from runtime.kernels.elementwise import exp1, exp16
from runtime.kernels.interpreter import arg, float_arg, n_tokens, position, scratch

MAX_CHUNKS = 16
CHUNK_STEP = 64  # chunks are multiples of this many positions
KEYS = 64  # positions per block of a prompt
QUERY_ROWS = 96  # query heads times tokens that share a block, about
HIDDEN = -1e30  # score of a position that may not be seen


def padded(dim: int) -> int:
    """Elements of one key or value in the cache."""
    return (dim + 15) // 16 * 16


def chunk_count(n_positions: int) -> int:
    """Chunks that decode cuts n_positions visible positions into; as `_chunk` does."""
    per = (n_positions + MAX_CHUNKS - 1) // MAX_CHUNKS
    size = max(CHUNK_STEP, (per + CHUNK_STEP - 1) // CHUNK_STEP * CHUNK_STEP)
    return (n_positions + size - 1) // size


def query_tokens(group: int) -> int:
    """Tokens in one block of queries of a prompt."""
    return max(1, QUERY_ROWS // group)


def partial_bytes(n_heads: int, value_dim: int) -> int:
    """Room for the partial results of one token: per head and chunk max, sum and values."""
    return n_heads * MAX_CHUNKS * (16 + padded(value_dim)) * 4


def scratch_bytes(n_ctx: int, group: int, key_dim: int, value_dim: int) -> int:
    """Scratch per thread; `group` query heads share a kv head."""
    key, value = padded(key_dim), (value_dim + 31) // 32 * 32
    rows = max(QUERY_ROWS, group) + 6
    decode = key * 4 * group + (n_ctx // MAX_CHUNKS + 2 * CHUNK_STEP) * 4
    prompt = rows * (key + value + 2) * 4 + KEYS * (key + value) * 4 + (6 * KEYS + 256) * 4
    return max(decode, prompt) + 4096


@jit
def _copy_scaled(source, target, dim, full, scale):
    """dim floats times scale, zeros up to `full` (a multiple of 16)."""
    s = splat_f32x16(scale)
    for i in range(0, dim - 15, 16):
        st(target + i * 4, ld_f32x16(source + i * 4) * s)
    for i in range(dim & ~15, full):
        value = float32(0.0)
        if i < dim:
            value = ld_f32(source + i * 4) * scale
        st_f32(target + i * 4, value)


@jit
def _visible(last, window):
    """The first position that position `last` sees."""
    if window > 0:
        return max(0, last + 1 - window)
    return 0


@jit
def _chunk(count):
    """Positions per chunk for `count` visible ones."""
    per = (count + MAX_CHUNKS - 1) // MAX_CHUNKS
    return max(CHUNK_STEP, (per + CHUNK_STEP - 1) // CHUNK_STEP * CHUNK_STEP)


@jit
def _weighted_sum(weights, values, stride, count, out, dim):
    """out[dim] = sum of weights[i] * values[i], f16 values `stride` bytes apart."""
    i = 0
    while i + 64 <= dim:
        a = zero_f32x16()
        b = zero_f32x16()
        c = zero_f32x16()
        d = zero_f32x16()
        for t in range(count):
            w = splat_f32x16(ld_f32(weights + t * 4))
            v = values + t * stride + i * 2
            a = fma(w, cvt_f32x16(ld_f16x16(v)), a)
            b = fma(w, cvt_f32x16(ld_f16x16(v + 32)), b)
            c = fma(w, cvt_f32x16(ld_f16x16(v + 64)), c)
            d = fma(w, cvt_f32x16(ld_f16x16(v + 96)), d)
        st(out + i * 4, a)
        st(out + i * 4 + 64, b)
        st(out + i * 4 + 128, c)
        st(out + i * 4 + 192, d)
        i += 64
    while i < dim:
        e = zero_f32x16()
        for t in range(count):
            w = splat_f32x16(ld_f32(weights + t * 4))
            e = fma(w, cvt_f32x16(ld_f16x16(values + t * stride + i * 2)), e)
        st(out + i * 4, e)
        i += 16


@kernel("iiiii")
def attend_chunks(op, state, thread, first, last):
    """queries 0-2, key cache 3, value cache 4, heads 5, kv heads 6, key_dim 7, value_dim 8, padded
    key_dim 9, padded value_dim 10, cache positions 11, window 12, scale 13, partials 14;
    unit: a chunk of a kv head, all first chunks first"""
    query_heads = arg(op, 5) // arg(op, 6)
    key_stride = arg(op, 9) * 2
    value_stride = arg(op, 10) * 2
    here = position(state)
    begin = _visible(here, arg(op, 12))
    count = here + 1 - begin
    chunk = _chunk(count)
    queries = scratch(state, thread)
    scores = queries + query_heads * arg(op, 9) * 4
    partial_stride = (16 + arg(op, 10)) * 4
    for unit in range(first, last):
        kv_head = unit % arg(op, 6)
        c = unit // arg(op, 6)
        start = begin + c * chunk
        n = min(chunk, here + 1 - start)
        if n <= 0:
            continue  # fewer chunks are visible in a window
        keys = arg(op, 3) + (kv_head * arg(op, 11) + start) * key_stride
        values = arg(op, 4) + (kv_head * arg(op, 11) + start) * value_stride
        for g in range(query_heads):
            head = kv_head * query_heads + g
            query = queries + g * arg(op, 9) * 4
            source = arg(op, 0) + thread * arg(op, 1) + head * arg(op, 7) * 4
            _copy_scaled(source, query, arg(op, 7), arg(op, 9), float_arg(op, 13))
            top = splat_f32x16(float32(HIDDEN))
            for t in range(0, n, 16):
                st(scores + t * 4, dots16(query, keys + t * key_stride, key_stride, arg(op, 9)))
                if t + 16 > n:
                    for hidden in range(n, t + 16):
                        st_f32(scores + hidden * 4, float32(HIDDEN))
                top = vmax(top, ld_f32x16(scores + t * 4))
            most = hmax(top)
            total = zero_f32x16()
            for t in range(0, n, 16):
                e = exp16(ld_f32x16(scores + t * 4) - splat_f32x16(most))
                st(scores + t * 4, e)
                total = total + e
            partial = arg(op, 14) + (head * MAX_CHUNKS + c) * partial_stride
            st_f32(partial, most)
            st_f32(partial + 4, hsum(total))
            _weighted_sum(scores, values, value_stride, n, partial + 64, arg(op, 10))


@kernel("iiiii")
def combine(op, state, thread, first, last):
    """target 0-1, heads 2, value_dim 3, padded value_dim 4, window 5, partials 6; unit: a head"""
    here = position(state)
    count = here + 1 - _visible(here, arg(op, 5))
    chunk = _chunk(count)
    n_chunks = (count + chunk - 1) // chunk
    stride = (16 + arg(op, 4)) * 4
    target = arg(op, 0) + thread * arg(op, 1)
    weights = scratch(state, thread)
    sums = weights + MAX_CHUNKS * 4
    for head in range(first, last):
        partials = arg(op, 6) + head * MAX_CHUNKS * stride
        most = ld_f32(partials)
        for c in range(1, n_chunks):
            most = max(most, ld_f32(partials + c * stride))
        total = float32(0.0)
        for c in range(n_chunks):
            weight = exp1(ld_f32(partials + c * stride) - most)
            st_f32(weights + c * 4, weight)
            total += weight * ld_f32(partials + c * stride + 4)
        inverse = float32(1.0) / total
        for i in range(0, arg(op, 4), 16):
            value = zero_f32x16()
            for c in range(n_chunks):
                weight = splat_f32x16(ld_f32(weights + c * 4))
                value = fma(weight, ld_f32x16(partials + c * stride + 64 + i * 4), value)
            st(sums + i * 4, value)
        _copy_scaled(sums, target + head * arg(op, 3) * 4, arg(op, 3), arg(op, 3), inverse)


@jit
def _pack_keys(keys, stride, first, end, packed, dim, corner):
    """KEYS keys from `first` on, turned: packed[dim][KEYS] float32; beyond `end` the last one."""
    for p in range(0, KEYS, 16):
        for i in range(0, dim, 16):
            for j in range(16):
                at = keys + min(first + p + j, end - 1) * stride + i * 2
                st(corner + j * 64, cvt_f32x16(ld_f16x16(at)))
            transpose16(corner, 64, packed + i * KEYS * 4 + p * 4, KEYS * 4)


@jit
def _pack_values(values, stride, first, end, packed, dim, width):
    """KEYS values as float32 rows of `width` (a multiple of 32); zeros beyond `end` and `dim`."""
    for p in range(KEYS):
        for i in range(0, width, 16):
            v = zero_f32x16()
            if first + p < end and i < dim:
                v = cvt_f32x16(ld_f16x16(values + (first + p) * stride + i * 2))
            st(packed + (p * width + i) * 4, v)


@kernel("iiiii")
def attend_tiles(op, state, thread, first, last):
    """queries 0-2, key cache 3, value cache 4, heads 5, kv heads 6, key_dim 7, value_dim 8, padded
    key_dim 9, padded value_dim 10, cache positions 11, window 12, scale 13, target 14-15;
    unit: a block of queries of a kv head"""
    group = arg(op, 5) // arg(op, 6)
    dim = arg(op, 9)
    width = (arg(op, 8) + 31) & ~31
    tokens = max(1, QUERY_ROWS // group)  # as query_tokens
    max_rows = (tokens * group + 5) // 6 * 6
    queries = (scratch(state, thread) + 63) & ~63
    outputs = queries + max_rows * dim * 4
    keys = outputs + max_rows * width * 4
    values = keys + KEYS * dim * 4
    scores = values + KEYS * width * 4
    corner = scores + 6 * KEYS * 4
    tops = corner + 1024
    totals = tops + max_rows * 4
    for unit in range(first, last):
        kv_head = unit % arg(op, 6)
        # The last tokens see most and are the most work: they come first.
        t0 = ((n_tokens(state) + tokens - 1) // tokens - 1 - unit // arg(op, 6)) * tokens
        if t0 < 0:
            break  # layers with smaller groups have more blocks
        t1 = min(n_tokens(state), t0 + tokens)
        n_rows = (t1 - t0) * group
        rows = (n_rows + 5) // 6 * 6
        for r in range(rows):
            place = min(r, n_rows - 1)
            t = t0 + place // group
            head = kv_head * group + place % group
            source = arg(op, 0) + t * arg(op, 2) + head * arg(op, 7) * 4
            _copy_scaled(source, queries + r * dim * 4, arg(op, 7), dim, float_arg(op, 13))
            st_f32(tops + r * 4, float32(HIDDEN))
            st_f32(totals + r * 4, float32(0.0))
            for i in range(0, width, 16):
                st(outputs + (r * width + i) * 4, zero_f32x16())
        begin = _visible(position(state) + t0, arg(op, 12))
        end = position(state) + t1
        key_base = arg(op, 3) + kv_head * arg(op, 11) * dim * 2
        value_base = arg(op, 4) + kv_head * arg(op, 11) * arg(op, 10) * 2
        for block in range(begin // KEYS * KEYS, end, KEYS):
            _pack_keys(key_base, dim * 2, block, end, keys, dim, corner)
            _pack_values(value_base, arg(op, 10) * 2, block, end, values, arg(op, 10), width)
            for r in range(0, rows, 6):
                for i in range(0, 6 * KEYS, 16):
                    st(scores + i * 4, zero_f32x16())
                query = queries + r * dim * 4
                f32_tile(6, query, dim * 4, keys, KEYS * 4, scores, KEYS * 4, dim)
                f32_tile(6, query, dim * 4, keys + 128, KEYS * 4, scores + 128, KEYS * 4, dim)
                for c in range(6):
                    here = position(state) + t0 + min(r + c, n_rows - 1) // group
                    low = max(_visible(here, arg(op, 12)) - block, 0)
                    high = min(here + 1 - block, KEYS)
                    out = outputs + (r + c) * width * 4
                    _online_softmax(
                        scores + c * KEYS * 4, low, high, tops, totals, r + c, out, width
                    )
                for i in range(0, width, 32):
                    out = outputs + (r * width + i) * 4
                    f32_tile(6, scores, KEYS * 4, values + i * 4, width * 4, out, width * 4, KEYS)
        for r in range(n_rows):
            target = arg(op, 14) + (t0 + r // group) * arg(op, 15)
            target += (kv_head * group + r % group) * arg(op, 8) * 4
            inverse = float32(1.0) / ld_f32(totals + r * 4)
            _copy_scaled(outputs + r * width * 4, target, arg(op, 8), arg(op, 8), inverse)


@jit
def _online_softmax(scores, low, high, tops, totals, row, out, width):
    """Turn KEYS scores, of which low..high are visible, into weights; rescale what came before."""
    if low >= high:
        for i in range(0, KEYS, 16):
            st(scores + i * 4, zero_f32x16())
        return
    for i in range(low):
        st_f32(scores + i * 4, float32(HIDDEN))
    for i in range(high, KEYS):
        st_f32(scores + i * 4, float32(HIDDEN))
    best = ld_f32x16(scores)
    for i in range(16, KEYS, 16):
        best = vmax(best, ld_f32x16(scores + i * 4))
    before = ld_f32(tops + row * 4)
    most = max(before, hmax(best))
    total = zero_f32x16()
    for i in range(0, KEYS, 16):
        e = exp16(ld_f32x16(scores + i * 4) - splat_f32x16(most))
        st(scores + i * 4, e)
        total = total + e
    fade = exp1(before - most)
    st_f32(totals + row * 4, ld_f32(totals + row * 4) * fade + hsum(total))
    st_f32(tops + row * 4, most)
    if before < most:
        for i in range(0, width, 16):
            st(out + i * 4, ld_f32x16(out + i * 4) * splat_f32x16(fade))
