"""The part of `convert --target-size` that runs the model: a process of its own.

It takes requests as lines of JSON and answers with lines of JSON. See gguf_tools/type_trials.py.

    {"source": ..., "types": ...}   -> {"costs": {tensor: {type: cost}}, "tokens": ..., ...}
    {"mixtures": [{tensor: type}]}  -> {"kl": [...], "tokens": ...}

In between it tells how far it is: {"done": 3, "total": 212}. {"error": ...} is its last answer.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.conversion import plan_conversion
from gguf_tools.errors import GGUFError, printable
from gguf_tools.imatrix import read_importance_matrix
from gguf_tools.lora_merging import read_scaled
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import block_number, find_file_type
from runtime.layerwise import LayerwiseModel
from runtime.quality.evaluation import with_bos
from runtime.quality.sensitivity import (
    WINDOW,
    WORK,
    Costs,
    Divergences,
    Effort,
    Ids,
    Sensitivity,
    Step,
    choose_effort,
)
from runtime.quality.texts import read_text
from runtime.quality.trial_types import TrialTypes
from runtime.sources import PlannedWeights, Source
from runtime.tokenizer import Tokenizer

EMBEDDING = "token_embd.weight"
LEAST_JUDGED, MOST_JUDGED = 4, 16  # windows that whole mixtures are compared on
RUNS = 3  # of all weights, when mixtures are compared: the source and two mixtures


def main(arguments: Sequence[str]) -> int:
    """Answer the requests of standard input."""
    try:
        with ExitStack() as stack:
            requests = (json.loads(line) for line in sys.stdin)
            for answer in _answers(requests, stack):
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()
    except GGUFError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, BrokenPipeError):  # the parent was stopped, too
        return 130
    except OSError as error:
        return _fail(f"{printable(error.filename or 'a file', 1000)}: {error.strerror}")
    return 0


def _fail(sentence: str) -> int:
    sys.stdout.write(json.dumps({"error": sentence}) + "\n")
    return 1


def _answers(requests: Iterator[dict[str, Any]], stack: ExitStack) -> Iterator[dict[str, Any]]:
    request = next(requests)
    types: Mapping[str, Sequence[str]] = request["types"]
    source = stack.enter_context(open_source(request))
    path = request["text"]
    text = read_text(None if path is None else Path(path))
    tokenizer = Tokenizer(source.metadata)
    measured, judged, effort = choose_windows(source, tokenizer, text.content, types)
    path = request["imatrix"]
    matrix = None if path is None else read_importance_matrix(path)
    trial = TrialTypes(source, types.keys(), matrix)
    yield {"doing": "compiling"}
    model = stack.enter_context(
        LayerwiseModel(trial, n_tokens=measured.shape[1], threads=request["threads"])
    )
    sensitivity = Sensitivity(model, trial)
    yield {"doing": "measuring what types cost"}
    events = sensitivity.measure(types, request["tried"], measured, together=effort.together)
    for event in events:
        if isinstance(event, Step):
            yield {"done": event.done, "total": event.total}
        elif isinstance(event, Costs):
            yield {
                "costs": event.by_name,
                "tokens": measured.size,
                "together": effort.together,
                "text": text.name,
                "digest": hashlib.sha256(text.content.encode("utf-8")).hexdigest(),
            }
    for request in requests:
        yield {"doing": "measuring the mixture"}
        for step in sensitivity.compare(request["mixtures"], judged):
            if isinstance(step, Step):
                yield {"done": step.done, "total": step.total}
            elif isinstance(step, Divergences):
                yield {"kl": step.kl, "tokens": judged.size}


@contextmanager
def open_source(request: Mapping[str, Any]) -> Iterator[Source]:
    """The weights that the file is to be made from, with the tokenizer."""
    path = Path(request["source"])
    if not request["is_checkpoint"]:
        with GGUFFile(path) as file:
            yield file
        return
    adapters = [read_scaled(text) for text in request["adapters"]]
    plan = plan_conversion(path, find_file_type("F32"), adapters)
    yield PlannedWeights(path, plan.tensors, plan.metadata)


def choose_windows(
    source: Source, tokenizer: Tokenizer, text: str, types: Mapping[str, Sequence[str]]
) -> tuple[Ids, Ids, Effort]:
    """The windows that single tensors are measured on, and others for whole mixtures."""
    ids = np.asarray(tokenizer.encode(text, add_special=False), np.int64)
    n_ctx = min(WINDOW, _context(source))
    windows = ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx)
    if len(windows) < 2:
        raise GGUFError(
            f"the text to measure on has {len(ids):,} tokens and two windows of {n_ctx} are "
            "needed: give a longer text"
        )
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        windows = np.stack([with_bos(window, tokenizer.bos_id) for window in windows])
    for_tensors, for_mixtures = windows[::2], windows[1::2]
    effort = _effort(source, types, n_ctx * len(for_tensors))
    n_weights = sum(tensor.n_elements for tensor in source.tensors.values())
    n_judged = int(WORK / (2 * RUNS * n_weights * n_ctx))
    n_judged = min(max(n_judged, LEAST_JUDGED), MOST_JUDGED)
    return _spread(for_tensors, effort.n_windows), _spread(for_mixtures, n_judged), effort


def _effort(source: Source, types: Mapping[str, Sequence[str]], n_tokens: int) -> Effort:
    """How finely a model of this size is measured."""
    layers: dict[int, int] = {}
    for tensor in source.tensors.values():
        layer = block_number(tensor.name)
        layers[layer] = layers.get(layer, 0) + tensor.n_elements
    head = source.tensors["output.weight" if "output.weight" in source.tensors else EMBEDDING]
    n_layers = max(layers) + 1
    n_kinds = -(-sum(block_number(name) >= 0 for name in types) // max(n_layers, 1))
    return choose_effort(
        [layers.get(layer, 0) for layer in range(n_layers)],
        head.n_elements,
        max(n_kinds, 1),
        n_tokens=n_tokens,
        dim=source.tensors[EMBEDDING].row_length,
    )


def _spread(windows: Ids, count: int) -> Ids:
    """So many of the windows, evenly spread over the text."""
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows[chosen.astype(np.int64)]


def _context(source: Source) -> int:
    """The positions that the model was trained for."""
    name = source.metadata.get("general.architecture")
    n_ctx = source.metadata.get(f"{name}.context_length")
    return n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else WINDOW
