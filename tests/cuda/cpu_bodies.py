"""Bodies for the CPU of what only a GPU has: numba then compiles a lane's work for the CPU.

Importing this is enough. Each does what the primitive's Python body says.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from runtime.kernels.cuda import primitives

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)


@overload(primitives.dp4a, target="cpu")
def _dp4a(a, b, c):
    def body(a, b, c):
        total = np.int32(c)
        for i in range(4):
            x, y = np.int8((a >> (8 * i)) & 255), np.int8((b >> (8 * i)) & 255)
            total += np.int32(x) * np.int32(y)
        return np.int32(total)

    return body


@overload(primitives.permute, target="cpu")
def _permute(a, b, selector):
    def body(a, b, selector):
        both = np.uint64(np.uint32(b)) << np.uint64(32) | np.uint64(np.uint32(a))
        word = np.uint32(0)
        for i in range(4):
            byte = np.uint64(8 * ((selector >> (4 * i)) & 7))
            word |= np.uint32((both >> byte) & np.uint64(255)) << np.uint32(8 * i)
        return np.int32(word)

    return body


@overload(primitives.funnel, target="cpu")
def _funnel(low, high, shift):
    def body(low, high, shift):
        both = np.uint64(np.uint32(high)) << np.uint64(32) | np.uint64(np.uint32(low))
        return np.int32(np.uint32(both >> np.uint64(shift)))

    return body


@overload(primitives.nearest, target="cpu")
def _nearest(value):
    return lambda value: np.int32(np.rint(value))


@intrinsic
def _half_bits(typingctx, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _float_bits(typingctx, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@overload(primitives.half, target="cpu")
def _half(bits):
    return lambda bits: _half_bits(np.uint16(bits))


@overload(primitives.as_float, target="cpu")
def _as_float(bits):
    return lambda bits: _float_bits(np.int32(bits))


def _loader(function, n_words, n_bits, *, is_signed=False):
    result = types.int32 if n_words == 1 else types.UniTuple(types.int32, n_words)

    @intrinsic
    def loaded(typingctx, array, at):
        def generate(context, builder, signature, arguments):
            proxy = cgutils.create_struct_proxy(signature.args[0])
            base = proxy(context, builder, value=arguments[0]).data
            place = builder.gep(builder.bitcast(base, _BYTE.as_pointer()), [arguments[1]])
            kind = ir.IntType(n_bits)
            pointer = builder.bitcast(place, kind.as_pointer())
            words = []
            for i in range(n_words):
                word = builder.load(builder.gep(pointer, [_WORD(i)]))
                word.align = 1
                widen = builder.sext if is_signed else builder.zext
                words.append(word if n_bits == 32 else widen(word, _WORD))
            return words[0] if n_words == 1 else cgutils.pack_array(builder, words)

        return result(array, types.int64), generate

    @overload(function, target="cpu")
    def body(array, at):
        return lambda array, at: loaded(array, np.int64(at))


_loader(primitives.load16, 4, 32)
_loader(primitives.load8, 2, 32)
_loader(primitives.load4, 1, 32)
_loader(primitives.load2, 1, 16)
_loader(primitives.load1, 1, 8)
_loader(primitives.signed1, 1, 8, is_signed=True)
