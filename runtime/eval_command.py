"""`gguf eval`: what a model gets right, and what quantising it cost.

Everything heavy is imported inside the command: `--help` answers at once.
"""

import json as json_module
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from gguf_tools.errors import printable
from runtime.tokenize_command import decode

if TYPE_CHECKING:
    from gguf_tools.reader import GGUFFile
    from runtime.model import Model
    from runtime.quality.choices import Accuracy, Question
    from runtime.quality.evaluation import Evaluation
    from runtime.quality.table import Result
    from runtime.tokenizer import Tokenizer

T = TypeVar("T")

DEFAULT_CONTEXT = 512


def evaluate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="GGUF files, or names of models.", show_default=False
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="PATH", help="The text to predict.", show_default=False),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A GGUF file of the same model (F16, BF16, F32) that the others are held "
            "against, token by token.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Questions with several endings: on each line a JSON object with context, "
            "endings and gold (the index of the right one).",
            show_default=False,
        ),
    ] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", metavar="N", min=1, help="Tokens in a window of the text.")
    ] = DEFAULT_CONTEXT,
    windows: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Read so many windows; by default all.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="By default the physical cores.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw KL divergence against bits per weight (needs matplotlib: the extra "
            "`plots`).",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as markdown, for a model card.")
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON list, an object for each file: tokens, perplexity, mean_kl, kl_99, "
            "kl_999, same_top, file_size, bits_per_weight and more, figures with their errors as "
            "NAME_error.",
        ),
    ] = False,
) -> None:
    """Measure perplexity and, against a reference, what quantising cost.

    Windows are cut and scored as by llama.cpp's llama-perplexity: the figures compare.
    """
    if text is None and task is None:
        raise typer.BadParameter("give --text, --task or both")
    if text is None and reference is not None:
        raise typer.BadParameter("--reference needs --text")
    if markdown and json:
        raise typer.BadParameter("--markdown and --json exclude each other")
    if plot is not None and reference is None:
        raise typer.BadParameter("--plot needs --reference")

    from gguf_tools.describe import bits_per_weight
    from runtime.quality.choices import read_questions
    from runtime.quality.table import Result, draw, to_json

    content = None if text is None else decode(text.read_bytes(), printable(text))
    questions = None if task is None else read_questions(task)
    asked = [*([] if reference is None else [reference]), *files]
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(path)) for path in asked]
        n_ctx = ctx if questions is None else None
        models = [stack.enter_context(_loaded(file, n_ctx, ctx, threads)) for file, _ in opened]
        tokenizers = [tokenizer for _, tokenizer in opened]
        names = [printable(path.name or path) for path in asked]
        evaluations: list[Evaluation | None] = [None] * len(asked)
        if content is not None:
            evaluations = [
                *_evaluate(names, models, tokenizers, content, ctx, windows, reference is not None)
            ]
        accuracies: list[Accuracy | None] = [None] * len(asked)
        if questions is not None:
            accuracies = [
                _answer(*each, questions) for each in zip(names, models, tokenizers, strict=True)
            ]
        results = [
            Result(name, file.file_size, bits_per_weight(file) or 0.0, found, accuracy)
            for name, (file, _), found, accuracy in zip(
                names, opened, evaluations, accuracies, strict=True
            )
        ]
    if plot is not None:
        draw(results, plot)
    if json:
        base = results.pop(0) if reference is not None else None
        print(json_module.dumps([to_json(result, base) for result in results], indent=2))
    else:
        _show(results, as_markdown=markdown)


def _show(results: "list[Result]", *, as_markdown: bool) -> None:
    from runtime.bench import markdown
    from runtime.bench_terminal import draw_table
    from runtime.quality.table import chart, header, more_about, rows

    if as_markdown:
        for line in markdown(rows(results), header(results)):
            print(line)
        return
    draw_table(header(results), rows(results))
    for line in filter(None, map(more_about, results)):
        print(line)
    for line in chart(results):
        print(line)


def _evaluate(
    names: list[str],
    models: "list[Model]",
    tokenizers: "list[Tokenizer]",
    text: str,
    ctx: int,
    limit: int | None,
    with_reference: bool,
) -> "Iterator[Evaluation]":
    from runtime.quality.evaluation import (
        Evaluation,
        ModelScorer,
        check_vocabularies,
        cut_windows,
        evaluate,
    )

    check_vocabularies(names, tokenizers, text)
    windows = cut_windows(tokenizers[0], text, ctx, limit)
    scorers = [ModelScorer(model) for model in models]
    reference = scorers.pop(0) if with_reference else None
    bos = tokenizers[0].bos_id if tokenizers[0].add_bos else None
    events = evaluate(scorers, windows, reference=reference, bos=bos)
    for event in _with_bar("reading", events):
        if isinstance(event, Evaluation):
            yield event


def _answer(
    name: str, model: "Model", tokenizer: "Tokenizer", questions: "list[Question]"
) -> "Accuracy | None":
    from runtime.quality.choices import Accuracy, answer

    found = None
    for event in _with_bar(f"asking {name}", answer(model, tokenizer, questions)):
        if isinstance(event, Accuracy):
            found = event
    return found


def _with_bar(text: str, events: Iterable[T]) -> Iterator[T]:
    """The events, with a bar on a terminal for those that say how many are done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from runtime.terminal import is_terminal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not is_terminal(sys.stderr),
    ) as bar:
        task = bar.add_task(text, total=None)
        for event in events:
            done, total = getattr(event, "done", None), getattr(event, "total", None)
            if total is not None:
                bar.update(task, completed=done, total=total)
            yield event


@contextmanager
def _opened(path: Path) -> "Iterator[tuple[GGUFFile, Tokenizer]]":
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from gguf_tools.reader import GGUFFile
    from runtime.session import refuse_checkpoint
    from runtime.tokenizer import Tokenizer

    refuse_checkpoint(path)
    with GGUFFile(find_with_bar(find_model, path)) as file:
        yield file, Tokenizer(file.metadata)


@contextmanager
def _loaded(
    file: "GGUFFile", n_ctx: int | None, least: int, threads: int | None
) -> "Iterator[Model]":
    from runtime.model import DEFAULT_CONTEXT as LONGEST
    from runtime.model import Model

    with Model.load(file, n_ctx=n_ctx or max(least, LONGEST), threads=threads) as model:
        yield model
