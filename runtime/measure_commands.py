"""The commands that measure: `gguf bench` and `gguf doctor`.

Everything heavy is imported inside the command: `--help` answers at once.
"""

from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def sweep(help: str) -> Any:
    return typer.Option(help=help, metavar="LIST", show_default=False)


def bench(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A GGUF file, or the name of a model.", show_default=False
        ),
    ],
    prompt: Annotated[
        str | None,
        sweep("Tokens of a prompt to read, such as 128,512, or none. (default: 512)"),
    ] = None,
    gen: Annotated[
        str | None, sweep("Tokens to write one by one, such as 64, or none. (default: 64)")
    ] = None,
    depth: Annotated[
        str | None, sweep("Tokens held before the first, such as 0,1024. (default: 0)")
    ] = None,
    threads: Annotated[
        str | None, sweep("Threads, such as 1,2. (default: the physical cores)")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Rounds; a speed is the median of them.", min=1)] = 3,
    kv_type: Annotated[
        Literal["f16", "q8_0"], typer.Option(help="How the KV cache keeps numbers.")
    ] = "f16",
    mmap: Annotated[
        bool, typer.Option(help="Use the weights where the file is mapped, or copy them to memory.")
    ] = True,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as markdown.")
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON list of objects: phase (prompt or decode), tokens, depth, threads, "
            "tokens_per_second (the median of the rounds), spread (tokens/s that the rounds were "
            "from it at most) and bytes_per_second (weights and KV cache read).",
        ),
    ] = False,
) -> None:
    """Measure how fast a model reads prompts and writes tokens on this machine.

    Every combination of the lists is measured, in turn, round after round. Reading a prompt is
    bound by arithmetic, writing by memory: the table holds the bytes that a step reads against
    what the machine can read.
    """
    if markdown and json:
        raise typer.BadParameter("--markdown and --json exclude each other")
    import runtime.bench as measuring
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from gguf_tools.reader import GGUFFile
    from runtime.bench_terminal import draw_progress, draw_table
    from runtime.config import read_config
    from runtime.decoders import check_architecture

    prompts, generated = _parse_counts("--prompt", prompt), _parse_counts("--gen", gen)
    depths, counts = _parse_counts("--depth", depth), _parse_counts("--threads", threads)
    with GGUFFile(find_with_bar(find_model, file)) as opened:
        check_architecture(opened)
        cases = measuring.make_cases(
            read_config(opened), prompts=prompts, generated=generated, depths=depths, threads=counts
        )
        events = measuring.measure(
            opened, cases, repeat=repeat, kv_type=kv_type, in_memory=not mmap
        )
        results = draw_progress(events)
        if json:
            print(dumps(measuring.to_json(results), indent=2))
            return
        print("\n".join(measuring.describe(opened, results)), end="\n\n")
        rows = list(measuring.table_rows(results))
        if markdown:
            print("\n".join(measuring.markdown(rows)))
        else:
            draw_table(measuring.HEADER, rows)


def doctor(
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object: processor, vector_unit, memory_total, memory_available, "
            "read_bandwidth, kernel_cache, versions and cuda.",
        ),
    ] = False,
) -> None:
    """Show what this machine is and what was chosen for it. It takes about two seconds."""
    import runtime.doctor as examining

    facts = examining.examine()
    if json:
        print(dumps(examining.to_json(facts), indent=2))
        return
    rows = list(examining.describe(facts))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")


def _parse_counts(name: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of an option; None for its default, nothing for `none`."""
    from runtime.bench import parse_counts

    if text is None:
        return None
    if text == "none" and name in ("--prompt", "--gen"):
        return ()
    try:
        return parse_counts(text, least=0 if name == "--depth" else 1)
    except ValueError as error:
        raise typer.BadParameter(f"{name}: {error}") from None
