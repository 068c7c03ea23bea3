"""Products of small matrices, a warp each: what tensor cores do (mma.sync of the PTX ISA).

A warp multiplies 16 rows of weights with 8 tokens. Both lie in memory row by row, columns next to
each other, and each lane holds words of 4 bytes: of group = lane // 4 and member = lane % 4,

    rows group, group + 8               word member of every 16 bytes of columns
    token group                         the same
    products of rows group, group + 8   with tokens 2 member, 2 member + 1

(PTX ISA, matrix fragments of mma.m8n8k16, m16n8k16 and m16n8k32 with .s8.) `multiply(rows, tokens,
lane)` takes the words of 32 columns as (row, row + 8, the same of the next 16), (token, the next),
or of 16 columns half of them, and gives the four products: row with both tokens, row + 8 with both.
The Python body is what the simulator runs. `load_words` brings a lane its words of four such pieces
of shared memory at once (ldmatrix).

Of float16 and bfloat16 a word holds two, and 32 bytes are 16 columns: the lanes' words are the same
ones (mma.m16n8k16 with .f16 and .bf16). `multiply_add(rows, tokens, sums, lane)` adds the products
to four float32.
"""

from typing import Any

from llvmlite import ir
from numba import config, cuda, types

from runtime.kernels.cuda.primitives import as_float, dp4a, half

ALL = 0xFFFFFFFF
_WORD = ir.IntType(32)
_SHARED = 3  # the address space of shared memory (NVVM IR)

_INT8 = "row.col.s32.s8.s8.s32"
_HALF = "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
HALVES = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {_HALF}"
BFLOATS = f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {_HALF}"
_8_ROWS = f"mma.sync.aligned.m8n8k16.{_INT8}"
AMPERE_16 = (
    f"mma.sync.aligned.m16n8k16.{_INT8} {{$0,$1,$2,$3}}, {{$4,$5}}, {{$6}}, {{$7,$7,$7,$7}};"
)
AMPERE_32 = (
    f"mma.sync.aligned.m16n8k32.{_INT8} "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$10,$10,$10};"
)
TURING_16 = (
    f"{_8_ROWS} {{$0,$1}}, {{$4}}, {{$6}}, {{$7,$7}}; "
    f"{_8_ROWS} {{$2,$3}}, {{$5}}, {{$6}}, {{$7,$7}};"
)
TURING_32 = (
    f"{_8_ROWS} {{$0,$1}}, {{$4}}, {{$8}}, {{$10,$10}}; "
    f"{_8_ROWS} {{$2,$3}}, {{$5}}, {{$8}}, {{$10,$10}}; "
    f"{_8_ROWS} {{$0,$1}}, {{$6}}, {{$9}}, {{$0,$1}}; "
    f"{_8_ROWS} {{$2,$3}}, {{$7}}, {{$9}}, {{$2,$3}};"
)


ALIGNMENT = None if config.ENABLE_CUDASIM else 16  # bytes: of arrays that load_words reads
LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"


def load_words(words, at, lane):
    """The lanes' words of four times 8 rows of 16 bytes, that begin at words `at` of the lanes 0 to
    7, 8 to 15, 16 to 23 and 24 to 31 in shared memory: row lane // 4 of each, word lane % 4."""
    assert at % 4 == 0
    places = [cuda.shfl_sync(ALL, at, 8 * i + lane // 4) for i in range(4)]
    return tuple(words[place + lane % 4] for place in places)


def _emit_load(load_words: Any) -> Any:
    if config.ENABLE_CUDASIM:
        return cuda.jit(device=True)(load_words)
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic, overload

    @intrinsic
    def emitted(typingctx, words, at):
        def generate(context, builder, signature, arguments):
            proxy = cgutils.create_struct_proxy(signature.args[0])
            base = proxy(context, builder, value=arguments[0]).data
            place = builder.gep(base, [arguments[1]])
            shared = builder.addrspacecast(place, ir.PointerType(_WORD, _SHARED))
            kind = ir.FunctionType(ir.LiteralStructType([_WORD] * 4), [_WORD])
            # What the block has written before a barrier must be there: no load may move.
            assembly = ir.InlineAsm(kind, LOAD, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
            address = builder.ptrtoint(shared, _WORD)
            made = builder.call(assembly, [address], attrs=("convergent",))
            return cgutils.pack_array(builder, [builder.extract_value(made, i) for i in range(4)])

        return types.UniTuple(types.int32, 4)(words, types.int64), generate

    @overload(load_words)
    def typed(words, at, lane):
        return lambda words, at, lane: emitted(words, types.int64(at))

    return load_words


load_words = _emit_load(load_words)


def _make_multiply(text: str, n_words: int) -> Any:
    """The product of fragments of so many words a token; the device gets `text`."""

    def multiply(rows, tokens, lane):
        group, member = lane // 4, lane % 4
        mine = [cuda.shfl_sync(ALL, rows, 4 * group + i) for i in range(4)]
        products = []
        for side in range(2):
            for token in (2 * member, 2 * member + 1):
                theirs = [cuda.shfl_sync(ALL, tokens, 4 * token + i) for i in range(4)]
                total = 0
                for i in range(4):
                    for j in range(n_words):
                        total = dp4a(mine[i][2 * j + side], theirs[i][j], total)
                products.append(total)
        return tuple(products)

    if config.ENABLE_CUDASIM:
        return cuda.jit(device=True)(multiply)
    _emit(multiply, text, n_words)
    return multiply


def _emit(multiply: Any, text: str, n_words: int) -> None:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic, overload

    # Results are written while operands are still read: none may share a register.
    constraints = ",".join(["=&r"] * 4 + ["r"] * (3 * n_words + 1))

    @intrinsic
    def emitted(typingctx, rows, tokens):
        def generate(context, builder, signature, arguments):
            words = [builder.extract_value(arguments[0], i) for i in range(2 * n_words)]
            words += [builder.extract_value(arguments[1], i) for i in range(n_words)]
            words.append(_WORD(0))
            kind = ir.FunctionType(ir.LiteralStructType([_WORD] * 4), [_WORD] * len(words))
            # All lanes must come here together, so it may not move into a branch.
            assembly = ir.InlineAsm(kind, text, constraints, side_effect=True)
            made = builder.call(assembly, words, attrs=("convergent",))
            results = [builder.extract_value(made, i) for i in range(4)]
            return cgutils.pack_array(builder, results)

        given = types.UniTuple(types.int32, 2 * n_words), types.UniTuple(types.int32, n_words)
        return types.UniTuple(types.int32, 4)(*given), generate

    @overload(multiply)
    def typed(rows, tokens, lane):
        return lambda rows, tokens, lane: emitted(rows, tokens)


MULTIPLY = {  # by the GPU's generation and the columns at a time
    ("ampere", 16): _make_multiply(AMPERE_16, 1),
    ("ampere", 32): _make_multiply(AMPERE_32, 2),
    ("turing", 16): _make_multiply(TURING_16, 1),
    ("turing", 32): _make_multiply(TURING_32, 2),
}


def _low_half(word):
    return half(word & 0xFFFF)


def _high_half(word):
    return half(word >> 16 & 0xFFFF)


def _low_bfloat(word):
    return as_float(word << 16)


def _high_bfloat(word):
    return as_float(word & -65536)


def _make_multiply_add(text: str, low: Any, high: Any) -> Any:
    """The same of words of two floats."""

    def multiply_add(rows, tokens, sums, lane):
        group, member = lane // 4, lane % 4
        mine = [cuda.shfl_sync(ALL, rows, 4 * group + i) for i in range(4)]
        made = []
        for row in range(2):
            for j, token in enumerate((2 * member, 2 * member + 1)):
                theirs = [cuda.shfl_sync(ALL, tokens, 4 * token + i) for i in range(4)]
                total = sums[2 * row + j]
                for i in range(4):
                    for n in range(2):
                        a, b = mine[i][2 * n + row], theirs[i][n]
                        total += low(a) * low(b) + high(a) * high(b)
                made.append(total)
        return tuple(made)

    if config.ENABLE_CUDASIM:
        return cuda.jit(device=True)(multiply_add)
    _emit_add(multiply_add, text)
    return multiply_add


def _emit_add(multiply_add: Any, text: str) -> None:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic, overload

    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    given = (
        types.UniTuple(types.int32, 4),
        types.UniTuple(types.int32, 2),
        types.UniTuple(types.float32, 4),
    )

    @intrinsic
    def emitted(typingctx, rows, tokens, sums):
        def generate(context, builder, signature, arguments):
            parts = [
                builder.extract_value(argument, i)
                for argument, kind in zip(arguments, given, strict=True)
                for i in range(kind.count)
            ]
            result = ir.LiteralStructType([ir.FloatType()] * 4)
            kind = ir.FunctionType(result, [part.type for part in parts])
            assembly = ir.InlineAsm(kind, text, constraints, side_effect=True)
            made = builder.call(assembly, parts, attrs=("convergent",))
            return cgutils.pack_array(builder, [builder.extract_value(made, i) for i in range(4)])

        return types.UniTuple(types.float32, 4)(*given), generate

    @overload(multiply_add)
    def typed(rows, tokens, sums, lane):
        return lambda rows, tokens, sums, lane: emitted(rows, tokens, sums)


MULTIPLY_ADD = {
    "F16": _make_multiply_add(HALVES, _low_half, _high_half),
    "BF16": _make_multiply_add(BFLOATS, _low_bfloat, _high_bfloat),
}
