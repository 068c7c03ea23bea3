"""`gguf eval`: what a model gets right, and what quantising it cost.

Everything heavy is imported inside the command: `--help` answers at once.
"""

import json as json_module
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from gguf_tools.errors import printable
from gguf_tools.shared_options import Threads, Windows
from runtime.tokenize_command import decode

if TYPE_CHECKING:
    from runtime.quality.choices import Accuracy, Question
    from runtime.quality.evaluation import Evaluation
    from runtime.quality.speeds import Speed
    from runtime.quality.subjects import Subject
    from runtime.quality.table import Result

T = TypeVar("T")

DEFAULT_CONTEXT = 512
LONGEST = 8192  # tokens of a question
LONGEST_COMMAND = 4000  # characters of one that a report shows


@dataclass(frozen=True)
class Asked:
    """What was asked on the command line, as far as figures depend on it."""

    files: tuple[Path, ...]
    text: Path | None
    reference: Path | None
    task: Path | None
    ctx: int
    windows: int | None
    threads: int | None
    speed: bool | None
    report: Path | None

    def inputs(self) -> list[Path]:
        others = (self.text, self.reference, self.task)
        return [*self.files, *(path for path in others if path is not None)]

    def command(self) -> str:
        """The command line, with files by their names: their folders are nobody else's business."""
        options = {
            "--reference": self.reference,
            "--text": self.text,
            "--task": self.task,
            "--ctx": None if self.text is None else self.ctx,
            "--windows": self.windows,
            "--threads": self.threads,
            "--report": self.report,
        }
        words = ["gguf", "eval", *map(_short, self.files)]
        for name, value in options.items():
            words += [] if value is None else [name, _short(value)]
        if self.speed is not None:
            words.append("--speed" if self.speed else "--no-speed")
        return printable(shlex.join(words), LONGEST_COMMAND)


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
            metavar="FILE|MODEL_DIR",
            help="What the files are held against, token by token: a GGUF file of the same model "
            "(F16, BF16, F32), or the checkpoint's folder.",
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
    windows: Windows = None,
    threads: Threads = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw KL divergence against bits per weight (needs matplotlib: the extra "
            "`plots`).",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page to look at, with tables and plots, that needs nothing else.",
            show_default=False,
        ),
    ] = None,
    speed: Annotated[
        bool | None,
        typer.Option(
            "--speed/--no-speed",
            help="Measure briefly how fast the files read and write here. (default: for --report)",
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
    asked = Asked(tuple(files), text, reference, task, ctx, windows, threads, speed, report)
    if report is not None:
        from runtime.quality.page import check_target

        check_target(report, asked.inputs())

    from runtime.quality.choices import read_questions
    from runtime.quality.facts import read_facts
    from runtime.quality.subjects import distinct_names
    from runtime.quality.table import Result, draw, to_json

    content = None if text is None else decode(text.read_bytes(), printable(text))
    questions = None if task is None else read_questions(task)
    with ExitStack() as stack:
        n_ctx = ctx if questions is None else max(ctx, LONGEST)
        subjects = [stack.enter_context(_opened(path, n_ctx, threads)) for path in files]
        if reference is not None:
            held_against = _opened_reference(reference, ctx, n_ctx, threads)
            subjects.insert(0, stack.enter_context(held_against))
        evaluations: list[Evaluation | None] = [None] * len(subjects)
        if content is not None:
            evaluations = [*_evaluate(subjects, content, ctx, windows, reference is not None)]
        accuracies: list[Accuracy | None] = [None] * len(subjects)
        if questions is not None:
            accuracies = [_answer(subject, questions) for subject in subjects]
        speeds: list[Speed | None] = [None] * len(subjects)
        if speed or (speed is None and report is not None):
            speeds = _measure_speeds(subjects)
        names = distinct_names([subject.source.path for subject in subjects])
        results = [
            Result(
                name,
                subject.n_bytes,
                subject.bits_per_weight,
                evaluation=evaluation,
                accuracy=accuracy,
                speed=pace,
                facts=read_facts(subject.source),
            )
            for name, subject, evaluation, accuracy, pace in zip(
                names, subjects, evaluations, accuracies, speeds, strict=True
            )
        ]
    if plot is not None:
        draw(results, plot)
    if json:
        base = None if reference is None else results[0]
        candidates = results if base is None else results[1:]
        print(json_module.dumps([to_json(result, base) for result in candidates], indent=2))
    else:
        _show(results, as_markdown=markdown)
    if report is not None:  # last: a disk that is full takes no figure away
        _write_report(asked, results)


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


def _write_report(asked: Asked, results: "list[Result]") -> None:
    from runtime.quality.evaluation import scored
    from runtime.quality.page import Report, material, render, write_page
    from runtime.quality.speeds import machine

    assert asked.report is not None
    reference = None if asked.reference is None else results[0]
    found = results[0].evaluation
    windows = None if found is None else (found.tokens // scored(asked.ctx), asked.ctx)
    threads = next((result.speed.threads for result in results if result.speed), None)
    page = render(
        Report(
            candidates=results if reference is None else results[1:],
            reference=reference,
            command=asked.command(),
            text=None if asked.text is None else material(asked.text),
            task=None if asked.task is None else material(asked.task),
            windows=windows,
            machine=None if threads is None else machine(threads),
        )
    )
    write_page(asked.report, page)


def _evaluate(
    subjects: "list[Subject]", text: str, ctx: int, limit: int | None, with_reference: bool
) -> "Iterator[Evaluation]":
    from runtime.quality.evaluation import Evaluation, check_vocabularies, cut_windows, evaluate

    tokenizer = subjects[0].tokenizer
    check_vocabularies(
        [each.name for each in subjects], [each.tokenizer for each in subjects], text
    )
    windows = cut_windows(tokenizer, text, ctx, limit)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    scorers = [subject.scorer(windows, bos) for subject in subjects]
    reference = scorers.pop(0) if with_reference else None
    events = evaluate(scorers, windows, reference=reference, bos=bos)
    for event in _with_bar("reading", events):
        if isinstance(event, Evaluation):
            yield event


def _answer(subject: "Subject", questions: "list[Question]") -> "Accuracy | None":
    """None of a checkpoint: layer by layer, questions would take it too long."""
    from runtime.model import Model
    from runtime.quality.choices import Accuracy, answer

    if not isinstance(subject.model, Model):
        return None
    found = None
    events = answer(subject.model, subject.tokenizer, questions)
    for event in _with_bar(f"asking {printable(subject.name, 40)}", events):
        if isinstance(event, Accuracy):
            found = event
    return found


def _measure_speeds(subjects: "list[Subject]") -> "list[Speed | None]":
    """None of a checkpoint: nobody runs one layer by layer."""
    from runtime.model import Model
    from runtime.quality.speeds import Speed, measure_speeds

    models = [subject.model for subject in subjects if isinstance(subject.model, Model)]
    events = _with_bar("measuring speeds", measure_speeds(models), in_background=False)
    found = iter([event for event in events if isinstance(event, Speed)])
    return [next(found) if isinstance(each.model, Model) else None for each in subjects]


def _short(value: Path | int) -> str:
    return value.name if isinstance(value, Path) and value.parent.exists() else str(value)


def _with_bar(text: str, events: Iterable[T], *, in_background: bool = True) -> Iterator[T]:
    """The events, with a bar on a terminal for those that say how many are done.

    Drawing it in the background would be measured where time is.
    """
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
        auto_refresh=in_background,
        disable=not is_terminal(sys.stderr),
    ) as bar:
        task = bar.add_task(text, total=None)
        for event in events:
            done, total = getattr(event, "done", None), getattr(event, "total", None)
            if total is not None:
                bar.update(task, completed=done, total=total, refresh=not in_background)
            yield event


def _opened(path: Path, n_ctx: int, threads: int | None) -> "AbstractContextManager[Subject]":
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from runtime.quality.subjects import open_file
    from runtime.session import refuse_checkpoint

    refuse_checkpoint(path)
    return open_file(find_with_bar(find_model, path), n_ctx=n_ctx, threads=threads)


def _opened_reference(
    path: Path, window: int, n_ctx: int, threads: int | None
) -> "AbstractContextManager[Subject]":
    """A file, or a checkpoint, which reads windows alone."""
    from runtime.quality.subjects import open_checkpoint

    if path.is_dir():
        return open_checkpoint(path, n_ctx=window, threads=threads)
    return _opened(path, n_ctx, threads)
