"""What the CUDA toolkit makes of the kernels: registers, and the instructions of their loops.

    python benchmarks/gpu_code.py                          # for an H200
    python benchmarks/gpu_code.py --capability 8.9 --format Q4_K

Needs no GPU, but the `cuda` extra, ptxas and nvdisasm: of an installed toolkit, or of the wheels
nvidia-cuda-nvcc-cu12 and nvidia-cuda-nvdisasm. A loop that multiplies blocks is told by what it
takes for 32 weights: a GPU that reads 4 TB/s with 132 multiprocessors of 1.7 GHz has time for about
125 of a lane's instructions while it reads 18 bytes, the size of 32 weights of Q4_K.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LABEL = re.compile(r"\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)(.*)")
TARGET = re.compile(r"\.L_\w+")
PRODUCTS = 8  # dp4a for 32 weights


@dataclass(frozen=True)
class Code:
    """A kernel as machine code."""

    registers: str
    n_instructions: int
    loops: list[list[str]]  # operations of each, those that are inside another's, too


def main() -> None:
    options = read_options()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for name in ("kernel", "registers", "instructions", "loop", ""):
        table.add_column(name, justify="left" if name in ("kernel", "") else "right")
    for name, launch in kernels(options.format, options.capability):
        code = disassembled(launch, options.capability)
        loop = max(code.loops, key=weight, default=[])
        table.add_row(
            *(name, code.registers, str(code.n_instructions)),
            *(str(len(loop)) if loop else "", remark(Counter(loop), len(loop))),
        )
    Console(width=110).print(table)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )

    def capability(text: str) -> tuple[int, int]:
        major, minor = text.split(".")
        return int(major), int(minor)

    parser.add_argument("--capability", type=capability, default=(9, 0), help="such as 9.0")
    parser.add_argument("--format", action="append", help="of weights; all by default")
    return parser.parse_args()


def kernels(formats: list[str] | None, capability: tuple[int, int]) -> Iterator[tuple[str, object]]:
    """Those that most time goes to, with the arguments they are launched with."""
    import numpy as np

    from runtime.backends.cuda_formats import NATIVE, way_of_tiles
    from runtime.kernels.cuda.tensor_tiles import TENSOR_TILES
    from runtime.kernels.cuda.tiles import TILES
    from tests.cuda.test_code import ONE, TILE, kernel_name, launches, product_launch
    from tests.programs import attention_program

    for name in formats or NATIVE:
        yield f"{name}, a token", product_launch(name, ONE)
        way = way_of_tiles(capability, name, 256)
        tiles = TILES if way == "plain" else {**TILES, **TENSOR_TILES[way]}
        yield f"{name}, a prompt ({way})", product_launch(name, TILE, tiles)
    program = attention_program((8, 2, 128, 128), np.random.default_rng(0))
    for kv_type in ("f16", "q8_0"):
        for launch in launches(program, ONE, kv_type):
            if kernel_name(launch) == "attend":
                yield f"attention, {kv_type}", launch


def disassembled(launch, capability: tuple[int, int]) -> Code:  # type: ignore[no-untyped-def]
    from tests.cuda.test_code import compiled

    name = "sm_{}{}".format(*capability)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(compiled(launch, capability))
        limit = launch.kernel.targetoptions.get("max_registers")
        limits = [f"-maxrregcount={limit}"] if limit else []
        told = output("ptxas", "-v", f"-arch={name}", *limits, str(source), "-o", str(cubin))
        listing = output("nvdisasm", "-c", str(cubin))
    found = re.search(r"Used (\d+) registers", told)
    spills = re.search(r"(\d+) bytes spill stores", told)
    spilled = f", {spills[1]} bytes spilled" if spills and spills[1] != "0" else ""
    return Code((found[1] if found else "") + spilled, *loops_of(listing))


def output(program: str, *arguments: str) -> str:
    """What a program of the toolkit prints, on either stream."""
    inside = Path(sysconfig.get_path("purelib"), "nvidia").glob(f"**/bin/{program}")
    path = shutil.which(program) or next(map(str, inside), None)
    if path is None:
        sys.exit(f"{program} is needed: of a CUDA toolkit, or of the wheels named in --help")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program}: {done.stderr}")
    return done.stdout + done.stderr


def loops_of(listing: str) -> tuple[int, list[list[str]]]:
    """How many instructions there are, and those from each label to a branch back to it."""
    places: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append((found[1].split(".")[0], found[2]))
    loops = []
    for i, (operation, rest) in enumerate(code):
        target = TARGET.search(rest) if operation == "BRA" else None
        if target and places.get(target[0], i) < i - 1:
            loops.append([name for name, _ in code[places[target[0]] : i + 1]])
    return len(code), loops


def weight(loop: list[str]) -> float:
    """How much a loop looks like the one that computes: products among its instructions."""
    counts = Counter(loop)
    products = counts["IDP"] + 8 * (counts["IMMA"] + counts["HMMA"]) + counts["FFMA"] / 4
    return products / len(loop)


def remark(counts: Counter[str], length: int) -> str:
    if counts["IDP"]:
        return f"{PRODUCTS * length / counts['IDP']:.0f} for 32 weights, {counts['LDG']} loads"
    if n := counts["IMMA"] + counts["HMMA"]:
        return f"{n} products on tensor cores"
    return f"{counts['FFMA']} multiply-adds, {counts['LDG']} loads" if length else ""


if __name__ == "__main__":
    main()
