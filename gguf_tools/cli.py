"""The commands on files: `gguf info` and `convert`.

Everything heavy is imported inside the commands: `--help` answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gguf_tools.reader import GGUFFile


def info(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: architecture, parameters, file_size, bits_per_weight, "
            "types (name to count), tensors (name, type, shape, bytes, offset) and metadata "
            "(complete). A shape is in the file's order, the fastest dimension (the length of a "
            "row) first; an offset counts bytes from the start of the file.",
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
    from gguf_tools.reader import GGUFFile

    with GGUFFile(file) as opened:
        if json:
            _print_json(opened)
        else:
            _print_tables(opened, metadata=metadata, tensors=tensors)


def _print_json(file: "GGUFFile") -> None:
    import json

    from gguf_tools.describe import describe

    print(json.dumps(describe(file), indent=2, allow_nan=False))


def _print_tables(file: "GGUFFile", *, metadata: bool, tensors: bool) -> None:
    """The summary, and the lists asked for. Cells are Text: nothing in them is read as markup."""
    import sys

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
        table = new_table(
            "tensor", "type", "shape", "bytes", "offset", numbers=("shape", "bytes", "offset")
        )
        for tensor in file.tensors.values():
            facts = describe_tensor(tensor)
            shape = " x ".join(str(dim) for dim in facts["shape"])
            numbers = f"{facts['bytes']:,}", f"{facts['offset']:,}"
            row = (printable(facts["name"]), facts["type"], shape, *numbers)
            table.add_row(*(Text(cell) for cell in row))
        console.print()
        console.print(table)
