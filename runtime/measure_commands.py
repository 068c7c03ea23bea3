"""The commands that measure: `gguf bench`, `gguf tune` and `gguf doctor`.

Everything heavy is imported inside the command: `--help` answers at once.
"""

from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gguf_tools.shared_options import ModelFile


def sweep(help: str) -> Any:
    return typer.Option(help=help, metavar="LIST", show_default=False)


def bench(
    file: ModelFile,
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


def tune(
    file: ModelFile,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt as you have them.", min=1)] = 256,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 128,
    threads: Annotated[
        str | None,
        sweep("Threads to try, such as 2,4. (default: around the number of physical cores)"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="About how long to measure, loading aside.", min=1, max=3600)
    ] = 30,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="GPUs to use, such as cuda:1,cuda:0, or none.", show_default=False
        ),
    ] = None,
    vram_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Use no more than this of each GPU.", show_default=False),
    ] = None,
    cpu_moe: Annotated[
        int, typer.Option(metavar="N", help="Keep the first N layers' experts on the CPU.", min=0)
    ] = 0,
    kv_type: Annotated[
        Literal["f16", "q8_0"], typer.Option(help="How the KV cache keeps numbers.")
    ] = "f16",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curve into this PNG file.", show_default=False),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object: the advice and every timing.")
    ] = False,
    save: Annotated[bool, typer.Option(help="Let `run` use the result from now on.")] = True,
) -> None:
    """Find the threads and the GPU layers that are fastest for a model on this machine.

    `run` uses the result where --threads and --gpu-layers are left out.
    """
    import runtime.tuning as tuning
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.errors import printable
    from gguf_tools.models_by_name import find_model
    from gguf_tools.reader import GGUFFile
    from runtime.bench_terminal import draw_progress
    from runtime.decoders import check_architecture
    from runtime.offload import read_offload
    from runtime.terminal import remark
    from runtime.tune_terminal import chart, check_plots, draw_picture
    from runtime.tuned import Tuned, device_names, remember

    counts = _parse_counts("--threads", threads)
    try:
        offload = read_offload("auto", device=device, vram_limit=vram_limit, cpu_moe=cpu_moe)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if plot is not None:
        check_plots()
    work = tuning.Work(prompt, answer)
    with GGUFFile(find_with_bar(find_model, file)) as opened:
        check_architecture(opened)
        events = tuning.measure(
            opened,
            work,
            offload,
            threads=counts or tuning.thread_counts(),
            seconds=seconds,
            kv_type=kv_type,
        )
        timings: list[tuning.Timing] = draw_progress(events)
        advice = tuning.advise(timings, work)
        if plot is not None:
            draw_picture(plot, timings, advice, printable(opened.path.name, 60))
        if json:
            print(dumps(tuning.to_json(advice, timings), indent=2))
        else:
            print("\n".join((*chart(timings, work), "", *tuning.describe(advice))))
        if not save:
            return
        found = Tuned(advice.gpu_layers, advice.threads, device_names(offload.devices))
        if remember(opened, found, offload.wish) is None:
            remark("note: the result is not kept: there is no cache folder")
        else:
            remark("`run` uses this for the model where --gpu-layers and --threads are left out")


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
