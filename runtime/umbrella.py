"""`gguf`: every command of the project under one name.

The one place that knows both command lines. Their modules import nothing heavy, so this stays
quick.
"""

from typing import NoReturn

import typer

import gguf_tools.cli
import gguf_tools.convert_command
import gguf_tools.file_commands
import runtime.cli
import runtime.eval_command
import runtime.imatrix_command
import runtime.measure_commands
import runtime.tokenize_command
from gguf_tools.command import run_command

app = typer.Typer(
    name="gguf",
    help="Convert, inspect, run and measure GGUF models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(gguf_tools.convert_command.convert)
app.command()(gguf_tools.cli.info)
app.command()(gguf_tools.cli.models)
for name, command in gguf_tools.file_commands.COMMANDS.items():
    app.command(name)(command)
app.command()(runtime.cli.run)
app.command()(runtime.measure_commands.bench)
app.command()(runtime.measure_commands.tune)
app.command()(runtime.measure_commands.doctor)
app.command()(runtime.tokenize_command.tokenize)
app.command("eval")(runtime.eval_command.evaluate)
app.command()(runtime.imatrix_command.imatrix)


def main() -> NoReturn:
    """The console script `gguf`."""
    run_command(app)
