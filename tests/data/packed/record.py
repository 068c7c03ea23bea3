"""Write tests/data/packed: two matrices as each scheme's own library stores them, and what the same
library reads out of them.

    python tests/data/packed/record.py [NAME...]

Needs torch, safetensors, compressed-tensors, bitsandbytes, gptqmodel, autoawq and auto-gptq (for
gptq-marlin), which the tests do not. Of the last three only the code that packs and unpacks is run,
from their files, as they want compilers to be installed. Matrices have sizes that no block or group
divides where a scheme allows it. Weights are drawn once more wide in a few columns, so that scales
differ.
"""

import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DATA = Path(__file__).parent
SHAPES = {"self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 96)}
MARLIN_SHAPES = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}  # whole 64s of outputs
PREFIX = "model.layers.0."

Parts = dict[str, torch.Tensor]
Result = tuple[Parts, Parts, dict[str, Any]]  # stored, weights, quantization_config


def matrices(seed: int = 0, shapes: dict[str, tuple[int, int]] = SHAPES) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.1
        weight[:, ::17] *= 4
        weight[::13] *= 0.1
        found[name] = weight
    return found


# --- compressed-tensors -------------------------------------------------------------------------


def compressed(format_: str, **weights: Any) -> Callable[[], Result]:
    def record() -> Result:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_)
        compressor = BaseCompressor.get_value_from_registry(format_)
        parts, floats = {}, {}
        for name, weight in matrices().items():
            scale, zero, more = qparams(weight, args, calculate_qparams)
            state = {"weight": weight, "weight_scale": scale, **more}
            if not args.symmetric:
                state["weight_zero_point"] = zero
            stored = compressor.compress(state, scheme)
            floats[name] = compressor.decompress(dict(stored), scheme)["weight"].float()
            parts |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        config = {
            "quant_method": "compressed-tensors",
            "format": format_,
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
        return parts, floats, config

    return record


def qparams(weight: torch.Tensor, args: Any, calculate: Callable[..., Any]) -> Any:
    """Scales and zero points from the smallest and the largest weight of each rectangle."""
    height, width = weight.shape
    strategy = str(args.strategy.value if hasattr(args.strategy, "value") else args.strategy)
    tall, wide = {
        "tensor": (height, width),
        "channel": (1, width),
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[strategy]
    down, across = -(-height // tall), -(-width // wide)
    low, high = torch.empty(down, across), torch.empty(down, across)
    for i in range(down):
        for j in range(across):
            block = weight[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
            low[i, j], high[i, j] = block.min(), block.max()
    more = {}
    options = {}
    if strategy == "tensor_group":
        from compressed_tensors.quantization.utils import generate_gparam

        more["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
        options["global_scale"] = more["weight_global_scale"]
    if strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    scale, zero = calculate(low, high, args, **options)
    return scale, zero, more


# --- FP8: written with torch's own 8-bit floats, read as DeepSeek's weight_dequant does -----------


def fp8(
    method: str,
    dtype: torch.dtype,
    suffix: str,
    *,
    rectangle: tuple[int, int] | None,
    config: dict[str, Any],
    scale_dtype: torch.dtype = torch.float32,
) -> Callable[[], Result]:
    def record() -> Result:
        parts, floats = {}, {}
        for name, weight in matrices().items():
            tall, wide = (size or weight.shape[i] for i, size in enumerate(rectangle or (0, 0)))
            rows = torch.arange(weight.shape[0]) // tall
            columns = torch.arange(weight.shape[1]) // wide
            scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
            for i, j in ((i, j) for i in rows.unique() for j in columns.unique()):
                block = weight[rows == i][:, columns == j]
                scale[i, j] = block.abs().max() / torch.finfo(dtype).max
            if scale_dtype == torch.float8_e8m0fnu:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scale = scale.to(scale_dtype)
            factor = scale.float()[rows][:, columns]
            codes = (weight / factor).to(dtype)
            parts |= {f"{name}.weight": codes, f"{name}.weight{suffix}": scale}
            if rectangle is None:
                parts[f"{name}.weight{suffix}"] = scale.reshape(())
                parts[f"{name}.input_scale"] = torch.ones(())
            floats[name] = codes.float() * factor
        return parts, floats, {"quant_method": method, **config}

    return record


# --- GPTQ ---------------------------------------------------------------------------------------


def gptq(bits: int, *, version: int = 1, sym: bool = True, act_order: bool = False) -> Any:
    size = 32

    def record() -> Result:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
        from gptqmodel.utils.model_dequant import convert_gptq_file

        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "sym": sym,
            "desc_act": act_order,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        }
        parts = {}
        for name, weight in matrices().items():
            height, width = weight.shape
            generator = torch.Generator().manual_seed(1)
            order = torch.randperm(width, generator=generator) if act_order else torch.arange(width)
            g_idx = torch.empty(width, dtype=torch.int32)
            g_idx[order] = torch.arange(width, dtype=torch.int32) // size
            scales, zeros = torch.empty(2, height, width // size)
            for group in range(width // size):
                band = weight[:, g_idx == group]
                low = -band.abs().amax(1) if sym else band.amin(1).clamp(max=0)
                high = band.abs().amax(1) if sym else band.amax(1).clamp(min=0)
                scale = ((high - low) / (2**bits - 1)).half().float()
                scales[:, group] = scale
                middle = torch.full_like(scale, 2.0 ** (bits - 1))
                zeros[:, group] = middle if sym else (-low / scale).round().clamp(1, 2**bits - 1)
            linear = torch.nn.Linear(width, height, bias=False)
            linear.weight.data = weight
            module = TorchLinear(
                bits=bits, group_size=size, sym=sym, desc_act=act_order, in_features=width,
                out_features=height, bias=False, pack_dtype=torch.int32, register_buffers=True,
            )  # fmt: skip
            module.pack_block(linear, scales, zeros, g_idx)
            if version == 1:
                convert_gptq_v2_to_v1_format_module(module, module)
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                parts[f"{name}.{part}"] = getattr(module, part).clone()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in parts.items()}, file)
            read = convert_gptq_file(file, torch.float32, config, "cpu")
        return parts, {name: read[f"{name}.weight"].float() for name in SHAPES}, config

    return record


# --- AWQ ----------------------------------------------------------------------------------------

AWQ_PACKAGES = ("awq", "awq.utils", "awq.modules", "awq.modules.linear")


def awq(version: str = "gemm") -> Result:
    skip_packages(*AWQ_PACKAGES)
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    parts, floats, size = {}, {}, 32
    for name, weight in matrices().items():
        height, width = weight.shape
        groups = weight.reshape(height, width // size, size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(0, 15)
        linear = torch.nn.Linear(width, height, bias=False)
        scale = scales.repeat_interleave(size, 1)
        zero = zeros.repeat_interleave(size, 1)
        codes = ((weight / scale).round() + zero).clamp(0, 15)
        linear.weight.data = (codes - zero) * scale
        module = WQLinear_GEMM.from_linear(
            linear, 4, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        found = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, size)
        floats[name] = found.T
        if version == "gemv":  # for which there is no reader but on GPUs
            module = WQLinear_GEMV.from_linear(linear, 4, size, scales=scales, zeros=zeros)
        for part in ("qweight", "qzeros", "scales"):
            parts[f"{name}.{part}"] = getattr(module, part)
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "version": version,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return parts, floats, config


# --- Marlin: its readers are on GPUs; the weights are those that were given to be packed ----------


def marlin(method: str, size: int) -> Callable[[], Result]:
    def record() -> Result:
        parts, floats = {}, {}
        for name, weight in matrices(shapes=MARLIN_SHAPES).items():
            height, width = weight.shape
            groups = weight.reshape(height, -1, size if size > 0 else width)
            scales = (groups.abs().amax(-1) / 8).half()
            factors = scales.float()[:, :, None]
            codes = (groups / factors).round().clamp(-8, 7)
            floats[name] = (codes * factors).reshape(height, width)
            linear = torch.nn.Linear(width, height, bias=False)
            linear.weight.data = floats[name]
            if method == "awq":
                skip_packages(*AWQ_PACKAGES)
                from awq.modules.linear.marlin import WQLinear_Marlin

                given = size if size > 0 else width
                module: Any = WQLinear_Marlin.from_linear(linear, 4, given, scales=scales.float())
                parts |= {f"{name}.{part}": getattr(module, part) for part in ("qweight", "scales")}
                continue
            skip_packages("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
            from auto_gptq.nn_modules.qlinear.qlinear_marlin import QuantLinear

            module = types.SimpleNamespace(
                infeatures=width, outfeatures=height, group_size=size if size > 0 else width,
                bias=None, B=torch.empty(width // 16, height * 2, dtype=torch.int32),
                s=torch.empty(scales.shape[1], height, dtype=torch.half),
            )  # fmt: skip
            linear.weight.data = linear.weight.data.half()
            QuantLinear.pack(module, linear, scales)
            parts |= {f"{name}.B": module.B, f"{name}.s": module.s}
            parts[f"{name}.workspace"] = torch.zeros(height // 128 * 16 + 1, dtype=torch.int32)
        config = {"quant_method": method, "bits": 4, "group_size": size}
        if method == "awq":
            return parts, floats, {**config, "version": "marlin", "zero_point": False}
        config |= {"sym": True, "desc_act": False, "is_marlin_format": True}
        return parts, floats, {**config, "checkpoint_format": "marlin"}

    return record


def skip_packages(*names: str) -> None:
    """Let submodules be imported without what the packages themselves import."""
    for part in names:
        if part in sys.modules:
            continue
        found = importlib.util.find_spec(part)
        assert found is not None
        module = types.ModuleType(part)
        module.__path__ = list(found.submodule_search_locations or ())
        sys.modules[part] = module


# --- bitsandbytes -------------------------------------------------------------------------------


def four_bits(kind: str, *, nested: bool, size: int = 64) -> Callable[[], Result]:
    def record() -> Result:
        from bitsandbytes import functional
        from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

        parts, floats = {}, {}
        for name, weight in matrices().items():
            codes, state = functional.quantize_4bit(
                weight, blocksize=size, compress_statistics=nested, quant_type=kind
            )
            parts[f"{name}.weight"] = codes
            stored = state.as_dict(packed=True)
            parts |= {f"{name}.weight.{part}": tensor for part, tensor in stored.items()}
            peaks = state.absmax
            if nested:
                peaks = functional.dequantize_blockwise(peaks, state.state2) + state.offset
            # Not dequantize_4bit: for CPUs (0.50.2) it begins a block with each row, which the
            # quantiser does not, so that widths that are no multiple of a block come out wrong.
            floats[name] = _dequantize_4bit_compute(
                codes.reshape(-1), peaks, state.code, size, weight.shape, torch.float32
            )
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
        }
        return parts, floats, config

    return record


def int8() -> Result:
    from bitsandbytes import functional

    parts, floats = {}, {}
    for name, weight in matrices().items():
        codes, peaks, _ = functional.int8_vectorwise_quant(weight.half())
        parts |= {f"{name}.weight": codes, f"{name}.SCB": peaks}
        parts[f"{name}.weight_format"] = torch.zeros((), dtype=torch.uint8)
        floats[name] = functional.int8_vectorwise_dequant(codes, peaks)
    return parts, floats, {"load_in_8bit": True, "llm_int8_threshold": 6.0}


RECORDS: dict[str, Callable[[], Result]] = {
    "gptq-2": gptq(2),
    "gptq-3": gptq(3),
    "gptq-3-asym": gptq(3, sym=False),
    "gptq-4": gptq(4),
    "gptq-4-asym-act": gptq(4, sym=False, act_order=True),
    "gptq-4-v2-asym": gptq(4, version=2, sym=False),
    "gptq-8-act": gptq(8, act_order=True),
    "gptq-marlin": marlin("gptq", -1),
    "awq": awq,
    "awq-gemv": lambda: awq("gemv"),
    "awq-marlin": marlin("awq", 32),
    "bnb-nf4": four_bits("nf4", nested=False),
    "bnb-nf4-double": four_bits("nf4", nested=True),
    "bnb-fp4-double": four_bits("fp4", nested=True, size=128),
    "bnb-int8": int8,
    "fp8-block": fp8(
        "fp8",
        torch.float8_e4m3fn,
        "_scale_inv",
        rectangle=(24, 40),
        config={"weight_block_size": [24, 40], "activation_scheme": "dynamic"},
    ),
    "fp8-block-e8m0": fp8(
        "fp8",
        torch.float8_e4m3fn,
        "_scale_inv",
        rectangle=(128, 128),
        config={"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        scale_dtype=torch.float8_e8m0fnu,
    ),
    "fp8-tensor-e5m2": fp8(
        "fp8", torch.float8_e5m2, "_scale", rectangle=None, config={"activation_scheme": "static"}
    ),
    "fp8-fbgemm": fp8(
        "fbgemm_fp8",
        torch.float8_e4m3fn,
        "_scale",
        rectangle=(1, 0),
        config={"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        scale_dtype=torch.bfloat16,
    ),
    "ct-float-tensor": compressed(
        "float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True
    ),
    "ct-float-channel": compressed(
        "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True
    ),
    "ct-float-block": compressed(
        "float-quantized",
        num_bits=8,
        type="float",
        strategy="block",
        block_structure=[24, 40],
        symmetric=True,
    ),
    "ct-int-channel": compressed(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "ct-int-channel-asym": compressed(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "ct-pack4-group": compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
    ),
    "ct-pack4-group-asym": compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "ct-pack4-channel": compressed(
        "pack-quantized", num_bits=4, type="int", strategy="channel", symmetric=True
    ),
    "ct-pack8-channel-asym": compressed(
        "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "ct-pack3-group-asym": compressed(
        "pack-quantized", num_bits=3, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "ct-nvfp4": compressed(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype="torch.float8_e4m3fn",
    ),
    "ct-mxfp4": compressed(
        "mxfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        symmetric=True,
        scale_dtype="torch.uint8",
    ),
}


def main(names: list[str]) -> None:
    for name in names or RECORDS:
        parts, floats, config = RECORDS[name]()
        tensors = {PREFIX + part: tensor.contiguous() for part, tensor in parts.items()}
        tensors |= {f"expected.{PREFIX}{part}.weight": floats[part].contiguous() for part in floats}
        save_file(tensors, DATA / f"{name}.safetensors", {"config": json.dumps(config)})
        print(name, (DATA / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
