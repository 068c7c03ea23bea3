"""The part of `convert --calibrate` that runs the model: a process of its own.

It takes a request as a line of JSON and tells what it does in lines of JSON; what it makes goes
into the work file. See gguf_tools/calibration.py. It ends when its standard input does: nobody is
left to make use of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.calibration_file import CalibrationFile
from gguf_tools.conversion import plan_conversion
from gguf_tools.errors import GGUFError, UnsupportedQuantError, printable
from gguf_tools.feedback.rounding import needed_kernels
from gguf_tools.jit import compile_kernels
from gguf_tools.lora_merging import read_scaled
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from runtime.config import read_config
from runtime.decoders import check_architecture
from runtime.layerwise import LayerwiseModel
from runtime.quality.calibration import Calibration
from runtime.quality.evaluation import Ids
from runtime.quality.moments import shared_inputs
from runtime.quality.rounding import Rounding
from runtime.quality.texts import read_text
from runtime.sources import PlannedWeights, Source
from runtime.tokenizer import Tokenizer

WINDOW = 512  # tokens
LEAST_TOKENS = 2048  # fewer tell next to nothing of a matrix's inputs
OPTIONS = ("types", "others", "method", "adapters", "threads")  # that decide the blocks
HIDDEN_BYTES = 1 << 30  # of hidden states, which are those of all windows

Event = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Do what the line on standard input asks; tell of it on standard output."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        for event in calibrate(request, on_compile=_tell_compiling):
            _tell(event)
    except GGUFError as error:
        _tell({"error": str(error), "kind": type(error).__name__})
    except MemoryError:
        reason = "calibrating needs more memory than there is: give fewer --calibrate-windows"
        _tell({"error": reason, "kind": GGUFError.__name__})
    except OSError as error:
        reason = f"calibrating failed: {error.strerror or error}"
        if error.filename is not None:
            reason = f"{printable(error.filename, limit=1000)}: {error.strerror or error}"
        _tell({"error": reason, "kind": GGUFError.__name__})
    return 0


def calibrate(request: Event, *, on_compile: Callable[[int, int], None]) -> Iterator[Event]:
    """Fill the work file that the request names.

    Kernels that are not in the cache yet are compiled first; `on_compile(done, total)` is called
    meanwhile.
    """
    with ExitStack() as stack:
        source = _open(request, stack)
        check_architecture(source)
        text = read_text(None if request["text"] is None else Path(request["text"]))
        windows, bos = _windows(source, text.content, request["windows"])
        n_windows, n_tokens = windows.shape
        model = stack.enter_context(
            LayerwiseModel(
                source, n_tokens=n_tokens, threads=request["threads"], on_compile=on_compile
            )
        )
        check_reached(model, request["needing"], request["types"])
        digest = _digest(request, windows, bos)
        work = stack.enter_context(
            CalibrationFile(Path(request["work"]), digest, resume=request["resume"])
        )
        if work.parts:
            yield {"remark": f"going on from {printable(work.path, limit=1000)}"}
        rounding = Rounding(
            source,
            request["types"],
            request["method"],
            request["threads"],
            others=request["others"],
        )
        if rounding.needs_moments:
            for done, total in compile_kernels(needed_kernels()):
                on_compile(done, total)
        for step in Calibration(model, windows, rounding, bos=bos).run(work):
            yield {"done": step.done, "total": step.total}
        yield {
            "digest": digest,
            "text": text.name,
            "windows": n_windows,
            "tokens": n_windows * n_tokens,
            "unseen": [name for part in work.parts for name in part.facts["unseen"]],
            "few": [name for part in work.parts for name in part.facts["few"]],
        }


def _open(request: Event, stack: ExitStack) -> Source:
    """The weights that are rounded, as the file would have them."""
    path = Path(request["source"])
    if not request["is_checkpoint"]:
        return stack.enter_context(GGUFFile(path))
    adapters = [read_scaled(text) for text in request["adapters"]]
    plan = plan_conversion(path, find_file_type("F32"), adapters)
    return PlannedWeights(path, plan.tensors, plan.metadata)


def check_reached(model: LayerwiseModel, needing: Sequence[str], types: Mapping[str, str]) -> None:
    """UnsupportedQuantError if a tensor that needs an importance gets none: nothing tells of it."""
    groups = [group for layer in model.program.layers for group in shared_inputs(layer)]
    reached = {name for group in groups for name, _ in group.members}
    for name in needing:
        if name not in reached:
            raise UnsupportedQuantError(
                f"tensor {printable(name)} as {types[name]} of such a file needs its importance, "
                "which --calibrate cannot give: no layer multiplies with the tensor as it is; give "
                "it another type with --tensor-type, or choose Q2_K, which needs none"
            )


def _windows(source: Source, text: str, wanted: int) -> tuple[Ids, int | None]:
    """The windows of the text that are read, spread over all of it, and what each begins with."""
    config = read_config(source)
    tokenizer = Tokenizer(source.metadata)
    n_tokens = min(WINDOW, config.n_ctx_train)
    ids = np.asarray(tokenizer.encode(text), np.int64)
    n_windows = len(ids) // n_tokens
    if n_windows * n_tokens < LEAST_TOKENS:
        raise GGUFError(
            f"the text to calibrate on has {len(ids):,} tokens, and it takes {LEAST_TOKENS:,} at "
            "least: give a longer one, or --calibrate default"
        )
    if ids.max() >= config.n_vocab:
        raise GGUFError(
            f"the text has token {ids.max()} and the model knows {config.n_vocab} tokens"
        )
    windows = ids[: n_windows * n_tokens].reshape(n_windows, n_tokens)
    room = max(1, HIDDEN_BYTES // (4 * n_tokens * config.dim))
    count = min(n_windows, wanted, room)
    spread = np.arange(count) * n_windows // count
    return windows[spread], tokenizer.bos_id if tokenizer.add_bos else None


def _digest(request: Event, windows: Ids, bos: int | None) -> str:
    """Of all that decides the blocks."""
    seen = hashlib.sha256(request["identity"].encode())
    options = {name: request[name] for name in OPTIONS}
    seen.update(json.dumps([options, bos], sort_keys=True).encode())
    seen.update(np.ascontiguousarray(windows, "<i8").tobytes())
    for path in sorted(Path(__file__).resolve().parent.rglob("*.py")):
        seen.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()


def _tell_compiling(done: int, total: int) -> None:
    _tell({"compiled": done, "kernels": total})


def _tell(event: Event) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)
