"""`gguf tokenize`: what a file's tokenizer makes of a text.

Everything heavy is imported inside the command: `--help` answers at once.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gguf_tools.errors import GGUFError, printable

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer


def tokenize(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A GGUF file; it may hold a vocabulary alone.", show_default=False
        ),
    ],
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXT]",
            help="The text; without it, and without --file, standard input is read.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="PATH", help="Read this file.", show_default=False),
    ] = None,
    pieces: Annotated[
        bool, typer.Option("--pieces", help="Print each token's id and text on a line of its own.")
    ] = False,
    no_special: Annotated[
        bool,
        typer.Option(
            "--no-special",
            help="Add no special tokens around the text and find none in it. Without this, what "
            "the model puts before a text is added, and <|im_end|> and the like are the tokens.",
        ),
    ] = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="Read a JSON string on each line; answer each with a line that is the JSON list "
            "of its ids.",
        ),
    ] = False,
) -> None:
    """Show the tokens of a text: their ids, on one line.

    The text is taken as it is, a newline at its end included.
    """
    if text is not None and source is not None:
        raise typer.BadParameter("give the text or --file, not both")
    if json_lines and (pieces or text is not None):
        other = "--pieces" if pieces else "a text"
        raise typer.BadParameter(f"--jsonl and {other} exclude each other")

    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from gguf_tools.reader import GGUFFile
    from runtime.tokenizer import Tokenizer

    with GGUFFile(find_with_bar(find_model, file)) as opened:
        tokenizer = Tokenizer(opened.metadata)
    for note in tokenizer.notes:
        print(f"note: {printable(note, 1000)}", file=sys.stderr)
    special = not no_special
    if text is not None:
        _check_argument(text)
        _print(tokenizer, token_ids(tokenizer, text, special=special), pieces=pieces)
        return
    with ExitStack() as stack:
        if source is None and sys.stdin is None:  # closed by whoever started this
            raise GGUFError("there is no standard input to read; give a text, or --file")
        if source is None:
            stream, name = sys.stdin.buffer, "standard input"
        else:
            stream, name = stack.enter_context(source.open("rb")), printable(source, 1000)
        if json_lines:
            for asked in json_texts(stream, name):
                # Answered at once: whoever asks may wait for it before asking on.
                print(json.dumps(token_ids(tokenizer, asked, special=special)), flush=True)
            return
        text = decode(stream.read(), name)
    _print(tokenizer, token_ids(tokenizer, text, special=special), pieces=pieces)


def token_ids(tokenizer: "Tokenizer", text: str, *, special: bool) -> list[int]:
    """The ids of `text`; with `special` also special tokens, as llama.cpp's llama-tokenize does it.

    There bos is put before a text even if the text begins with it, and eos only goes with bos.
    """
    ids = tokenizer.encode(text, add_special=False, parse_special=special)
    if special and tokenizer.add_bos and tokenizer.bos_id is not None:
        ids.insert(0, tokenizer.bos_id)
        if tokenizer.add_eos and tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
    return ids


def json_texts(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The JSON string of each line; an error names the line."""
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number:,}"
        try:
            value = json.loads(decode(line.rstrip(b"\r\n"), where))
        except RecursionError:
            raise GGUFError(f"{where}: expected a JSON string, found something deep") from None
        except ValueError as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise GGUFError(f"{where}: expected a JSON string ({printable(said)})") from None
        if not isinstance(value, str):
            found = printable(json.dumps(value), 40)
            raise GGUFError(f"{where}: expected a JSON string, found {found}")
        yield value


def decode(data: bytes, name: str) -> str:
    """`data` as UTF-8 text, nothing of it changed."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise GGUFError(
            f"{name}: expected UTF-8 text, found the byte 0x{data[error.start]:02x} at position "
            f"{error.start:,}"
        ) from None


def show_bytes(data: bytes) -> str:
    """The bytes of a token in quotes: what is not text that a terminal can show, as escapes."""
    try:
        text = data.decode()
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    except UnicodeDecodeError:  # a part of a character
        shown = "".join(f"\\x{byte:02x}" for byte in data)
    return f"'{shown}'"


def _check_argument(text: str) -> None:
    """A shell passes any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GGUFError("the text of the command line is not valid UTF-8") from None


def _print(tokenizer: "Tokenizer", ids: list[int], *, pieces: bool) -> None:
    if not pieces:
        print(*ids)
        return
    for token_id in ids:
        print(f"{token_id:>6}  {show_bytes(tokenizer.token_bytes(token_id, special=True))}")
