"""The commands on files, by name; `gguf info` and `gguf models`.

Everything heavy is imported inside the commands: `--help` answers at once.
"""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from gguf_tools.command import run_command
from gguf_tools.convert_command import convert
from gguf_tools.file_commands import COMMANDS
from gguf_tools.shared_options import ModelFile

if TYPE_CHECKING:
    from gguf_tools.reader import GGUFFile


def info(
    file: ModelFile,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: architecture, parameters, file_size, bits_per_weight, "
            "types (name to count), tensors (name, type, shape, bytes, offset) and metadata "
            "(complete). A shape is in the file's order, the fastest dimension (the length of a "
            "row) first; an offset counts bytes from the start of the file. A split model has "
            "parts (file, file_size, tensors, bytes), too, and its tensors a part, from 1.",
        ),
    ] = False,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="List all metadata, long values shortened.")
    ] = False,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="List all tensors; shapes and offsets are as in --json."),
    ] = False,
) -> None:
    """Show what is in a GGUF file."""
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from gguf_tools.reader import GGUFFile

    with GGUFFile(find_with_bar(find_model, file)) as opened:
        if json:
            _print_json(opened)
        else:
            _print_tables(opened, metadata=metadata, tensors=tensors)


def models() -> None:
    """List the models that have short names, and what is kept of them and of the hub's."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gguf_tools.errors import printable
    from gguf_tools.models_by_name import list_models

    # Into a pipe nothing is folded: one line for each model.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("name", "model", "download", "kept in"):
        table.add_column(column, overflow="fold")
    for row in list_models():
        table.add_row(*(Text(printable(cell, limit=1000)) for cell in row))
    console.print(table)


def convert_main() -> None:
    """`convert`, the console script."""
    run_command(_application({"convert": convert}))


def main() -> None:
    """`python -m gguf_tools`: the commands by name; without a name it is `convert`."""
    commands: dict[str, Callable[..., None]] = {
        "convert": convert,
        "info": info,
        "models": models,
        **COMMANDS,
    }
    if len(sys.argv) > 1 and sys.argv[1] not in commands and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, convert.__name__)
    run_command(_application(commands))


def _application(commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    application = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        application.command(name, no_args_is_help=True)(command)
    return application


def _print_json(file: "GGUFFile") -> None:
    import json

    from gguf_tools.describe import describe

    print(json.dumps(describe(file), indent=2, allow_nan=False))


def _print_tables(file: "GGUFFile", *, metadata: bool, tensors: bool) -> None:
    """The summary, and the lists asked for. Cells are Text: nothing in them is read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gguf_tools.describe import describe_tensor, show_value, summarise
    from gguf_tools.errors import printable

    # Into a pipe nothing is folded: one line for each fact.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)

    def new_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
        table = Table(box=None, pad_edge=False, show_header=bool(columns[0]))
        for column in columns:
            table.add_column(
                column, justify="right" if column in numbers else "left", overflow="fold"
            )
        return table

    table = new_table("", " ")
    for label, value in summarise(file):
        table.add_row(Text(label, style="bold"), Text(value))
    console.print(table)
    if metadata:
        table = new_table("key", "type", "value")
        for key, item in file.metadata.items():
            shown = Text(printable(key, limit=200)), Text(file.metadata_types[key])
            table.add_row(*shown, Text(show_value(item)))
        console.print()
        console.print(table)
    if tensors:
        columns = ("bytes", "offset") if len(file.paths) == 1 else ("bytes", "part", "offset")
        table = new_table("tensor", "type", "shape", *columns, numbers=("shape", *columns))
        for tensor in file.tensors.values():
            facts = describe_tensor(file, tensor)
            shape = " x ".join(str(dim) for dim in facts["shape"])
            numbers = tuple(f"{facts[column]:,}" for column in columns)
            row = (printable(facts["name"]), facts["type"], shape, *numbers)
            table.add_row(*(Text(cell) for cell in row))
        console.print()
        console.print(table)
