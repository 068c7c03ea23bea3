"""Instructions of the GPU that Python has no word for.

The Python body of each says what it does, and is what the simulator runs; the device gets one
instruction (PTX) in its place. Words are int32. Loads address an array in bytes, whatever its
type; what they read must not be written by the same kernel.
"""

import struct

import numpy as np
from llvmlite import ir
from numba import config, types

from gguf_tools.compiler import helper

LOW_32 = 0xFFFFFFFF
_BYTES, _UNSIGNED = struct.Struct("<bbbb"), struct.Struct("<I")


@helper
def place(i):
    """An index that is not negative: numba adds an array's length to those that may be."""
    return np.uint64(i)


def dp4a(a, b, c):
    """c plus the sum of four products of int8: the bytes of a and b."""
    e, f, g, h = _int8s(a)
    i, j, k, m = _int8s(b)
    return _wrapped(int(c) + e * i + f * j + g * k + h * m)


def permute(a, b, selector):
    """Four of the eight bytes of a (0 to 3) and b (4 to 7), named by the selector's nibbles."""
    assert selector & 0x8888 == 0  # which would ask for signs
    packed = struct.pack("<II", _unsigned(a), _unsigned(b))
    chosen = bytes(packed[selector >> (4 * i) & 7] for i in range(4))
    return struct.unpack("<i", chosen)[0]


def funnel(low, high, shift):
    """The word that starts `shift` (0 to 31) bits into low, high."""
    return _wrapped((_unsigned(high) << 32 | _unsigned(low)) >> shift)


def half(bits):
    """The float16 in the low 16 bits, as float32."""
    return np.float32(struct.unpack("<e", struct.pack("<H", int(bits) & 0xFFFF))[0])


def to_half(value):
    """The bits of the nearest float16; more than it can hold is infinite."""
    with np.errstate(over="ignore"):
        return np.float32(value).astype(np.float16).view(np.uint16)


def two_halves(low, high):
    """The bits of the nearest float16 of both; low in the low half of the word."""
    return _wrapped(int(to_half(low)) | int(to_half(high)) << 16)


def two_bfloats(low, high):
    """The bits of the nearest bfloat16 of both."""
    return _wrapped(_bfloat(low) | _bfloat(high) << 16)


def as_float(bits):
    """The float32 of these bits."""
    return np.float32(struct.unpack("<f", struct.pack("<I", _unsigned(bits)))[0])


def nearest(value):
    """The nearest whole number, the even one of two."""
    return int(np.rint(value))


def load16(array, at):
    """Four words from byte `at`, a multiple of 16."""
    assert at % 16 == 0
    return struct.unpack_from("<iiii", array, at)


def load8(array, at):
    """Two words from byte `at`, a multiple of 8."""
    assert at % 8 == 0
    return struct.unpack_from("<ii", array, at)


def load4(array, at):
    """A word from byte `at`, a multiple of 4."""
    assert at % 4 == 0
    return struct.unpack_from("<i", array, at)[0]


def load2(array, at):
    """Two bytes from byte `at`, a multiple of 2: 0 to 65535."""
    assert at % 2 == 0
    return struct.unpack_from("<H", array, at)[0]


def load1(array, at):
    """The byte `at`: 0 to 255."""
    return struct.unpack_from("<B", array, at)[0]


def signed1(array, at):
    """The byte `at`: -128 to 127."""
    return struct.unpack_from("<b", array, at)[0]


def _bfloat(value):
    bits = int(np.float32(value).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


def _int8s(word):
    return _BYTES.unpack(_UNSIGNED.pack(int(word) & LOW_32))


def _unsigned(word):
    return int(word) & LOW_32


def _wrapped(value):
    return ((value + (1 << 31)) & LOW_32) - (1 << 31)


# --- the device's bodies ---------------------------------------------------------------------

_WORD = ir.IntType(32)
_POINTER = ir.IntType(8).as_pointer()

ON_WORDS = {
    dp4a: "dp4a.s32.s32 $0, $1, $2, $3;",
    permute: "prmt.b32 $0, $1, $2, $3;",
    funnel: "shf.r.wrap.b32 $0, $1, $2, $3;",
}
CONVERSIONS = {  # PTX, its operands, the types of argument and result
    half: ("cvt.f32.f16 $0, $1;", "=f,h", types.uint16, types.float32),
    to_half: ("cvt.rn.f16.f32 $0, $1;", "=h,f", types.float32, types.uint16),
    as_float: ("mov.b32 $0, $1;", "=f,r", types.int32, types.float32),
    nearest: ("cvt.rni.s32.f32 $0, $1;", "=r,f", types.float32, types.int32),
}
PAIRS = {
    two_halves: "cvt.rn.f16x2.f32 $0, $2, $1;",
    two_bfloats: "cvt.rn.bf16x2.f32 $0, $2, $1;",
}
LOADS = {  # PTX and its operands
    load16: ("ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l"),
    load8: ("ld.global.nc.v2.u32 {$0,$1}, [$2];", "=r,=r,l"),
    load4: ("ld.global.nc.u32 $0, [$1];", "=r,l"),
    load2: ("ld.global.nc.u16 $0, [$1];", "=r,l"),
    load1: ("ld.global.nc.u8 $0, [$1];", "=r,l"),
    signed1: ("ld.global.nc.s8 $0, [$1];", "=r,l"),
}


def _assembly(builder, text, constraints, result, arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints), arguments)


def _on_words(function, text, intrinsic, overload):
    @intrinsic
    def emitted(typingctx, a, b, c):
        def generate(context, builder, signature, arguments):
            return _assembly(builder, text, "=r,r,r,r", _WORD, arguments)

        return types.int32(types.int32, types.int32, types.int32), generate

    @overload(function)
    def typed(a, b, c):
        return lambda a, b, c: emitted(types.int32(a), types.int32(b), types.int32(c))


def _conversion(function, form, intrinsic, overload):
    text, constraints, source, target = form

    @intrinsic
    def emitted(typingctx, value):
        def generate(context, builder, signature, arguments):
            result = context.get_value_type(target)
            return _assembly(builder, text, constraints, result, arguments)

        return target(source), generate

    @overload(function)
    def typed(value):
        return lambda value: emitted(source(value))


def _pair(function, text, intrinsic, overload):
    @intrinsic
    def emitted(typingctx, low, high):
        def generate(context, builder, signature, arguments):
            return _assembly(builder, text, "=r,f,f", _WORD, arguments)

        return types.int32(types.float32, types.float32), generate

    @overload(function)
    def typed(low, high):
        return lambda low, high: emitted(types.float32(low), types.float32(high))


def _load(function, form, intrinsic, overload, cgutils):
    text, constraints = form
    n_words = constraints.count("=")

    @intrinsic
    def emitted(typingctx, array, at):
        result = types.int32 if n_words == 1 else types.UniTuple(types.int32, n_words)

        def generate(context, builder, signature, arguments):
            proxy = cgutils.create_struct_proxy(signature.args[0])
            base = proxy(context, builder, value=arguments[0]).data
            place = builder.gep(builder.bitcast(base, _POINTER), [arguments[1]])
            kind = ir.LiteralStructType([_WORD] * n_words) if n_words > 1 else _WORD
            loaded = _assembly(builder, text, constraints, kind, [place])
            if n_words == 1:
                return loaded
            words = [builder.extract_value(loaded, i) for i in range(n_words)]
            return cgutils.pack_array(builder, words)

        return result(array, types.int64), generate

    @overload(function)
    def typed(array, at):
        return lambda array, at: emitted(array, types.int64(at))


if not config.ENABLE_CUDASIM:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic, overload

    for _operation, _text in ON_WORDS.items():
        _on_words(_operation, _text, intrinsic, overload)
    for _converter, _conversion_form in CONVERSIONS.items():
        _conversion(_converter, _conversion_form, intrinsic, overload)
    for _packer, _text in PAIRS.items():
        _pair(_packer, _text, intrinsic, overload)
    for _loader, _load_form in LOADS.items():
        _load(_loader, _load_form, intrinsic, overload, cgutils)
