"""Speed side by side with a peer: a `llama-bench` binary and `bench`, in turn, on the same files.

    python benchmarks/compare.py /path/to/llama-bench MODEL.gguf... --threads 1,2 --rounds 5

Any llama.cpp or fork of it will do; it runs on the CPU. Every round runs both for each file and
number of threads, one right after the other, so that what else the machine does falls on both. A
ratio compares the two runs of one round: ours over the peer's, above 1 where we are faster. The
table shows each side's median tokens/s, the median ratio of the rounds, and its range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HIDE_GPUS = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Case:
    file: Path
    phase: str
    tokens: int
    depth: int
    threads: int


@dataclass(frozen=True)
class Settings:
    llama_bench: Path
    prompt: list[int]
    gen: list[int]
    depth: list[int]
    repeat: int


def run_peer(settings: Settings, file: Path, threads: int) -> dict[Case, float]:
    """Median tokens/s of the peer's repeats, case by case."""
    command = [str(settings.llama_bench), "-m", str(file), "-t", str(threads), "-ngl", "0"]
    command += ["-p", _list(settings.prompt) or "0", "-n", _list(settings.gen) or "0"]
    if settings.depth != [0]:  # older forks do not know the option
        command += ["-d", _list(settings.depth)]
    command += ["-r", str(settings.repeat), "-o", "json"]
    speeds = {}
    for entry in _run(command):
        phase = "prompt" if entry["n_prompt"] else "decode"
        tokens, depth = entry["n_prompt"] or entry["n_gen"], entry.get("n_depth", 0)
        speeds[Case(file, phase, tokens, depth, threads)] = statistics.median(entry["samples_ts"])
    return speeds


def run_us(settings: Settings, file: Path, threads: int) -> dict[Case, float]:
    """Median tokens/s of our repeats, case by case."""
    command = [sys.executable, "-m", "runtime", "bench", str(file), "--threads", str(threads)]
    command += ["--prompt", _list(settings.prompt) or "none"]
    command += ["--gen", _list(settings.gen) or "none", "--depth", _list(settings.depth)]
    command += ["--repeat", str(settings.repeat), "--json"]
    speeds = {}
    for entry in _run(command):
        case = Case(file, entry["phase"], entry["tokens"], entry["depth"], threads)
        speeds[case] = entry["tokens_per_second"]
    return speeds


def rows(ours: dict[Case, list[float]], peers: dict[Case, list[float]]) -> Iterator[list[str]]:
    """A row of the table for each case that both sides have measured in every round."""
    for case, speeds in ours.items():
        ratios = [a / b for a, b in zip(speeds, peers[case], strict=True)]
        yield [
            case.file.name,
            case.phase,
            *(str(number) for number in (case.tokens, case.depth, case.threads)),
            f"{statistics.median(peers[case]):.1f}",
            f"{statistics.median(speeds):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        ]


def _run(command: list[str]) -> list[dict[str, Any]]:
    """The JSON list that a command prints."""
    environment = {**os.environ, **HIDE_GPUS}
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=environment
    )
    if ended.returncode != 0:
        sys.exit(f"error: {command[0]} ended with {ended.returncode}: {' '.join(command)}")
    # A fork may print a line of its own first.
    result: list[dict[str, Any]] = json.loads(ended.stdout[ended.stdout.index("[") :])
    return result


def _list(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> list[int]:
    return [] if text == "none" else [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_bench", type=Path, help="the peer's binary")
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files that both can run")
    parser.add_argument("--prompt", type=_numbers, default=[512], help="lengths, or none")
    parser.add_argument("--gen", type=_numbers, default=[64], help="lengths, or none")
    parser.add_argument("--depth", type=_numbers, default=[0], help="tokens held before")
    parser.add_argument("--threads", type=_numbers, default=[1], help="such as 1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3, help="repeats within a run")
    options = parser.parse_args()
    settings = Settings(
        options.llama_bench.resolve(), options.prompt, options.gen, options.depth, options.repeat
    )
    for path in (settings.llama_bench, *options.files):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    ours: dict[Case, list[float]] = {}
    peers: dict[Case, list[float]] = {}
    for turn in range(options.rounds):
        for file in (path.resolve() for path in options.files):
            for threads in options.threads:
                if sys.stderr.isatty():
                    where = f"round {turn + 1} of {options.rounds}: {file.name}, {threads} threads"
                    print(f"\r\x1b[K{where}", end="", file=sys.stderr, flush=True)
                order = ((peers, run_peer), (ours, run_us))
                for side, run in order if turn % 2 == 0 else reversed(order):
                    for case, speed in run(settings, file, threads).items():
                        side.setdefault(case, []).append(speed)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print("| file | phase | tokens | depth | threads | peer | ours | ratio | of rounds |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows(ours, peers):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
