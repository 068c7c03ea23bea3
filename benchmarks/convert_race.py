"""From a checkpoint to a GGUF file side by side with llama.cpp's two programs, in turn.

    python benchmarks/convert_race.py MODEL_DIR --llama /path/to/llama.cpp \\
        --quantize /path/to/llama-quantize --python /path/to/venv/bin/python --type Q4_K_M

Theirs is convert_hf_to_gguf.py of that source tree, run by that interpreter (with torch and
transformers), and then llama-quantize, where the type is not one that the first program writes.
Ours is one `convert`. Each round runs both, every other round the other way round; what was
written is flushed to the disk before the next one starts. The table shows, of each step:

time     median of the rounds, from start to exit
memory   largest resident set of the process and its children together, as sampled, or as the
         system has it of one of them (mapped files count)
private  the part of that which is no file, as sampled (Linux)
disk     largest size of all files written, as sampled and at the end

Then both files are compared: tensors that are equal byte for byte, and metadata.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from gguf_tools.reader import GGUFFile
from gguf_tools.tools.diff import KeyDifference, compare

OURS = ("convert", "convert --no-quality", "convert --no-check")
ROOT = Path(__file__).resolve().parent.parent
DIRECT = ("F32", "F16", "BF16", "Q8_0")  # what convert_hf_to_gguf.py writes itself
INTERVAL = 0.05  # seconds between two samples
UNIT = 1024 if sys.platform.startswith("linux") else 1  # of ru_maxrss


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    seconds: float
    memory: int  # bytes
    private: int
    disk: int

    def then(self, other: "Cost") -> "Cost":
        """Of both, one after the other."""
        return Cost(
            self.seconds + other.seconds,
            max(self.memory, other.memory),
            max(self.private, other.private),
            max(self.disk, other.disk),
        )


@dataclass(frozen=True)
class Settings:
    model: Path
    type: str
    through: str  # the type in between
    llama: Path
    quantize: Path
    python: Path
    threads: int


def run_theirs(settings: Settings, folder: Path) -> tuple[dict[str, Cost], Path]:
    """The cost of each program and of both, and the file."""
    first, last = folder / "between.gguf", folder / "theirs.gguf"
    direct = settings.type in DIRECT
    script = settings.llama / "convert_hf_to_gguf.py"
    outtype = settings.type.lower() if direct else settings.through
    written = last if direct else first
    command = [settings.python, script, settings.model, "--outfile", written, "--outtype", outtype]
    costs = {f"{script.name} ({outtype})": measure(command, folder, settings.threads)}
    if not direct:
        command = [settings.quantize, first, last, settings.type, settings.threads]
        costs[settings.quantize.name] = measure(command, folder, settings.threads)
        one, two = costs.values()
        costs["both"] = one.then(two)
    return costs, last


def run_ours(settings: Settings, folder: Path) -> tuple[dict[str, Cost], Path]:
    """The cost with all that is checked and measured of the file, with less, and as theirs."""
    output = folder / "ours.gguf"
    command = [sys.executable, "-m", "gguf_tools", "convert", settings.model, "-o", output]
    command += ["--type", settings.type, "--threads", settings.threads]
    costs = {}
    for name in OURS:
        output.unlink(missing_ok=True)
        os.sync()
        costs[name] = measure([*command, *name.split()[1:]], folder, settings.threads)
    return costs, output


def measure(command: Sequence[object], folder: Path, threads: int | None = None) -> Cost:
    """Run a command that writes into `folder`."""
    words = [str(word) for word in command]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        watch = Watch(process.pid, folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        peak = watch.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            sys.stderr.write(output.read().decode("utf-8", "replace")[-2000:])
            sys.exit(f"error: ended with {process.returncode}: {' '.join(words)}")
    memory = max(peak.memory, usage.ru_maxrss * UNIT)
    return replace(peak, seconds=seconds, memory=memory, disk=max(peak.disk, size_of(folder)))


class Watch:
    """A thread that samples a process, its children and a folder until it is stopped."""

    def __init__(self, process_id: int, folder: Path) -> None:
        self._process = psutil.Process(process_id)
        self._folder = folder
        self._peak = Cost(0.0, 0, 0, 0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> Cost:
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            memory = private = 0
            for used in self._used():
                memory += used.rss
                private += used.rss - getattr(used, "shared", 0)
            disk = size_of(self._folder)
            self._peak = self._peak.then(Cost(0.0, memory, private, disk))

    def _used(self) -> Iterator[Any]:
        try:
            for process in (self._process, *self._process.children(recursive=True)):
                yield process.memory_info()
        except psutil.NoSuchProcess:
            return  # it has just ended


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, those that vanish meanwhile left out."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:
            continue
    return total


def comparison(theirs: Path, ours: Path) -> Iterator[str]:
    """How far the two files are the same, line by line."""
    with GGUFFile(theirs) as a, GGUFFile(ours) as b:
        found = compare(a, b)
        names = {*a.tensors, *b.tensors}
        n_bytes = sum(info.nbytes for info in b.tensors.values())
    different = {item.name for item in found.tensors}
    yield f"tensors   {len(names) - len(different)} of {len(names)} equal byte for byte"
    yield f"bytes     {n_bytes:,} of tensors"
    for item in found.tensors:
        error = "" if item.relative_rms is None else f", relative error {item.relative_rms:.2e}"
        yield f"          {item.name}{error}"
    yield f"metadata  {found.n_keys_same} keys equal, {len(found.keys)} not"
    for key in found.keys:
        yield f"          {key.key}: {_where(key)}"


def _where(key: KeyDifference) -> str:
    if key.a_type is None:
        return "ours only"
    if key.b_type is None:
        return "theirs only"
    return "differs" + (f" from entry {key.first}" if key.first is not None else "")


def table(costs: dict[str, list[Cost]], reference: str) -> Iterator[str]:
    """The table, with how many times ours fit into what both of theirs take."""
    yield "| | time | memory | private | disk | theirs in ours |"
    yield "|---|---:|---:|---:|---:|---:|"
    theirs = statistics.median(cost.seconds for cost in costs[reference])
    for name, of_name in costs.items():
        seconds = statistics.median(cost.seconds for cost in of_name)
        memory, private, disk = (
            max(getattr(cost, part) for cost in of_name) / 1e6
            for part in ("memory", "private", "disk")
        )
        times = f"{theirs / seconds:.1f} x" if name in OURS else ""
        yield (
            f"| {name} | {seconds:.1f} s | {memory:,.0f} MB | {private:,.0f} MB "
            f"| {disk:,.0f} MB | {times} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a checkpoint folder")
    parser.add_argument("--llama", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--quantize", type=Path, required=True, help="llama-quantize")
    parser.add_argument("--python", type=Path, required=True, help="one with torch")
    parser.add_argument("--type", type=str.upper, default="Q4_K_M")
    parser.add_argument("--through", default="auto", help="--outtype of the file in between")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    given = parser.parse_args()
    # An interpreter is not resolved: through the link it would leave its environment.
    settings = Settings(
        *(given.model.resolve(), given.type, given.through, given.llama.resolve()),
        *(given.quantize.resolve(), given.python.absolute(), given.threads),
    )
    script = settings.llama / "convert_hf_to_gguf.py"
    for path in (script, settings.quantize, settings.python, settings.model / "config.json"):
        if not path.is_file():
            parser.error(f"{path}: no such file")

    costs: dict[str, list[Cost]] = {}
    lines: list[str] = []
    for turn in range(given.rounds):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            files = {}
            order = (run_theirs, run_ours)
            for run in order if turn % 2 == 0 else reversed(order):
                of_side = Path(folder) / run.__name__
                of_side.mkdir()
                os.sync()
                for name, cost in (result := run(settings, of_side))[0].items():
                    costs.setdefault(name, []).append(cost)
                files[run] = result[1]
            if turn == 0:
                lines = list(comparison(files[run_theirs], files[run_ours]))
    reference = "both" if "both" in costs else next(name for name in costs if name not in OURS)
    print(f"{settings.model.name} to {settings.type}, {settings.threads} threads:")
    for line in (*table(costs, reference), *lines):
        print(line)


if __name__ == "__main__":
    main()
