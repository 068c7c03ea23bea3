"""What a stage needs before it runs on the CPU: compiled kernels, and scratch."""

from __future__ import annotations

from gguf_tools.jit import Kernel
from runtime.backends.flow import unknown
from runtime.backends.products import few_columns
from runtime.kernels import attention, elementwise, experts, gates, interpreter, kv_cache, matmul
from runtime.kernels.kv_cache import KV_TYPES, KVType
from runtime.kernels.table import FORMATS
from runtime.program import (
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Program,
    RMSNorm,
    Rope,
    Route,
    Scale,
    Show,
    SigmoidScale,
    SoftCap,
    Stage,
    StoreKV,
    matrices,
)

SLOW = (attention.attend_tiles, attention.attend_chunks, interpreter.run_table)  # to compile


def needed_kernels(stage: Stage, kv_type: str) -> list[Kernel]:
    """The kernels that `stage` needs, the slowest to compile first."""
    small = [kernel for step in stage.steps for kernel in _kernels(step)]
    quants = {matrix.quant.name for matrix in matrices(stage)} & FORMATS.keys()
    formats = [FORMATS[name] for name in sorted(quants)]
    quantisers = [f.activation.quantise for f in formats]
    found = [
        *KV_TYPES[kv_type].kernels,
        *(kernel for kernel in SLOW if kernel in small or kernel is interpreter.run_table),
        *small,
        *(k for f in formats for k in (f.matvec, f.rows)),
        *(k for k in quantisers if k is not None),
        *(matmul.tile_for(f) for f in formats if f.group),
    ]
    return list(dict.fromkeys(found))


def few_kernels(program: Program | Stage) -> list[Kernel]:
    """The kernels that a few tokens at once need besides."""
    steps = (step for step in program.steps if isinstance(step, MatMul))
    quants = {step.matrix.quant.name for step in steps} & FORMATS.keys()
    several = [k for name in sorted(quants) for k in few_columns(FORMATS[name])[1:]]
    return [matmul.matvec_few, *several]


def _kernels(step: Instruction) -> tuple[Kernel, ...]:
    """The kernels of an instruction that do not depend on its formats."""
    match step:
        case RMSNorm():
            return (elementwise.rms_norm,)
        case LayerNorm():
            return (elementwise.layer_norm,)
        case MatMul():
            return _product(step)
        case AddBias():
            return (elementwise.add_bias,)
        case Rope():
            return (elementwise.rope,)
        case StoreKV():
            return (kv_cache.store_kv,)
        case Attend():
            capped = (attention.cap_scores,) if step.softcap else ()
            return (attention.attend_tiles, attention.attend_chunks, attention.combine, *capped)
        case Gate():
            return (gates.GATES[step.activation],)
        case Activate():
            return (gates.ALONE[step.activation],)
        case Add():
            return (elementwise.add,)
        case Scale():
            return (elementwise.scale,)
        case SoftCap():
            return (elementwise.softcap,)
        case Route():
            return (experts.route,)
        case ExpertMatMul():
            return _expert_product(step)
        case ExpertBias():
            return (experts.expert_bias,)
        case ExpertSum():
            return (experts.expert_sum,)
        case SigmoidScale():
            return (elementwise.sigmoid_scale,)
        case Show():
            return ()
        case _:
            unknown(step)


def _product(step: MatMul) -> tuple[Kernel, ...]:
    kernels = FORMATS.get(step.matrix.quant.name)
    if kernels is None:
        return ()
    if not kernels.group:
        return (matmul.matvec, matmul.matmul_floats, matmul.tile_floats)
    return (matmul.matvec, matmul.matmul_bytes, matmul.quantise, matmul.quantise_columns)


def _expert_product(step: ExpertMatMul) -> tuple[Kernel, ...]:
    kernels = FORMATS.get(step.experts[0].quant.name)
    if kernels is None:
        return ()
    product = (experts.expert_matvec, experts.expert_matmul, experts.sort_pairs)
    if not kernels.group:
        return (*product, experts.gather_sorted, matmul.matmul_floats, matmul.tile_floats)
    quantise = (matmul.quantise, experts.quantise_slots, experts.quantise_sorted)
    return (*product, matmul.matmul_bytes, *quantise)


def scratch_bytes(stage: Stage, n_positions: int, n_batch: int, kv: KVType) -> int:
    """Scratch per thread, in whole pages."""
    needs = [4096]
    for step in stage.steps:
        match step:
            case MatMul():
                needs.append(matmul.scratch_bytes(step.matrix.n_columns))
            case ExpertMatMul():
                needs.append(experts.scratch_bytes(step.experts[0].n_columns, n_batch))
            case Route():
                needs.append(experts.route_scratch_bytes(stage.buffers[step.scores]))
    for shape in stage.caches:
        group = shape.n_heads // shape.n_kv_heads
        dims = shape.key_dim, shape.value_dim
        needs.append(attention.scratch_bytes(n_positions, group, *dims, kv))
    return (max(needs) + 4095) // 4096 * 4096
