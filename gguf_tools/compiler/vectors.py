"""LLVM vectors as numba types, and the pieces of IR that operations on them are made of.

What names instructions of one processor is here, chosen by `DOT`: the byte dot product and the
byte table. `gguf_tools.simd` and `gguf_tools.tiles` make operations for kernels out of these.
"""

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from gguf_tools.processor import ARM_DOTS, DOT

# --- the types -------------------------------------------------------------------------------


class BFloat(ir.Type):
    """llvmlite has no bfloat type of its own."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
ELEMENTS = {
    "i8": I8,
    "i16": ir.IntType(16),
    "i32": I32,
    "i64": I64,
    "f32": ir.FloatType(),
    "f16": ir.HalfType(),
    "bf16": BFloat(),
}
SCALARS = {
    "i8": types.int8,
    "i16": types.int16,
    "i32": types.int32,
    "i64": types.int64,
    "f32": types.float32,
}
_LANES = {
    "i8": (8, 16, 32, 64),
    "i16": (4, 8, 16, 32),
    "i32": (4, 8, 16),
    "i64": (2, 4, 8),
    "f32": (4, 8, 16),
    "f16": (4, 8, 16, 32),
    "bf16": (8, 16, 32),
}


class Vector(types.Type):
    """The numba type of an n-lane LLVM vector; `element` is a key of ELEMENTS."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element}x{lanes})")

    @property
    def is_float(self) -> bool:
        return self.element in ("f32", "f16", "bf16")

    def llvm(self) -> Any:
        return ir.VectorType(ELEMENTS[self.element], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm())


VECTORS = {f"{e}x{n}": Vector(e, n) for e, lanes in _LANES.items() for n in lanes}


# --- pieces of IR, also used by tiles.py -----------------------------------------------------


def pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType())


def emit_call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Call an LLVM intrinsic, or a function of the C library, by name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def emit_shuffle(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if b is None else b, mask)


def emit_splat(builder: Any, vector: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return emit_shuffle(builder, first, None, [0] * vector.count)


def emit_prefetch(builder: Any, place: Any) -> None:
    arguments = [place, I32(0), I32(3), I32(1)]
    emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return emit_call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def emit_convert(builder: Any, value: Any, source: Any, target: Vector, signed: bool) -> Any:
    kind = target.llvm()
    if source.is_float and target.is_float:
        order = ["bf16", "f16", "f32"]
        wider = order.index(source.element) < order.index(target.element)
        return builder.fpext(value, kind) if wider else builder.fptrunc(value, kind)
    if source.is_float:
        return builder.fptosi(value, kind)
    if target.is_float:
        return builder.sitofp(value, kind) if signed else builder.uitofp(value, kind)
    if int(source.element[1:]) > int(target.element[1:]):
        return builder.trunc(value, kind)
    return builder.sext(value, kind) if signed else builder.zext(value, kind)


def emit_dot(builder: Any, total: Any, unsigned: Any, signed: Any, *, small: bool = False) -> Any:
    """total.i32[n] += sum over 4 neighbouring bytes of unsigned * signed.

    Exact for all bytes; `small` promises unsigned bytes below 128, which is cheaper on AVX2.
    """
    n = total.type.count
    widest = {"avx512vnni": 16, "avxvnni": 8, "avx2": 8}.get(DOT, 4 if DOT in ARM_DOTS else 16)
    if n > widest:
        halves = []
        for first in (0, 1):
            lanes = range(first * n // 2, (first + 1) * n // 2)
            byte_lanes = range(first * n * 2, (first + 1) * n * 2)
            part = emit_shuffle(builder, total, None, lanes)
            u, s = (emit_shuffle(builder, v, None, byte_lanes) for v in (unsigned, signed))
            halves.append(emit_dot(builder, part, u, s, small=small))
        return emit_shuffle(builder, halves[0], halves[1], range(n))
    if DOT in ("avx512vnni", "avxvnni"):
        if llvm.llvm_version_info[0] < 22:  # the operands were dword vectors before LLVM 22
            unsigned, signed = (builder.bitcast(v, total.type) for v in (unsigned, signed))
        name = f"llvm.x86.avx512.vpdpbusd.{n * 32}"
        return emit_call(builder, name, total.type, [total, unsigned, signed])
    if DOT == "avx2":
        return _emit_dot_avx2(builder, total, unsigned, signed, small=small)
    if DOT in ARM_DOTS:
        return _emit_dot_arm(builder, total, unsigned, signed, small=small)
    # llvm.vector.partial.reduce.add leaves open which products meet in which lane; kernels rely
    # on neighbours.
    wide = ir.VectorType(I32, 4 * n)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for first in range(4):
        total = builder.add(total, emit_shuffle(builder, products, None, range(first, 4 * n, 4)))
    return total


def _emit_dot_avx2(b: Any, total: Any, unsigned: Any, signed: Any, *, small: bool) -> Any:
    n = total.type.count
    pairs = ir.VectorType(ir.IntType(16), 2 * n)
    add_pairs = {8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}[n]
    if small:  # 2 * 127 * 128 fits 16 bits: the sums of pairs cannot saturate
        multiply = {8: "llvm.x86.avx2.pmadd.ub.sw", 4: "llvm.x86.ssse3.pmadd.ub.sw.128"}[n]
        products = emit_call(b, multiply, pairs, [unsigned, signed])
        ones = ir.Constant(pairs, [1] * 2 * n)
        return b.add(total, emit_call(b, add_pairs, total.type, [products, ones]))
    eight, low = ir.Constant(pairs, [8] * 2 * n), ir.Constant(pairs, [255] * 2 * n)
    u, s = b.bitcast(unsigned, pairs), b.bitcast(signed, pairs)
    even = [b.and_(u, low), b.ashr(b.shl(s, eight), eight)]
    odd = [b.lshr(u, eight), b.ashr(s, eight)]
    even_sum = emit_call(b, add_pairs, total.type, even)
    return b.add(total, b.add(even_sum, emit_call(b, add_pairs, total.type, odd)))


def _emit_dot_arm(b: Any, total: Any, unsigned: Any, signed: Any, *, small: bool) -> Any:
    kind, arm = total.type, "llvm.aarch64.neon"
    if DOT == "i8mm":
        return emit_call(b, f"{arm}.usdot.v4i32.v16i8", kind, [total, unsigned, signed])
    if DOT == "armv8":
        words, sums = ir.VectorType(ir.IntType(16), 8), []
        for lanes in (range(8), range(8, 16)):
            u, s = (emit_shuffle(b, v, None, lanes) for v in (unsigned, signed))
            u = b.sext(u, words) if small else b.zext(u, words)
            product = b.mul(u, b.sext(s, words))  # 255 * -128 fits
            sums.append(emit_call(b, f"{arm}.saddlp.v4i32.v8i16", kind, [product]))
        return b.add(total, emit_call(b, f"{arm}.addp.v4i32", kind, sums))
    name = f"{arm}.sdot.v4i32.v16i8"
    if small:
        return emit_call(b, name, kind, [total, unsigned, signed])
    # sdot takes signed bytes: u = (u - 128) + 128, and 128 times the sum of s comes apart.
    flip, ones = (ir.Constant(unsigned.type, [value] * 16) for value in (-128, 1))
    sums = emit_call(b, name, kind, [ir.Constant(kind, None), ones, signed])
    total = b.add(total, b.shl(sums, ir.Constant(kind, [7] * 4)))
    return emit_call(b, name, kind, [total, b.xor(unsigned, flip), signed])


def emit_lookup(b: Any, table: Any, indices: Any) -> Any:
    n = indices.type.count
    widest = {"avx512vnni": 64, "avxvnni": 32, "avx2": 32}.get(DOT, 16 if DOT in ARM_DOTS else 0)
    if not widest:
        # A tree of choices: the lowest bit of the index chooses among neighbours, and so on.
        entries = [emit_splat(b, indices.type, b.extract_element(table, I32(i))) for i in range(16)]
        for bit in (1, 2, 4, 8):
            mask = ir.Constant(indices.type, [bit] * n)
            chosen = b.icmp_unsigned("!=", b.and_(indices, mask), ir.Constant(indices.type, None))
            pairs = zip(entries[::2], entries[1::2], strict=True)
            entries = [b.select(chosen, second, first) for first, second in pairs]
        return entries[0]
    if n > widest:
        parts = [range(first, first + n // 2) for first in (0, n // 2)]
        done = [emit_lookup(b, table, emit_shuffle(b, indices, None, lanes)) for lanes in parts]
        return emit_shuffle(b, done[0], done[1], range(n))
    if DOT in ARM_DOTS:
        return emit_call(b, f"llvm.aarch64.neon.tbl1.v{n}i8", indices.type, [table, indices])
    names = {16: "ssse3.pshuf.b.128", 32: "avx2.pshuf.b", 64: "avx512.pshuf.b.512"}
    repeated = emit_shuffle(b, table, None, [i % 16 for i in range(n)])  # it looks up in 16 lanes
    return emit_call(b, f"llvm.x86.{names[n]}", indices.type, [repeated, indices])
