"""convert's self-check of a file: a process of its own.

It takes a request as JSON and answers with a list of findings, of the tokenizer, of the chat
template and of the logits, and with the quality sheet. See gguf_tools/self_check.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from gguf_tools.conversion import match_checkpoint
from gguf_tools.encoders import read_vocabulary
from gguf_tools.errors import GGUFError, UnsupportedModelError
from gguf_tools.lora_merging import read_scaled
from gguf_tools.memory import return_memory
from gguf_tools.plan import model_metadata
from gguf_tools.quality_sheet import Sheet
from gguf_tools.reader import GGUFFile, UnfinishedFile
from gguf_tools.self_check import Finding
from gguf_tools.values import Value
from gguf_tools.vocab.agreement import agree
from gguf_tools.vocab.run_texts import LONG_TEXT, SHORT_TEXT
from gguf_tools.vocab.trial import Encodings
from runtime.config import MAX_CONTEXT
from runtime.growing_file import GrowingFile
from runtime.input_lines import InputLines
from runtime.layerwise import LayerwiseModel
from runtime.logits_check import (
    N_TOKENS,
    Comparing,
    check_logits,
    choose_layers,
    run_source,
)
from runtime.quality.file_run import FileRun
from runtime.quality.sheet import measure
from runtime.quality.source_run import SourceRun
from runtime.sources import PlannedWeights, Source
from runtime.template_check import check_template
from runtime.tokenizer import Tokenizer

POLL = 0.02  # seconds between looks at how far the file has been written


def main(arguments: Sequence[str]) -> NoReturn:
    """Check the file of the request on standard input; write the findings as JSON.

    What is to be run may be named before there is a file, by a line of its own. The line after the
    request comes when the file is finished, and tells how the checkpoint encodes the test texts
    (Encodings, or null): what has been written of the file is looked at before. Where no more lines
    come the conversion has ended, and so does this.
    """
    lines = InputLines()

    def read() -> Any:
        line = lines.read()
        if not line:
            _end(1)
        return json.loads(line)

    request = read()
    if "file" not in request:
        _make_ready(request)
        request = read()
    answer = check(request, wait=read, is_finished=lambda seconds: lines.comes(seconds=seconds))
    sys.stdout.write(json.dumps(asdict(answer)))
    _end(0)


def _make_ready(request: dict[str, Any]) -> None:
    """Load the kernels that the source's weights will need, as far as they are on disk."""
    try:
        LayerwiseModel(open_source(request), n_tokens=1, threads=1, compiles=False).close()
    except GGUFError:  # which `check` will say
        return


def _end(status: int) -> NoReturn:
    """Leave without tidying up, which takes longer the more a process has loaded."""
    sys.stdout.flush()
    os._exit(status)


@dataclass(frozen=True)
class Answer:
    """What there is to say of a file."""

    findings: list[Finding]  # in the order of the line
    sheet: Sheet | None = None
    no_sheet: str = ""  # why there is none


def check(
    request: dict[str, Any],
    *,
    wait: Callable[[], dict[str, Any] | None],
    is_finished: Callable[[float], bool] = lambda seconds: True,
) -> Answer:
    """What the request asks for of the file.

    `wait` returns when it is finished. Until `is_finished`, which waits so many seconds for that,
    what is there of it is looked at.
    """
    begun = UnfinishedFile(Path(request["file"]))
    checks = request.get("checks", True)

    def threads() -> int:
        """One while the conversion has the others."""
        return request["threads"] if is_finished(0) else 1

    findings: list[Finding] = []
    made: Comparing | Finding | None = None
    with ThreadPoolExecutor(1) as executor, ExitStack() as stack:
        source = _open_or_say(request)
        try:
            texts = Texts(begun.metadata, request.get("ids"))
            if checks:
                made = (
                    source if isinstance(source, Finding) else _run_source(source, texts, threads())
                )
            run = _run_text(request, source, texts, threads, stack)
            if checks:
                tokenizer = texts.tokenizer
                template = executor.submit(check_template, begun.metadata, tokenizer)
        except GGUFError as error:
            wait()
            finding = Finding("its tokenizer cannot be used", (f"tokenizer: {error}",))
            return Answer([finding], no_sheet="its tokenizer cannot be used")
        looking = [each for each in (made, run) if isinstance(each, Comparing | FileRun)]
        _look_early(begun, is_finished, looking)
        encodings = wait()
        if checks:
            findings += [_check_tokenizer(tokenizer, encodings), template.result()]
            del tokenizer, template
        del texts
        return_memory()  # a tokenizer has a good part of what the text's last steps take
        if isinstance(made, Finding):
            findings.append(made)
        try:
            file = stack.enter_context(GGUFFile(request["file"], begun=begun))
        except GGUFError as error:
            findings.append(Finding("not readable", (f"the file cannot be read: {error}",)))
            return Answer(findings, no_sheet=str(error))
        if isinstance(made, Comparing):
            findings.append(check_logits(made, file, threads=request["threads"]))
        if isinstance(run, str):
            return Answer(findings, no_sheet=run)
        try:
            bits, n_threads = request["sheet"]["bits"], request["threads"]
            return Answer(findings, measure(run, file, bits=bits, threads=n_threads))
        except GGUFError as error:
            return Answer(findings, no_sheet=str(error))


class Texts:
    """The texts that the models are run on, as tokens."""

    def __init__(self, metadata: Mapping[str, Any], known: Mapping[str, list[int]] | None) -> None:
        """`known` are the ids as the checkpoint has them, told by the parent. Else they are those
        of the file's own tokenizer, which takes a while to build. GGUFError where it cannot be.
        """
        self._metadata = metadata
        vocabulary = read_vocabulary(metadata)
        self.bos = vocabulary.ids["bos"] if vocabulary.add_bos else None
        if known is None:
            self.short, self.long = map(self.tokenizer.encoder.encode, (SHORT_TEXT, LONG_TEXT))
        else:
            self.short, self.long = known["short"], known["long"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's."""
        return Tokenizer(self._metadata)


def _look_early(
    begun: UnfinishedFile,
    is_finished: Callable[[float], bool],
    looking: Sequence[Comparing | FileRun],
) -> None:
    """Do with what is written of the file what can be done while the rest is."""
    seen: set[str] = set()
    is_busy = False
    try:
        with GrowingFile(begun) as file:
            while looking and not is_finished(0 if is_busy else POLL):
                there = file.there()
                if is_busy or there != seen:
                    is_busy = any([each.look(file, there) for each in looking])
                seen = there
    except GGUFError:  # the finished file will say it, too
        return


def _open_or_say(request: dict[str, Any]) -> Source | Finding:
    """The source, or why it cannot be run."""
    try:
        source = open_source(request)
    except GGUFError as error:
        return Finding("logits not compared", (f"the source cannot be run: {error}",))
    return source if source.tensors else Finding("no weights to run")


def _run_text(
    request: dict[str, Any],
    source: Source | Finding,
    texts: Texts,
    threads: Callable[[], int],
    stack: ExitStack,
) -> FileRun | str:
    """What the source makes of the quality sheet's text, or why that cannot be known."""
    wanted = request.get("sheet")
    if wanted is None:
        return ""
    if isinstance(source, Finding):
        return source.problems[0] if source.problems else source.text
    try:
        run = SourceRun(
            source, texts.long, bos=texts.bos, threads=threads, compiles=wanted["compiles"]
        )
    except UnsupportedModelError:
        return "its architecture cannot be run yet"
    except GGUFError as error:
        return str(error)
    return FileRun(stack.enter_context(run), names_tensors=wanted["names_tensors"])


def _check_tokenizer(tokenizer: Tokenizer, encodings: dict[str, Any] | None) -> Finding:
    """Whether the file encodes texts as its checkpoint does."""
    if encodings is None:
        return Finding("tokenizer carried over")
    found = agree(Encodings(**encodings), tokenizer.encoder, tokenizer.tokens)
    if found.failure:
        return Finding(f"tokenizer {found.describe()}", (f"tokenizer: {found.failure}",))
    if found.differences:
        return Finding(f"tokenizer differs: {found.describe()}", tuple(found.lines()))
    compared = f"tokenizer: compared with {found.source}"
    return Finding(f"tokenizer agrees on {found.n_texts} texts", details=(compared,))


def _run_source(source: Source, texts: Texts, threads: int) -> Comparing | Finding:
    """What the source's weights make of a few tokens, or why that cannot be known."""
    try:
        ids, layers = _ids(texts, source), choose_layers(source)
        return Comparing(run_source(source, ids, threads=threads, layers=layers))
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


def _ids(texts: Texts, source: Source) -> list[int]:
    """A few tokens of a text: at most as many as the model has positions, all with embeddings."""
    embedding = source.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None else 1
    name = source.metadata.get("general.architecture")
    n_ctx = source.metadata.get(f"{name}.context_length")
    most = n_ctx if isinstance(n_ctx, int) and 0 < n_ctx < MAX_CONTEXT else N_TOKENS
    begins = [] if texts.bos is None or texts.short[:1] == [texts.bos] else [texts.bos]
    ids = [*begins, *texts.short][: min(N_TOKENS, most)] or [0]
    return [token % n_vocab for token in ids]
