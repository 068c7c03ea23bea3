"""Whether the CUDA kernels are right on this machine's GPU, and how fast they are.

    python benchmarks/gpu.py [--shape 1B|8B] [--model FILE.gguf] [--tokens 64] [--prompt 512]
                             [--no-checks] [--simulate]

First every kernel is checked against the reference backend (tests/cuda/device; it takes the `dev`
extra). Then one table: GB/s of weights that each format's row kernel gets through, TOPS of its tile
kernel on a prompt (with and without tensor cores, where it has them), and the speed of a model of
Q4_K_M with random weights, all beside the GB/s at which the GPU copies its own memory. GB/s of
decoding are bytes of weights and KV cache. `--model` adds a model with a quarter, half and all of
its layers on the GPU, the rest on the CPU: its logits are held against those of the CPU alone.

`--simulate` runs all of it in numba-cuda's simulator, at toy sizes: its times mean nothing, but the
script can be tried where no GPU is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = Path("tests/cuda/device")
SPLIT_TOLERANCE = 5e-2  # of the largest logit: activations of 8 bits, rounded at other places
MATRIX = 1 << 28  # bytes of what is multiplied with: more than the caches of any GPU
SIMULATED = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1", "GGUF_TOOLS_CACHE": "off"}


@dataclass(frozen=True)
class Shape:
    """A model of llama's kind."""

    dim: int
    ffn_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int


SHAPES = {
    "toy": Shape(256, 256, 1, 4, 1, 64, 64),
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 128256),
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 128256),
}


@dataclass(frozen=True)
class Speed:
    """A line of the table."""

    what: str
    seconds: float
    n_bytes: int = 0  # read
    n_operations: int = 0  # two for each weight and token
    n_tokens: int = 0
    remark: str = ""


def main() -> None:
    options = read_options()
    if options.simulate:
        os.environ.update(SIMULATED)
        os.environ["PYTHONPATH"] = str(ROOT)
    sys.path.insert(0, str(ROOT))
    if not options.no_checks:
        run_checks(options.simulate)
    if options.simulate:
        import tests.cuda.simulator  # noqa: F401 - makes the simulator fast
    print_table(list(measure(options)))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "toy"], default="1B")
    parser.add_argument("--tokens", type=int, default=64, help="decoded")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--model", type=Path, help="a GGUF file to split")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    if options.simulate:
        options.shape, options.tokens, options.prompt = "toy", 2, 9
    return options


def run_checks(simulate: bool) -> None:
    """The checks of tests/cuda/device, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "-o",
        "python_files=check_*.py",
        *(["-p", "tests.cuda.simulator"] if simulate else []),
    ]
    if subprocess.run([*command, str(CHECKS)], cwd=ROOT).returncode:
        sys.exit("the kernels are not right here: no speed is measured")


def measure(options: argparse.Namespace) -> Iterator[Speed]:
    toy = options.simulate
    yield measure_copy(1 << (16 if toy else 30))
    from gguf_tools.quants import by_name
    from runtime.backends.cuda_formats import NATIVE

    k = 256 if toy else 8192
    for name in NATIVE:
        n_rows = 8 if toy else MATRIX // by_name(name).row_bytes(k)
        yield from measure_format(name, n_rows, k, options.prompt)
    yield from measure_model(SHAPES[options.shape], options.shape, options)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if toy and model is None:
            from tests.tiny import llama_file

            model = llama_file(Path(folder) / "toy.gguf", quant="Q4_0", n_layers=3, n_vocab=40)
        if model is not None:
            yield from measure_splits(model, options)


def seconds_of(run: Callable[[], None], times: int) -> float:
    """Of one run, after one that compiles and warms."""
    from numba import cuda

    run()
    cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        run()
    cuda.synchronize()
    return (time.perf_counter() - begin) / times


def measure_copy(n_bytes: int) -> Speed:
    import numpy as np
    from numba import cuda

    source, target = (cuda.device_array(n_bytes, np.uint8) for _ in range(2))
    seconds = seconds_of(lambda: target.copy_to_device(source), 10)
    return Speed("copy of device memory", seconds, n_bytes=2 * n_bytes, remark="read and written")


def measure_format(name: str, n_rows: int, k: int, n_tokens: int) -> Iterator[Speed]:
    """A format's product with one token, and with a prompt."""
    import numpy as np
    from numba import cuda

    from runtime.backends.cuda_check import choose_tiles
    from runtime.backends.cuda_formats import weight_bytes
    from runtime.backends.cuda_launches import Launches
    from runtime.backends.cuda_memory import DeviceMemory
    from runtime.backends.cuda_room import make_room
    from runtime.kernels.cuda.tiles import TILES
    from runtime.program import MatMul, Span, Stage
    from tests.programs import random_matrix

    matrix = random_matrix(np.random.default_rng(0), n_rows, k, name)
    step = MatMul("x", "y", matrix)
    stage = Stage({"x": k, "y": n_rows}, (Span((step,), (), {"x": k}, {"y": n_rows}),), ())
    memory = DeviceMemory()
    room = make_room(stage, memory, n_ctx=1, n_batch=n_tokens, kv_type="f16")
    n_bytes, n_operations = weight_bytes(matrix), 2 * n_rows * k
    capability = cuda.get_current_device().compute_capability
    fast, notes = choose_tiles(stage, 0, (capability[0], capability[1]))
    ways = [(1, TILES, ""), (n_tokens, TILES, "")]
    if fast[name] is not TILES[name]:
        ways.append((n_tokens, fast, "tensor cores"))
    for n, tiles, remark in ways:
        *before, product = Launches(room, memory, tiles).make([step], n)
        for launch in before:
            launch()
        seconds = seconds_of(product, 20 if n_rows > 8 else 1)
        what = f"{name}: {'one token' if n == 1 else f'{n} tokens'}"
        yield Speed(
            what,
            seconds,
            n_bytes=n_bytes if n == 1 else 0,
            n_operations=n_operations * n if n > 1 else 0,
            remark=remark or "; ".join(notes) if n > 1 else "",
        )


def measure_model(shape: Shape, name: str, options: argparse.Namespace) -> Iterator[Speed]:
    import numpy as np

    from runtime.backends.cuda import CUDABackend
    from runtime.backends.cuda_formats import weight_bytes
    from runtime.program import matrices
    from runtime.stages import whole

    stage = whole(make_program(shape))
    n_ctx = options.prompt + options.tokens + 1
    backend = CUDABackend(stage, n_ctx=n_ctx, n_batch=options.prompt)
    prompt = np.random.default_rng(1).normal(size=(options.prompt, shape.dim)).astype(np.float32)

    def read_prompt() -> None:
        backend.run(0, {"x": prompt}, 0, 1)

    seconds = seconds_of(read_prompt, 1 if options.simulate else 3)
    weights = sum(map(weight_bytes, matrices(stage)))
    n_weights = sum(matrix.n_rows * matrix.n_columns for matrix in matrices(stage))
    yield Speed(
        f"{name}: a prompt of {options.prompt}",
        seconds,
        n_operations=2 * n_weights * options.prompt,
        n_tokens=options.prompt,
    )
    positions = iter(range(options.prompt, n_ctx))

    def decode() -> None:
        backend.run(0, {"x": prompt[:1]}, next(positions), 1)

    seconds = seconds_of(decode, options.tokens)
    cache = 4 * shape.n_layers * shape.n_kv_heads * shape.head_dim * options.prompt
    remark = f"{backend.n_launches} launches, "
    remark += f"no graph: {backend.no_graph_reason}" if backend.no_graph_reason else "one graph"
    what = f"{name}: a token after {options.prompt}"
    yield Speed(what, seconds, n_bytes=weights + cache, n_tokens=1, remark=remark)
    backend.close()


def measure_splits(path: Path, options: argparse.Namespace) -> Iterator[Speed]:
    """A model's speed by the number of layers on the GPU; ends the program where one is wrong."""
    import numpy as np

    from gguf_tools.reader import GGUFFile
    from runtime.backends import Backend
    from runtime.backends.cuda import CUDABackend
    from runtime.backends.reference import ReferenceBackend
    from runtime.config import read_config
    from runtime.decoders import build_program
    from runtime.devices import Device
    from runtime.program import Stage
    from runtime.split import Wish, measure_sizes, plan_split
    from runtime.stages import Pipeline, cut_program

    n_ctx = options.prompt + options.tokens + 2
    sizes_of = {"n_ctx": n_ctx, "n_batch": options.prompt, "kv_type": "f16"}
    gpus: list[CUDABackend] = []

    def make(place: int, stage: Stage) -> Backend:
        if place:
            gpus.append(CUDABackend(stage, n_ctx=n_ctx, n_batch=options.prompt))
            return gpus[-1]
        if options.simulate:
            return ReferenceBackend(stage, n_ctx=n_ctx)
        from gguf_tools.cores import default_threads
        from gguf_tools.jit import compile_kernels
        from runtime.backends.cpu import CPUBackend

        for _ in compile_kernels(CPUBackend.kernels(stage, "f16")):
            pass
        threads = default_threads()
        return CPUBackend(stage, n_ctx=n_ctx, n_threads=threads, n_batch=options.prompt)

    with GGUFFile(path) as file:
        config = read_config(file)
        program = build_program(file, config, n_ctx=n_ctx)
        sizes = measure_sizes(program, **sizes_of)
        device = Device("cuda:0", "the GPU", 1 << 50, 1 << 50)
        ids = np.random.default_rng(2).integers(config.n_vocab, size=n_ctx)
        alone = None
        most = sizes.most_layers
        for n in sorted({0, most // 4, most // 2, most}):
            gpus.clear()
            plan = plan_split(sizes, [device], Wish(gpu_layers=n))
            pipeline = Pipeline.open(program, cut_program(program, plan.places(program)), make)
            what = f"{path.name}, {n} of {most} layers"
            begin = time.perf_counter()
            logits = pipeline.run(ids[: options.prompt], 0, 1)  # compiles
            loaded = time.perf_counter() - begin
            begin = time.perf_counter()
            logits = pipeline.run(ids[: options.prompt], 0, 1)
            seconds = time.perf_counter() - begin
            alone = logits if alone is None else alone
            difference = np.abs(logits - alone).max() / np.abs(alone).max()
            if not difference <= SPLIT_TOLERANCE:
                sys.exit(f"{what}: logits differ by {difference:.2g} of the largest")
            yield Speed(
                f"{what}: a prompt of {options.prompt}",
                seconds,
                n_tokens=options.prompt,
                remark=f"logits differ by {difference:.1e}; {loaded:.1f} s the first time",
            )
            positions = iter(range(options.prompt, n_ctx))

            def decode(pipeline: Pipeline = pipeline, positions: Iterator[int] = positions) -> None:
                at = next(positions)
                pipeline.run(ids[at : at + 1], at, 1)

            seconds = seconds_of(decode, options.tokens)
            on_gpu = sum(share.weights + share.kv for share in plan.shares)
            launches = sum(gpu.n_launches for gpu in gpus)
            yield Speed(
                f"{what}: a token",
                seconds,
                n_bytes=on_gpu,
                n_tokens=1,
                remark=f"{launches} launches; GB/s of the GPU's share" if n else "",
            )
            pipeline.close()


def make_program(shape: Shape) -> "Program":  # noqa: F821 - imported when numba is set up
    """Random weights of llama's architecture, of the types that Q4_K_M has."""
    import numpy as np

    from runtime.program import (
        Add,
        Attend,
        Gate,
        KVShape,
        MatMul,
        Matrix,
        Program,
        RMSNorm,
        Rope,
        RopeTable,
        StoreKV,
    )
    from tests.programs import random_matrix

    rng = np.random.default_rng(0)
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    rows = {"q": q, "k": kv, "v": kv, "gate": shape.ffn_dim, "up": shape.ffn_dim}
    stored: dict[tuple[int, int, str], Matrix] = {}

    def matrix(n_rows: int, k: int, quant: str = "Q4_K") -> Matrix:
        """Each layer has its own on the GPU; on the host those of one shape share their bytes."""
        if (n_rows, k, quant) not in stored:
            stored[n_rows, k, quant] = random_matrix(rng, n_rows, k, quant)
        first = stored[n_rows, k, quant]
        return Matrix(first.name, first.quant, n_rows, k, first.data)

    half = shape.head_dim // 2
    table = RopeTable(shape.head_dim, True, 10000.0 ** (-np.arange(half) / half), 1.0)
    norm = np.ones(shape.dim, np.float32)
    layers = []
    for layer in range(shape.n_layers):
        more = "Q6_K" if layer % 2 == 0 else "Q4_K"
        quants = {"v": more}
        steps = [RMSNorm("x", "normed", norm, 1e-5)]
        steps += [
            MatMul("normed", name, matrix(rows[name], shape.dim, quants.get(name, "Q4_K")))
            for name in "qkv"
        ]
        steps += [
            Rope("q", shape.n_heads, shape.head_dim, table),
            Rope("k", shape.n_kv_heads, shape.head_dim, table),
            StoreKV("k", "v", layer),
            Attend("q", "mixed", layer, shape.head_dim**-0.5, 0),
            MatMul("mixed", "delta", matrix(shape.dim, q)),
            Add("delta", "x"),
            RMSNorm("x", "normed", norm, 1e-5),
            MatMul("normed", "gate", matrix(shape.ffn_dim, shape.dim)),
            MatMul("normed", "up", matrix(shape.ffn_dim, shape.dim)),
            Gate("gate", "up", "gate"),
            MatMul("gate", "delta", matrix(shape.dim, shape.ffn_dim, more)),
            Add("delta", "x"),
        ]
        layers.append(tuple(steps))
    head = MatMul("normed", "logits", matrix(shape.n_vocab, shape.dim, "Q6_K"))
    widths = {"x": shape.dim, "normed": shape.dim, "mixed": q, "delta": shape.dim}
    return Program(
        buffers={**widths, **rows, "logits": shape.n_vocab},
        embedding=head.matrix,
        layers=tuple(layers),
        head=(RMSNorm("x", "normed", norm, 1e-5), head),
        caches=(KVShape(shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.head_dim),)
        * shape.n_layers,
    )


def print_table(speeds: list[Speed]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for name in ("", "ms", "GB/s", "of a copy", "TOPS", "tokens/s", ""):
        table.add_column(name, justify="left" if not name else "right")
    copied = speeds[0].n_bytes / speeds[0].seconds
    for speed in speeds:
        rate = speed.n_bytes / speed.seconds
        table.add_row(
            speed.what,
            f"{speed.seconds * 1e3:.3f}",
            f"{rate / 1e9:.1f}" if rate else "",
            f"{rate / copied:.0%}" if rate else "",
            f"{speed.n_operations / speed.seconds / 1e12:.2f}" if speed.n_operations else "",
            f"{speed.n_tokens / speed.seconds:.1f}" if speed.n_tokens else "",
            speed.remark,
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
