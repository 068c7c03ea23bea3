"""`gguf imatrix`: how much each column of a model's matrices counts, over a text.

Everything heavy is imported inside the command: `--help` answers at once.
"""

import json as json_module
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gguf_tools.errors import OutputError, printable
from gguf_tools.shared_options import Force, Threads, Windows

if TYPE_CHECKING:
    from runtime.quality.evaluation import Ids
    from runtime.quality.importance import Collected, Read
    from runtime.quality.subjects import Layered
    from runtime.quality.texts import Text

DEFAULT_CONTEXT = 512
DEFAULT_GROUP = 10


def imatrix(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL|FILE...",
            help="A model: a GGUF file (F16, BF16, Q8_0 or any), a checkpoint's folder, or a "
            "name. With --merge or --show-statistics: importance matrices, of either form.",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            "-f",
            metavar="PATH|default",
            help="The text to read; by default the one that ships.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="By default NAME.imatrix.gguf in the current folder.",
            show_default=False,
        ),
    ] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", metavar="N", min=8, help="Tokens in a window of the text.")
    ] = DEFAULT_CONTEXT,
    windows: Windows = None,
    process_output: Annotated[
        bool,
        typer.Option(
            "--process-output",
            help="Also of the matrix that gives the logits: output.weight, or token_embd.weight "
            "where that is both.",
        ),
    ] = False,
    parse_special: Annotated[
        bool,
        typer.Option("--parse-special", help="<|im_end|> and the like in the text are the tokens."),
    ] = False,
    save_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Save after so many windows. The same command goes on from what is saved.",
        ),
    ] = DEFAULT_GROUP,
    threads: Threads = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the importance matrices up, into one.")
    ] = False,
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Show what an importance matrix says.")
    ] = False,
    force: Force = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was made, or the statistics, as JSON.")
    ] = False,
) -> None:
    """Make an importance matrix, for `convert --imatrix` and llama-quantize.

    Windows are cut and squares added up as by llama.cpp's llama-imatrix, which reads the file, too.
    """
    if merge and show_statistics:
        raise typer.BadParameter("--merge and --show-statistics exclude each other")
    if len(files) > 1 and not merge:
        raise typer.BadParameter("give one file; --merge takes several")
    if (merge or show_statistics) and text is not None:
        raise typer.BadParameter("no text is read with --merge or --show-statistics")
    if show_statistics:
        _show_statistics(files[0], as_json=json)
    elif merge:
        if output is None:
            raise typer.BadParameter("--merge needs --output")
        _merge(files, output, force=force, as_json=json)
    else:
        from gguf_tools.conversion import protect_input
        from runtime.quality.subjects import open_layered
        from runtime.quality.texts import read_text
        from runtime.terminal import compiling

        content = read_text(text)
        path, target = _find(files[0], text, output)
        with open_layered(path, n_ctx=ctx, threads=threads, on_compile=compiling) as subject:
            for part in subject.paths:
                protect_input(part, target)
            cut = _cut(subject, content, ctx, parse_special=parse_special)
            run = _Run(target, content, with_output=process_output, force=force)
            _make(subject, cut, run, limit=windows, group=save_every, as_json=json)


class _Run:
    """Where the result goes, and what decides it beside model and windows."""

    def __init__(self, output: Path, text: "Text", *, with_output: bool, force: bool) -> None:
        self.output, self.text = output, text
        self.with_output, self.force = with_output, force
        self.identity = ""

    def saved(self) -> "Collected | None":
        """What the output holds of the first windows, if it is of this run or one like it."""
        from gguf_tools.errors import GGUFError
        from gguf_tools.imatrix import read_importance_matrix
        from runtime.quality.importance import started

        try:
            matrix = read_importance_matrix(self.output)
        except GGUFError:
            return None
        return started(matrix) if matrix.identity == self.identity else None

    def start(self, wanted: int) -> "Collected | None":
        """What there is to go on from; OutputError where the output is something else, or done."""
        if self.force or not self.output.exists():
            return None
        found, shown = self.saved(), printable(self.output, 1000)
        if found is None:
            raise OutputError(
                f"{shown} exists already, and is not of this model, text and options; use --force "
                "to replace it, or choose another name"
            )
        if found.windows >= wanted:
            raise OutputError(
                f"{shown} exists already, with {found.windows:,} windows of this text; use "
                "--force to make it again, or choose another name"
            )
        return found

    def save(self, found: "Collected", ctx: int) -> None:
        from gguf_tools.imatrix_writing import write_importance_matrix

        write_importance_matrix(
            self.output,
            found.entries,
            datasets=[self.text.name],
            n_chunks=found.windows,
            chunk_size=ctx,
            identity=self.identity,
            force=True,  # `start` has looked
        )


def _find(model: Path, text: Path | None, output: Path | None) -> tuple[Path, Path]:
    """The model's file or folder, and the output, which must be none of what is read."""
    from gguf_tools.conversion import protect_input
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from gguf_tools.writer import GGUFWriter

    path = model if model.is_dir() else find_with_bar(find_model, model)
    target = output or Path(f"{path.resolve().name.removesuffix('.gguf')}.imatrix.gguf")
    protect_input(path, target)
    if text is not None:
        protect_input(text, target)
    GGUFWriter(target, metadata={}, tensors=(), force=True)  # refuses what cannot become the file
    return path, target


def _cut(subject: "Layered", text: "Text", ctx: int, *, parse_special: bool) -> "Ids":
    from runtime.quality.evaluation import cut_windows
    from runtime.terminal import remark

    trained = subject.model.config.n_ctx_train
    if ctx > trained:
        remark(f"note: the model was trained on windows of {trained:,} tokens, and these have more")
    return cut_windows(subject.tokenizer, text.content, ctx, parse_special=parse_special)


def _make(
    subject: "Layered", windows: "Ids", run: _Run, *, limit: int | None, group: int, as_json: bool
) -> None:
    from runtime.quality.importance import Collected, collect, identify, tensors_of
    from runtime.terminal import remark

    tokenizer, model = subject.tokenizer, subject.model
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    run.identity = identify(subject.paths, windows, bos=bos, with_output=run.with_output)
    windows = windows[:limit]
    start = run.start(len(windows))
    if start is not None:
        remark(f"goes on from {printable(run.output, 1000)}, after window {start.windows:,}")
    began = time.monotonic()
    events = collect(
        model,
        subject.source,
        windows,
        bos=bos,
        with_output=run.with_output,
        start=start,
        group=group,
    )
    found = start
    try:
        for event in _with_bar(events, len(windows)):
            if isinstance(event, Collected):
                run.save(event, windows.shape[1])
                found = event
    except (KeyboardInterrupt, SystemExit):
        kept = run.saved()
        if kept is not None:
            remark(
                f"{printable(run.output, 1000)} has {kept.windows:,} of {len(windows):,} windows; "
                "the same command goes on from there"
            )
        raise
    assert found is not None
    seconds = time.monotonic() - began
    expected = tensors_of(model, with_output=run.with_output)
    _report(run.output, found, windows, expected, seconds, as_json=as_json)


def _report(
    output: Path,
    found: "Collected",
    windows: "Ids",
    expected: Sequence[str],
    seconds: float,
    *,
    as_json: bool,
) -> None:
    from gguf_tools.imatrix_statistics import describe_coverage, without_data

    n_windows, n_ctx = windows.shape
    if as_json:
        made = {
            "output": str(output),
            "windows": n_windows,
            "ctx": n_ctx,
            "tensors": len(found.entries),
            "seconds": round(seconds, 3),
            "missing": [name for name in expected if name not in found.entries],
            "experts_without_data": without_data(found.entries),
        }
        print(json_module.dumps(made, indent=2))
        return
    print(
        f"{printable(output, 1000)}: {len(found.entries):,} tensors, {n_windows:,} windows of "
        f"{n_ctx:,} tokens, {seconds:.1f} s"
    )
    for line in describe_coverage(found.entries, expected):
        print(line)


def _merge(files: Sequence[Path], output: Path, *, force: bool, as_json: bool) -> None:
    from gguf_tools.conversion import protect_input
    from gguf_tools.imatrix import read_importance_matrix
    from gguf_tools.imatrix_statistics import describe_coverage, without_data
    from gguf_tools.imatrix_writing import merge, write_importance_matrix

    for path in files:
        protect_input(path, output)
    matrices = [read_importance_matrix(path) for path in files]
    entries, n_chunks, chunk_size = merge(matrices)
    datasets = [name for matrix in matrices for name in matrix.datasets]
    write_importance_matrix(
        output, entries, datasets=datasets, n_chunks=n_chunks, chunk_size=chunk_size, force=force
    )
    if as_json:
        made = {
            "output": str(output),
            "windows": n_chunks,
            "ctx": chunk_size,
            "tensors": len(entries),
            "experts_without_data": without_data(entries),
        }
        print(json_module.dumps(made, indent=2))
        return
    print(f"{printable(output, 1000)}: {len(entries):,} tensors, {n_chunks:,} windows")
    for line in describe_coverage(entries):
        print(line)


def _show_statistics(path: Path, *, as_json: bool) -> None:
    from gguf_tools.imatrix import read_importance_matrix
    from gguf_tools.imatrix_statistics import (
        describe_coverage,
        layer_statistics,
        tensor_statistics,
        without_data,
    )
    from runtime.bench_terminal import draw_table
    from runtime.quality import importance_table as table

    matrix = read_importance_matrix(path)
    tensors = tensor_statistics(matrix.entries)
    layers = layer_statistics(tensors)
    if as_json:
        made = table.to_json(matrix, tensors, layers) | {
            "experts_without_data": without_data(matrix.entries)
        }
        print(json_module.dumps(made, indent=2))
        return
    print(table.describe(matrix), end="\n\n")
    draw_table(table.TENSOR_HEADER, table.tensor_rows(tensors))
    print()
    draw_table(table.LAYER_HEADER, table.layer_rows(layers))
    lines = list(describe_coverage(matrix.entries))
    print("", *lines, sep="\n" if lines else "", end="\n" if lines else "")


def _with_bar(events: "Iterable[Read | Collected]", n_windows: int) -> "Iterator[Read | Collected]":
    """The events, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from runtime.quality.importance import Read
    from runtime.terminal import is_terminal

    with Progress(
        TextColumn("reading"),
        BarColumn(),
        TextColumn(f"{{task.fields[windows]}} of {n_windows:,} windows"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not is_terminal(sys.stderr),
    ) as bar:
        task = None
        for event in events:
            if isinstance(event, Read):
                windows = event.done * n_windows // event.total
                if task is None:
                    task = bar.add_task(
                        "", total=event.total, completed=event.done, windows=windows
                    )
                bar.update(task, completed=event.done, windows=windows)
            yield event
