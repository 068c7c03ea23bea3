"""`convert --calibrate`: matrices rounded by what a text makes of them, before the file is written.

What runs the model is in the runtime, which nothing here imports: it is a process of its own
(runtime/calibrating.py), which puts the blocks of each layer into a work file beside the output. A
conversion then takes them from there instead of quantising. The work file is removed when the
output is there, and kept when anything stops before: the same command goes on from it.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gguf_tools import errors
from gguf_tools.calibration_file import Blocks, read_parts, read_rows, work_path
from gguf_tools.child import python_command
from gguf_tools.describe import CALIBRATION
from gguf_tools.errors import GGUFError, OutputError, printable
from gguf_tools.identity import digest_inputs, digest_program
from gguf_tools.plan import PLAIN, Plan, TensorPlan
from gguf_tools.recipes import needs_importance
from gguf_tools.self_check import Source
from gguf_tools.values import MetadataValue, Value
from gguf_tools.writer import GGUFWriter

RUNTIME = "runtime.calibrating"  # a module with a main that answers with lines of JSON
METHODS = ("best", "gptq", "awq", "imatrix")  # the first is the default
SCALING = ("awq", "best")  # methods that scale channels: norms and biases change, too
# What a layer's matrix is taken to cost when it is calibrated, as a part of what it costs else. Of
# whole files as Q4_K_M 0.15 to 0.34 was measured with best, 0.31 to 0.45 with gptq (mean KL
# divergence; the least where channels had been scaled for tests); the others are estimates.
COST_LEFT = {"best": 0.4, "gptq": 0.45, "awq": 0.55, "imatrix": 0.75}
DEFAULT_TEXT = "default"  # stands for the text that ships
WINDOWS = 58  # of 512 tokens
MAX_TEXT_NAME = 127  # bytes, as llama-quantize keeps of a name
ROOM = 1024  # bytes that what a file tells of its calibration may take
NOT_MULTIPLIED = ("token_embd.weight", "output.weight", "position_embd.weight")


@dataclass(frozen=True)
class Settings:
    """What the user asks for."""

    text: Path | None  # None: the one that ships
    method: str
    windows: int


def read_settings(text: str | None, method: str | None, windows: int | None) -> Settings | None:
    """What the options ask for; None where they do not."""
    if text is None:
        if method is not None or windows is not None:
            option = "--method" if method is not None else "--calibrate-windows"
            raise GGUFError(f"{option} says how to calibrate: give --calibrate, too")
        return None
    if method is not None and method not in METHODS:
        raise GGUFError(
            f"--method {printable(method)} is not known; choose one of {', '.join(METHODS)}"
        )
    path = None if text == DEFAULT_TEXT else Path(text)
    if path is not None and not path.is_file():
        raise GGUFError(
            f"--calibrate {printable(text, limit=1000)}: expected a file of text, or `default`, "
            "found none of that name"
        )
    return Settings(path, method or METHODS[0], windows or WINDOWS)


@dataclass(frozen=True)
class Progress:
    """So many layers are done; or a remark for the user."""

    done: float
    total: int
    remark: str = ""


@dataclass(frozen=True)
class Compiling:
    """So many of the kernels that are not in the cache yet are compiled."""

    done: int
    total: int


@dataclass(frozen=True)
class Calibrated:
    """A plan whose matrices are rounded already."""

    plan: Plan
    work: Path
    digest: str
    line: str  # for the closing table


def calibrate(
    plan: Plan,
    source: Source,
    output: Path,
    settings: Settings,
    *,
    inputs: Sequence[Path],
    threads: int,
    force: bool,
    resume: bool,
) -> Generator[Progress | Compiling | Calibrated, None, None]:
    """Round the plan's matrices; last comes the plan that has them.

    `inputs` are the files that weights come from. GGUFError says what went wrong; what has been
    done until then is kept in the work file. UnsupportedQuantError, before any work: a tensor has a
    type that needs an importance, and no layer multiplies with it.
    """
    # Refuses a path that cannot become the file, before the work of hours.
    GGUFWriter(output, metadata=plan.metadata, tensors=plan.specs, force=force)
    types = {tensor.name: tensor.quant.name for tensor in plan.tensors if _is_rounded(tensor)}
    if not types:
        raise GGUFError(
            f"--calibrate has nothing to round: no matrix of a layer is quantised in a file of "
            f"type {plan.file_type.name}; choose a --type with fewer bits"
        )
    needing = [name for name in types if needs_importance(plan.file_type, name, types[name])]
    others = {}
    if settings.method in SCALING:
        others = {tensor.name: tensor.quant.name for tensor in plan.tensors if _is_plain(tensor)}
    work = work_path(output)
    _check_space(plan, {**types, **others}, output)
    request = {
        "source": str(source.path.resolve()),
        "is_checkpoint": source.is_checkpoint,
        "adapters": source.adapters,
        "work": str(work.resolve()),
        "identity": digest_program() + digest_inputs(inputs, any_change=True),
        "resume": resume,
        "types": types,
        "others": others,
        "needing": needing,
        "method": settings.method,
        "windows": settings.windows,
        "text": None if settings.text is None else str(settings.text.resolve()),
        "threads": threads,
    }
    start = time.monotonic()
    answer: dict[str, Any] = {}
    for event in _events(request):
        if "error" in event:
            raise getattr(errors, event["kind"], GGUFError)(event["error"])
        if "remark" in event:
            yield Progress(0, 1, event["remark"])
        elif "compiled" in event:
            yield Compiling(event["compiled"], event["kernels"])
        elif "done" in event:
            yield Progress(event["done"], event["total"])
        else:
            answer = event
    ready = {
        blocks.name: blocks
        for part in read_parts(work, answer["digest"])
        for blocks in part.tensors
    }
    tensors = tuple(_with_blocks(tensor, ready, work) for tensor in plan.tensors)
    n_rounded = len(ready.keys() & types)  # the others are scaled only
    metadata = {**plan.metadata, **_metadata(settings, answer, n_rounded)}
    finished = replace(plan, tensors=tensors, metadata=metadata)
    line = _line(settings, answer, n_rounded, len(types), time.monotonic() - start)
    yield Calibrated(finished, work, answer["digest"], line)


def remove_work(calibrated: Calibrated) -> None:
    """The output is there: forget what it was made from."""
    with suppress(OSError):  # gone already, or a folder that has become read-only
        os.unlink(calibrated.work)


def _is_rounded(tensor: TensorPlan) -> bool:
    """Whether a tensor is a matrix of a layer that is quantised now."""
    return (
        len(tensor.shape) > 1
        and tensor.name not in NOT_MULTIPLIED
        and tensor.quant.name not in (*PLAIN, tensor.source.dtype)
        and tensor.quant.quantize is not None
    )


def _is_plain(tensor: TensorPlan) -> bool:
    """Whether a tensor of a layer can be scaled without being quantised."""
    return tensor.name not in NOT_MULTIPLIED and tensor.quant.name in PLAIN


def _check_space(plan: Plan, types: dict[str, str], output: Path) -> None:
    needed = sum(tensor.nbytes for tensor in plan.tensors)
    needed += sum(tensor.nbytes for tensor in plan.tensors if tensor.name in types)
    with suppress(FileNotFoundError):  # the writer says what is wrong with the folder
        free = shutil.disk_usage(output.parent).free
        if free < needed:
            raise OutputError(
                f"{printable(output, limit=1000)}: calibrating needs {needed:,} bytes there, for "
                f"the file and for what it is made from, and the disk has {free:,} free"
            )


def _events(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the process tells, up to its end; GGUFError if that is not a good one."""
    finished = False
    with subprocess.Popen(
        python_command(RUNTIME),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": str(request["threads"])},
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                if not line.endswith("\n"):  # it was killed while it told
                    break
                event: dict[str, Any] = json.loads(line)
                finished = "error" in event or "digest" in event
                yield event
        finally:
            process.kill()
    if not finished:
        raise GGUFError(
            "the process that calibrates ended early, perhaps for want of memory (fewer "
            "--calibrate-windows need less); the same command goes on after the last layer that "
            "it finished"
        )


def _with_blocks(tensor: TensorPlan, ready: dict[str, Blocks], work: Path) -> TensorPlan:
    blocks = ready.get(tensor.name)
    return tensor if blocks is None else replace(tensor, ready=partial(read_rows, work, blocks))


def _metadata(
    settings: Settings, answer: dict[str, Any], n_entries: int
) -> dict[str, MetadataValue]:
    """How the file was calibrated; of an importance matrix also as llama-quantize says it."""
    text = answer["text"].encode(errors="replace")[:MAX_TEXT_NAME].decode(errors="ignore")
    entries: dict[str, MetadataValue] = {}
    if settings.method == "imatrix":
        entries["quantize.imatrix.dataset"] = Value("str", text)
        entries["quantize.imatrix.entries_count"] = Value("u32", n_entries)
        entries["quantize.imatrix.chunks_count"] = Value("u32", answer["windows"])
    entries[CALIBRATION + "method"] = Value("str", settings.method)
    entries[CALIBRATION + "text"] = Value("str", text)
    entries[CALIBRATION + "windows"] = Value("u32", answer["windows"])
    entries[CALIBRATION + "tokens"] = Value("u32", answer["tokens"])
    return entries


def _line(
    settings: Settings, answer: dict[str, Any], n_ready: int, n_asked: int, seconds: float
) -> str:
    line = (
        f"{settings.method} on {printable(answer['text'])}: {answer['windows']:,} windows, "
        f"{answer['tokens']:,} tokens, {seconds:.1f} s; {n_ready:,} of {n_asked:,} matrices"
    )
    for name, what in (("unseen", "saw no token"), ("few", "saw few tokens")):
        if answer[name]:
            line += f"; {len(answer[name]):,} experts' matrices {what}"
    return line
