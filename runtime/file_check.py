"""The part of convert's self-check that runs the model: a process of its own.

It takes a request as JSON and answers with a list of findings, of the chat template and of the
logits. See gguf_tools/self_check.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gguf_tools.conversion import match_checkpoint
from gguf_tools.errors import GGUFError
from gguf_tools.lora_merging import read_scaled
from gguf_tools.plan import model_metadata
from gguf_tools.reader import GGUFFile
from gguf_tools.self_check import Finding
from gguf_tools.values import Value
from runtime.config import MAX_CONTEXT
from runtime.logits_check import N_TOKENS, TEXT, check_logits
from runtime.sources import PlannedWeights, Source
from runtime.template_check import check_template
from runtime.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Check the file of the request that the one argument is."""
    findings = check(json.loads(arguments[0]))
    sys.stdout.write(json.dumps([asdict(finding) for finding in findings]))
    return 0


def check(request: dict[str, Any]) -> list[Finding]:
    """The findings about the file, in the order of the line."""
    with GGUFFile(request["file"]) as file, ThreadPoolExecutor(1) as executor:
        try:
            tokenizer = Tokenizer(file.metadata)
        except GGUFError as error:
            return [Finding("not run: its tokenizer cannot be used", (str(error),))]
        template = executor.submit(check_template, file.metadata, tokenizer)
        if not file.tensors:
            return [template.result(), Finding("no weights")]
        try:
            source = open_source(request)
        except GGUFError as error:
            reason = f"the source cannot be read again: {error}"
            return [template.result(), Finding("logits not compared", (reason,))]
        ids = _ids(tokenizer, file)
        logits = check_logits(source, file, ids, threads=request["threads"])
        return [template.result(), logits]


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


def _ids(tokenizer: Tokenizer, file: GGUFFile) -> list[int]:
    """A few tokens of a text: at most as many as the model has positions, all with embeddings."""
    embedding = file.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None else 1
    name = file.metadata.get("general.architecture")
    n_ctx = file.metadata.get(f"{name}.context_length")
    most = n_ctx if isinstance(n_ctx, int) and 0 < n_ctx < MAX_CONTEXT else N_TOKENS
    ids = tokenizer.encode(TEXT)[: min(N_TOKENS, most)] or [0]
    return [token % n_vocab for token in ids]
