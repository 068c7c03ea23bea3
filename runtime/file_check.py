"""The part of convert's self-check that runs the model: a process of its own.

It takes a request as JSON and answers with a list of findings, of the chat template and of the
logits. See gguf_tools/self_check.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gguf_tools.conversion import match_checkpoint
from gguf_tools.errors import GGUFError, UnsupportedModelError
from gguf_tools.lora_merging import read_scaled
from gguf_tools.plan import model_metadata
from gguf_tools.reader import GGUFFile, read_metadata
from gguf_tools.self_check import Finding
from gguf_tools.values import Value
from runtime.config import MAX_CONTEXT
from runtime.logits_check import (
    N_TOKENS,
    TEXT,
    Expected,
    check_logits,
    choose_layers,
    run_source,
)
from runtime.sources import PlannedWeights, Source
from runtime.template_check import check_template
from runtime.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Check the file of the request that the one argument is; write the findings as JSON.

    The file is finished when standard input ends: what needs only its metadata is done before.
    """
    findings = check(json.loads(arguments[0]), wait=sys.stdin.read)
    sys.stdout.write(json.dumps([asdict(finding) for finding in findings]))
    return 0


def check(request: dict[str, Any], *, wait: Callable[[], object]) -> list[Finding]:
    """The findings about the file, in the order of the line."""
    findings, expected = _before(request)
    wait()
    if expected is not None:
        with GGUFFile(request["file"]) as file:
            findings.append(check_logits(expected, file, threads=request["threads"]))
    return findings


def _before(request: dict[str, Any]) -> tuple[list[Finding], Expected | None]:
    """What needs no finished file; the vocabulary, which may be large, is not kept."""
    metadata = read_metadata(Path(request["file"]))
    try:
        tokenizer = Tokenizer(metadata)
    except GGUFError as error:
        return [Finding("not run: its tokenizer cannot be used", (str(error),))], None
    with ThreadPoolExecutor(1) as executor:
        template = executor.submit(check_template, metadata, tokenizer)
        made = _run_source(request, tokenizer)
        found = [template.result()]
    return (found, made) if isinstance(made, Expected) else ([*found, made], None)


def _run_source(request: dict[str, Any], tokenizer: Tokenizer) -> Expected | Finding:
    """What the source's weights make of a few tokens, or why that cannot be known."""
    try:
        source = open_source(request)
        if not source.tensors:
            return Finding("no weights to run")
        # One thread: the conversion has the others.
        return run_source(source, _ids(tokenizer, source), threads=1, layers=choose_layers(source))
    except UnsupportedModelError:
        return Finding("not run: its architecture cannot be run yet")
    except GGUFError as error:
        return Finding("logits not compared", (f"the source cannot be run: {error}",))


def open_source(request: dict[str, Any]) -> Source:
    """The weights that the file was made from."""
    path = Path(request["source"])
    if not request["is_checkpoint"]:
        return GGUFFile(path)
    model, _ = match_checkpoint(path, [read_scaled(text) for text in request["adapters"]])
    metadata = {
        "general.architecture": Value("str", model.architecture.name),
        **model_metadata(model),
    }
    return PlannedWeights(path, model.tensors, metadata)


def _ids(tokenizer: Tokenizer, source: Source) -> list[int]:
    """A few tokens of a text: at most as many as the model has positions, all with embeddings."""
    embedding = source.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None else 1
    name = source.metadata.get("general.architecture")
    n_ctx = source.metadata.get(f"{name}.context_length")
    most = n_ctx if isinstance(n_ctx, int) and 0 < n_ctx < MAX_CONTEXT else N_TOKENS
    ids = tokenizer.encode(TEXT)[: min(N_TOKENS, most)] or [0]
    return [token % n_vocab for token in ids]
