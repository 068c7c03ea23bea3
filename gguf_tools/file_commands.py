"""The commands that compare, change, check, split and merge GGUF files.

Everything heavy is imported inside the commands: `--help` answers at once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gguf_tools.command import undisturbed_ending
from gguf_tools.shared_options import Force, ModelFile

if TYPE_CHECKING:
    from gguf_tools.reader import GGUFFile
    from gguf_tools.tools.edit import Change

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A GGUF file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    everything: Annotated[
        bool, typer.Option("--all", help="List all keys and tensors that differ.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare two GGUF files: metadata, types, shapes, and the error of each tensor's weights.

    The error is relative to A's weights. Exit code 0 means equal, 1 different; an error is 1, too,
    with a line on standard error and nothing on standard output.
    """
    from gguf_tools.tools.diff import compare, describe_difference, difference_lines

    with _opened(a) as first, _opened(b) as second:
        found = compare(first, second)
    if json:
        _print_json(describe_difference(found))
    else:
        for line in difference_lines(found, everything=everything):
            print(line)
    if not found.equal:
        raise typer.Exit(1)


def set_value(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.", show_default=False)],
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Such as general.name.", show_default=False)
    ] = None,
    value: Annotated[
        str | None,
        typer.Argument(
            metavar="VALUE",
            help="Of an array: JSON. After -- it may begin with a -.",
            show_default=False,
        ),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Of a new key: str, bool, u32, i32, f32, ... or arr[str] and the like. A key that "
            "is there keeps its type.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the key.")] = False,
    reserve: Annotated[
        int,
        typer.Option(
            "--reserve",
            metavar="BYTES",
            min=0,
            max=1 << 24,
            help="If the file has to be rewritten, leave room for later changes.",
        ),
    ] = 0,
    recover: Annotated[
        bool, typer.Option("--recover", help="Put back what an interrupted change overwrote.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Change keys that decide how others are read, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Set one metadata value of a GGUF file.

    In place where it fits into the padding before the tensors; otherwise the file is written anew
    and replaced when it is complete, which is said. Of a split model the first part is changed.
    """
    from gguf_tools.reader import GGUFFile
    from gguf_tools.tools.edit import apply_in_place, apply_rewrite, check_target, plan_change
    from gguf_tools.tools.edit import recover as put_back

    check_target(file)
    if recover:
        if key is not None:
            raise typer.BadParameter("--recover goes without a key")
        done = put_back(file)
        if json:
            _print_json({"file": str(file), "recovered": done})
        else:
            print("the old metadata is back" if done else "there was nothing to put back")
        return
    if key is None or (value is None) != remove:
        raise typer.BadParameter("expected KEY VALUE, KEY --remove, or --recover")
    with GGUFFile(file) as opened:
        change = plan_change(opened, key, value, type_name=type_name, force=force, reserve=reserve)
        if not dry_run and not change.nothing_to_do:
            if change.in_place:
                apply_in_place(change)
            else:
                total = sum(t.nbytes for t in opened.tensors.values() if t.part == 0)
                with _bar(total) as advance:
                    for name, n_bytes in apply_rewrite(change, opened):
                        advance(name, n_bytes)
    _report_change(change, dry_run=dry_run, json=json)


def verify(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="GGUF files, or names of models.", show_default=False),
    ],
    digests: Annotated[
        Path | None,
        typer.Option(
            "--digests",
            metavar="FILE",
            help="Compare with these digests. By default with FILE.sha256, if it is there.",
            show_default=False,
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Write the SHA-256 digest of each tensor to FILE.sha256, in the form of "
            "llama.cpp's gguf-hash. Metadata is no part of it.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Check GGUF files: layout, needed metadata, tokenizer, scales that are no numbers, digests.

    Exit code 1 when one is broken; warnings alone do not make it so.
    """
    from gguf_tools.errors import GGUFError
    from gguf_tools.tools.digests import digests_path, write_digests
    from gguf_tools.tools.verify import broken_report, describe_report, report_lines
    from gguf_tools.tools.verify import verify as check

    if digests is not None and (write or len(files) > 1):
        raise typer.BadParameter("--digests goes with one FILE and without --write")
    reports = []
    for path in files:
        try:
            with _opened(path) as file:
                report = check(file, digests=digests, make_digests=write)
                if write and report.good and report.digests is not None:
                    write_digests(digests_path(file), file.path.name, dict(report.digests))
        except GGUFError as error:
            if len(files) == 1:
                raise
            report = broken_report(path, str(error))
        reports.append(report)
        if not json:
            for line in report_lines(report):
                print(line)
    if json:
        _print_json({"files": [describe_report(report) for report in reports]})
    if not all(report.good for report in reports):
        raise typer.Exit(1)


def split(
    file: ModelFile,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="SIZE",
            help="The most bytes of tensors in a part, such as 2GB or 500MiB.",
            show_default=False,
        ),
    ] = None,
    max_tensors: Annotated[
        int | None,
        typer.Option(
            "--max-tensors",
            metavar="N",
            min=1,
            help="The most tensors in a part.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PREFIX",
            help="The parts are PREFIX-00001-of-0000N.gguf. By default the file's name, in the "
            "current folder.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the parts and their sizes; write nothing.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Split a GGUF file into parts, as llama-gguf-split does."""
    from gguf_tools.errors import printable
    from gguf_tools.tools.splitting import default_prefix, parse_size, plan_split
    from gguf_tools.tools.splitting import split as write_parts

    if (max_size is None) == (max_tensors is None):
        raise typer.BadParameter("expected one of --max-size and --max-tensors")
    limit = None if max_size is None else parse_size(max_size)
    with _opened(file) as opened:
        prefix = output if output is not None else default_prefix(opened.path)
        plans = plan_split(opened, prefix, max_size=limit, max_tensors=max_tensors)
        if not dry_run:
            with _bar(sum(tensor.nbytes for tensor in opened.tensors.values())) as advance:
                for step in write_parts(opened, plans, force=force):
                    advance(step.path.name, step.n_bytes)
    if json:
        parts = [
            {"file": str(plan.path), "size": plan.size, "tensors": len(plan.tensors)}
            for plan in plans
        ]
        _print_json({"written": not dry_run, "parts": parts})
        return
    for plan in plans:
        n = len(plan.tensors)
        counted = f"{n:,} tensor{'' if n == 1 else 's'}"
        print(f"{printable(plan.path, limit=1000)}  {plan.size:,} bytes, {counted}")


def merge(
    file: Annotated[
        Path,
        typer.Argument(metavar="FIRST", help="The part -00001-of-0000N.gguf.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The file to write.", show_default=False
        ),
    ],
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge the parts of a split model into one GGUF file."""
    from gguf_tools.errors import printable
    from gguf_tools.tools.splitting import merge as write_whole

    with _opened(file) as opened:
        total = sum(tensor.nbytes for tensor in opened.tensors.values())
        with _bar(total) as advance:
            for step in write_whole(opened, output, force=force):
                advance(step.name, step.n_bytes)
        n_parts, n_tensors = len(opened.paths), len(opened.tensors)
    size = output.stat().st_size
    if json:
        _print_json({"file": str(output), "size": size, "parts": n_parts, "tensors": n_tensors})
        return
    print(
        f"{printable(output, limit=1000)}  {size:,} bytes, {n_tensors:,} tensors of {n_parts:,} "
        "files"
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "diff": diff,
    "set": set_value,
    "verify": verify,
    "split": split,
    "merge": merge,
}


@contextmanager
def _opened(name: Path) -> "Iterator[GGUFFile]":
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from gguf_tools.reader import GGUFFile

    with GGUFFile(find_with_bar(find_model, name)) as file:
        yield file


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on a terminal; call it with what is written and how many bytes of it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from gguf_tools.errors import printable

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        undisturbed_ending(),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("", total=total)
        yield lambda name, n_bytes: bar.update(
            task, advance=n_bytes, description=f"{printable(name, 40):<32}"
        )


def _report_change(change: "Change", *, dry_run: bool, json: bool) -> None:
    from gguf_tools.describe import show_value, to_json
    from gguf_tools.errors import printable

    how = "nothing" if change.nothing_to_do else "in place" if change.in_place else "rewritten"
    if json:
        _print_json(
            {
                "file": str(change.file),
                "key": change.key,
                "type": change.type,
                "before": to_json(change.before),
                "after": to_json(change.after),
                "how": how,
                "written": not dry_run and not change.nothing_to_do,
            }
        )
        return
    values = [
        "not there" if value is None else show_value(value)
        for value in (change.before, change.after)
    ]
    print(f"{printable(change.key)}: {values[0]} -> {values[1]}")
    texts = {
        "nothing": "nothing to do: it is so already",
        "in place": "changed in place",
        "rewritten": "the file was rewritten: the change did not fit into the room before the "
        "tensors",
    }
    if dry_run and how != "nothing":
        would = "in place" if change.in_place else "by rewriting the file"
        print(f"not written; it would be changed {would}")
    else:
        print(texts[how])


def _print_json(facts: dict[str, Any]) -> None:
    import json

    print(json.dumps(facts, indent=2, allow_nan=False))
    sys.stdout.flush()
