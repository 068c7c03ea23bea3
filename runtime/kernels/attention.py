"""Attention on the KV cache (runtime/kernels/kv_cache.py), one pass over keys and values.

One token (decode), or each of a few: the blocks of visible positions are cut into chunks; a thread
takes (kv head, chunk), serves all query heads that share the kv head, and leaves a partial result;
`combine` adds them up. How blocks are cut depends on the positions alone, so the result does not
depend on the number of threads. The cache is read as it lies, once for up to 4 query heads.

Many tokens (prompt): a thread takes (kv head, some tokens), walks along blocks of positions turned
to f16 once, and multiplies for 6 rows of queries at a time (online softmax).

Queries are scaled by log2(e) more, so that powers of 2 take the place of exponentials. A soft-cap
is a kernel of its own (`cap_scores`), compiled only for models that have one.
"""

from gguf_tools.control import call3, call5, call8, call10
from gguf_tools.jit import jit, kernel
from gguf_tools.simd import (
    bits_f32x16,
    bits_i32x16,
    cvt_i32x16,
    first_lane,
    float32,
    fma,
    hmax,
    hsum,
    ld_f32,
    ld_f32x16,
    splat_f32x16,
    st,
    st_f32,
    vmax,
    vrint,
    zero_f32x16,
)
from gguf_tools.tiles import float_tile
from runtime.kernels.functions import tanh16
from runtime.kernels.interpreter import HEADER, arg, float_arg, n_tokens, position, scratch
from runtime.kernels.kv_cache import POSITIONS, KVType, copy_scaled, zero

MAX_CHUNKS = 16
QUERY_ROWS = 96  # query heads times tokens that share a block, about
HIDDEN = -1e30  # score of a position that may not be seen
LOG2_E = 1.4426950408889634


def chunk_count(n_positions: int) -> int:
    """Chunks that decode cuts n_positions visible positions into, at most; as `_cut` does."""
    return min(MAX_CHUNKS, (n_positions + POSITIONS - 1) // POSITIONS)


def query_tokens(group: int) -> int:
    """Tokens in one block of queries of a prompt."""
    return max(1, QUERY_ROWS // group)


def partial_bytes(n_heads: int, value_dim: int, kv: KVType) -> int:
    """Room for the partial results of one token: per head and chunk max, sum and values."""
    return n_heads * MAX_CHUNKS * (16 + kv.padded(value_dim)) * 4


def scratch_bytes(n_ctx: int, group: int, key_dim: int, value_dim: int, kv: KVType) -> int:
    """Scratch per thread; `group` query heads share a kv head."""
    key, value = kv.padded(key_dim), kv.padded(value_dim)
    rows = max(QUERY_ROWS, group) + 6
    decode = group * (key + n_ctx // MAX_CHUNKS + 4 * POSITIONS) * 4
    prompt = rows * (key + value + 17) * 4 + POSITIONS * (key + value + 12) * 2
    return max(decode, prompt) + 4096


@jit
def _exp2(x):
    """2 ** x of 16 floats up to 0, within 2 units in the last place; as 2 ** -126 below that."""
    x = vmax(x, splat_f32x16(float32(-126.0)))
    n = vrint(x)
    r = x - n
    p = splat_f32x16(float32(1.3276471e-3))
    p = fma(p, r, splat_f32x16(float32(9.6755410e-3)))
    p = fma(p, r, splat_f32x16(float32(5.5507131e-2)))
    p = fma(p, r, splat_f32x16(float32(2.4022120e-1)))
    p = fma(p, r, splat_f32x16(float32(6.9314694e-1)))
    p = fma(p, r, splat_f32x16(float32(1.0000001)))
    return bits_f32x16(bits_i32x16(p) + (cvt_i32x16(n) << 23))


@jit
def _exp2_one(x):
    return first_lane(_exp2(splat_f32x16(x)))


@jit
def _visible(last, window):
    """The first position that position `last` sees."""
    if window > 0:
        return max(0, last + 1 - window)
    return 0


@jit
def _cut(first, n_blocks, c):
    """The first block of chunk c of n_blocks blocks."""
    return first + c * n_blocks // min(MAX_CHUNKS, n_blocks)


@jit
def _hide(scores, low, high):
    """Of POSITIONS scores, let only low..high count."""
    for i in range(min(low, POSITIONS)):
        st_f32(scores + i * 4, float32(HIDDEN))
    for i in range(max(high, 0), POSITIONS):
        st_f32(scores + i * 4, float32(HIDDEN))


@kernel("iiiii")
def cap_scores(cap, scores, stride, rows, n):
    """Rows of n scores, a multiple of 16, become cap * tanh(score / cap); `cap` is an address."""
    most = splat_f32x16(ld_f32(cap))
    for r in range(rows):
        for i in range(0, n, 16):
            place = scores + r * stride + i * 4
            st(place, most * tanh16(ld_f32x16(place) / most))


# --- one token -------------------------------------------------------------------------------


@kernel("iiiii")
def attend_chunks(op, state, thread, first, last):
    """queries 0-2, key cache 3, value cache 4, heads 5, kv heads 6, key_dim 7, value_dim 8, padded
    key_dim 9, padded value_dim 10, cache positions 11, window 12, scale 13, bytes per block of
    keys 14, of values 15, score kernel 16, mix kernel 17, partials 18, kernel of the soft-cap 19
    (or 0), cap 20, bytes of partials per token 21; unit: a chunk of a kv head for a token, all
    tokens' one after the other, all first chunks first"""
    rows = arg(op, 5) // arg(op, 6)
    dim = arg(op, 9)
    width = arg(op, 10)
    queries = (scratch(state, thread) + 63) & ~63
    scores = queries + rows * dim * 4
    partial_stride = (16 + width) * 4
    head_stride = MAX_CHUNKS * partial_stride
    for unit in range(first, last):
        t = unit % n_tokens(state)
        pair = unit // n_tokens(state)
        kv_head = pair % arg(op, 6)
        c = pair // arg(op, 6)
        here = position(state) + t
        begin = _visible(here, arg(op, 12))
        first_block = begin // POSITIONS
        n_blocks = here // POSITIONS + 1 - first_block
        n_chunks = min(MAX_CHUNKS, n_blocks)
        if c >= n_chunks:
            continue  # fewer chunks are visible in a window, or by an earlier token
        most = (n_blocks + n_chunks - 1) // n_chunks * POSITIONS  # positions in a chunk
        stride = most * 4
        room = scores + rows * stride
        own_queries = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        for r in range(rows):
            source = own_queries + (kv_head * rows + r) * arg(op, 7) * 4
            scale = float_arg(op, 13) * float32(LOG2_E)
            copy_scaled(source, queries + r * dim * 4, arg(op, 7), dim, scale)
        start = _cut(first_block, n_blocks, c)
        end = _cut(first_block, n_blocks, c + 1)
        row_blocks = kv_head * (arg(op, 11) // POSITIONS)
        zero(scores, rows * most)
        for block in range(start, end):
            keys = arg(op, 3) + (row_blocks + block) * arg(op, 14)
            ahead = arg(op, 14)
            if block == end - 1:
                ahead = arg(op, 4) + (row_blocks + start) * arg(op, 15) - keys
            into = scores + (block - start) * POSITIONS * 4
            call8(arg(op, 16), rows, queries, dim, keys, into, stride, room, ahead)
            if arg(op, 19):
                call5(arg(op, 19), op + 8 * (HEADER + 20), into, stride, rows, POSITIONS)
            if block == first_block or block == end - 1:
                low, high = begin - block * POSITIONS, here + 1 - block * POSITIONS
                for r in range(rows):
                    _hide(into + r * stride, low, high)
        partials = arg(op, 18) + t * arg(op, 21) + kv_head * rows * head_stride + c * partial_stride
        n = (end - start) * POSITIONS
        for r in range(rows):
            _softmax(scores + r * stride, n, partials + r * head_stride)
            zero(partials + r * head_stride + 64, width)
        for block in range(start, end):
            values = arg(op, 4) + (row_blocks + block) * arg(op, 15)
            weights = scores + (block - start) * POSITIONS * 4
            visible = min(POSITIONS, here + 1 - block * POSITIONS)
            out = partials + 64
            mix = arg(op, 17)
            ahead = arg(op, 15)
            if block == end - 1:
                ahead = _next_keys(op, pair, first_block, n_blocks) - values
            call10(
                *(mix, rows, weights, stride, values, visible, out, head_stride, width, room, ahead)
            )


@jit
def _next_keys(op, pair, first_block, n_blocks):
    """Where the keys of the chunk and kv head after these begin, as far as there are some."""
    kv_head = (pair + 1) % arg(op, 6)
    block = _cut(first_block, n_blocks, (pair + 1) // arg(op, 6))
    return arg(op, 3) + (kv_head * (arg(op, 11) // POSITIONS) + block) * arg(op, 14)


@jit
def _softmax(scores, n, partial):
    """Turn n scores into weights; their maximum and sum to `partial`."""
    top = ld_f32x16(scores)
    for i in range(16, n, 16):
        top = vmax(top, ld_f32x16(scores + i * 4))
    most = hmax(top)
    total = zero_f32x16()
    for i in range(0, n, 16):
        e = _exp2(ld_f32x16(scores + i * 4) - splat_f32x16(most))
        st(scores + i * 4, e)
        total = total + e
    st_f32(partial, most)
    st_f32(partial + 4, hsum(total))


@kernel("iiiii")
def combine(op, state, thread, first, last):
    """target 0-2, heads 3, value_dim 4, padded value_dim 5, window 6, partials 7, sinks 8 (one per
    head, or 0), bytes of partials per token 9; unit: a head of a token"""
    stride = (16 + arg(op, 5)) * 4
    weights = scratch(state, thread)
    sums = weights + MAX_CHUNKS * 4
    for item in range(first, last):
        t = item // arg(op, 3)
        head = item - t * arg(op, 3)
        here = position(state) + t
        begin = _visible(here, arg(op, 6))
        n_chunks = min(MAX_CHUNKS, here // POSITIONS + 1 - begin // POSITIONS)
        target = arg(op, 0) + thread * arg(op, 1) + t * arg(op, 2)
        partials = arg(op, 7) + t * arg(op, 9) + head * MAX_CHUNKS * stride
        most = ld_f32(partials)
        for c in range(1, n_chunks):
            most = max(most, ld_f32(partials + c * stride))
        total = float32(0.0)
        if arg(op, 8):
            sink = ld_f32(arg(op, 8) + head * 4) * float32(LOG2_E)
            most = max(most, sink)
            total = _exp2_one(sink - most)
        for c in range(n_chunks):
            weight = _exp2_one(ld_f32(partials + c * stride) - most)
            st_f32(weights + c * 4, weight)
            total += weight * ld_f32(partials + c * stride + 4)
        inverse = float32(1.0) / total
        for i in range(0, arg(op, 5), 16):
            value = zero_f32x16()
            for c in range(n_chunks):
                weight = splat_f32x16(ld_f32(weights + c * 4))
                value = fma(weight, ld_f32x16(partials + c * stride + 64 + i * 4), value)
            st(sums + i * 4, value)
        copy_scaled(sums, target + head * arg(op, 4) * 4, arg(op, 4), arg(op, 4), inverse)


# --- many tokens -----------------------------------------------------------------------------


@kernel("iiiii")
def attend_tiles(op, state, thread, first, last):
    """queries 0-2, key cache 3, value cache 4, heads 5, kv heads 6, key_dim 7, value_dim 8, padded
    key_dim 9, padded value_dim 10, cache positions 11, window 12, scale 13, bytes per block of
    keys 14, of values 15, kernels that make f16 of keys 16, of values 17 (or 0), target 18-19,
    kernel of the soft-cap 20 (or 0), cap 21, sinks 22 (one per head, or 0); unit: a block of
    queries of a kv head"""
    group = arg(op, 5) // arg(op, 6)
    dim = arg(op, 9)
    width = arg(op, 10)
    tokens = max(1, QUERY_ROWS // group)  # as query_tokens
    max_rows = (tokens * group + 5) // 6 * 6
    queries = (scratch(state, thread) + 63) & ~63
    outputs = queries + max_rows * dim * 4
    totals = outputs + max_rows * width * 4  # 16 of a row, to be added up
    own_keys = totals + max_rows * 64
    own_values = own_keys + POSITIONS * dim * 2
    scores = own_values + POSITIONS * width * 2
    tops = scores + 6 * POSITIONS * 4
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
            scale = float_arg(op, 13) * float32(LOG2_E)
            copy_scaled(source, queries + r * dim * 4, arg(op, 7), dim, scale)
            st_f32(tops + r * 4, float32(HIDDEN))
        zero(totals, rows * 16)
        zero(outputs, rows * width)
        if arg(op, 22):
            for r in range(n_rows):
                sink = ld_f32(arg(op, 22) + (kv_head * group + r % group) * 4)
                st_f32(tops + r * 4, sink * float32(LOG2_E))
                st_f32(totals + r * 64, float32(1.0))
        begin = _visible(position(state) + t0, arg(op, 12))
        end = position(state) + t1
        row_blocks = kv_head * (arg(op, 11) // POSITIONS)
        for block in range(begin // POSITIONS, (end + POSITIONS - 1) // POSITIONS):
            start = block * POSITIONS
            n = min(POSITIONS, end - start)
            keys = arg(op, 3) + (row_blocks + block) * arg(op, 14)
            values = arg(op, 4) + (row_blocks + block) * arg(op, 15)
            if arg(op, 16):
                call3(arg(op, 16), keys, dim, own_keys)
                call3(arg(op, 17), values, width, own_values)
                keys, values = own_keys, own_values
            for r in range(0, rows, 6):
                earliest = position(state) + t0 + r // group
                latest = position(state) + t0 + min(r + 5, n_rows - 1) // group
                if latest < start or start + POSITIONS <= _visible(earliest, arg(op, 12)):
                    continue  # hidden from all 6
                query = queries + r * dim * 4
                stride = POSITIONS * 4
                float_tile(6, 4, 2, True, query, dim * 4, keys, 128, scores, stride, dim, 0)
                if arg(op, 20):
                    call5(arg(op, 20), op + 8 * (HEADER + 21), scores, stride, 6, POSITIONS)
                for c in range(6):
                    here = position(state) + t0 + min(r + c, n_rows - 1) // group
                    low, high = _visible(here, arg(op, 12)) - start, here + 1 - start
                    if low > 0 or high < POSITIONS:
                        _hide(scores + c * stride, low, high)
                    out = outputs + (r + c) * width * 4
                    _online_softmax(scores + c * stride, tops, totals, r + c, out, width)
                out = outputs + r * width * 4
                seen = min(n, latest + 1 - start)
                row = width * 2
                i = 0
                while i + 64 <= width:
                    at, to = values + i * 2, out + i * 4
                    float_tile(6, 4, 2, False, scores, stride, at, row, to, width * 4, seen, 0)
                    i += 64
                while i < width:
                    at, to = values + i * 2, out + i * 4
                    float_tile(6, 1, 2, False, scores, stride, at, row, to, width * 4, seen, 0)
                    i += 16
        for r in range(n_rows):
            target = arg(op, 18) + (t0 + r // group) * arg(op, 19)
            target += (kv_head * group + r % group) * arg(op, 8) * 4
            inverse = float32(1.0) / hsum(ld_f32x16(totals + r * 64))
            copy_scaled(outputs + r * width * 4, target, arg(op, 8), arg(op, 8), inverse)


@jit
def _online_softmax(scores, tops, totals, row, out, width):
    """Turn POSITIONS scores into weights; rescale what came before where the maximum grew.

    Where all of them are hidden and nothing was seen before, the weights are 1; what they add to
    output and total fades away, to nothing, at the first position that is seen.
    """
    a = ld_f32x16(scores)
    b = ld_f32x16(scores + 64)
    c = ld_f32x16(scores + 128)
    d = ld_f32x16(scores + 192)
    before = ld_f32(tops + row * 4)
    most = max(before, hmax(vmax(vmax(a, b), vmax(c, d))))
    top = splat_f32x16(most)
    a = _exp2(a - top)
    b = _exp2(b - top)
    c = _exp2(c - top)
    d = _exp2(d - top)
    st(scores, a)
    st(scores + 64, b)
    st(scores + 128, c)
    st(scores + 192, d)
    total = (a + b) + (c + d)
    if before < most:
        fade = splat_f32x16(_exp2_one(before - most))
        st(totals + row * 64, fma(ld_f32x16(totals + row * 64), fade, total))
        st_f32(tops + row * 4, most)
        for i in range(0, width, 16):
            st(out + i * 4, ld_f32x16(out + i * 4) * fade)
    else:
        st(totals + row * 64, ld_f32x16(totals + row * 64) + total)
