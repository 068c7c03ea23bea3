"""The command `run`, and all of them by name; the others have files of their own.

Everything heavy is imported inside the command: `--help` answers at once.
"""

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from gguf_tools.command import run_command
from runtime.eval_command import evaluate
from runtime.measure_commands import bench, doctor, tune
from runtime.tokenize_command import tokenize

if TYPE_CHECKING:
    from runtime.offload import Offload
    from runtime.sampling import SamplingOptions


THINK_WORDS = ("show", "hide", "fold", "on", "off", "low", "medium", "high")


def sampling(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Sampling", show_default=False)


def machine(help: str, *, metavar: str | None = None, min: int | None = None) -> Any:
    return typer.Option(
        help=help, metavar=metavar, min=min, rich_help_panel="Machine", show_default=False
    )


def gpu(help: str, metavar: str | None = None, *, min: int | None = None) -> Any:
    return typer.Option(
        help=help, metavar=metavar, min=min, rich_help_panel="GPUs", show_default=False
    )


def run(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a name such as smollm2, or hf:OWNER/REPO[:FILE or type]; the small "
            "embedded model when none is named.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Answer this and exit; piped text follows it, or stands for it.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="The system prompt.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            help="Most tokens of an answer; -1: no limit. (default: 1024; in a chat without "
            "template 256)",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|TEXT",
            help="Another chat template: one of the model's own by name, a file, or a text with "
            "{{ or {% in it.",
            show_default=False,
        ),
    ] = None,
    think: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD",
            help="show the model's reasoning (on standard error), hide it, or fold it to a line; "
            "on, off: have it reason or not; low, medium, high: how much. May be repeated. "
            "(default: show)",
        ),
    ] = None,
    temp: Annotated[
        float | None,
        sampling("Temperature; 0: always the likeliest token. (default: the model's, or 0.8)"),
    ] = None,
    top_k: Annotated[
        int | None, sampling("Of the k likeliest; 0: off. (default: the model's, or 40)")
    ] = None,
    top_p: Annotated[
        float | None,
        sampling("Of the likeliest that reach p together; 1: off. (default: the model's, or 0.95)"),
    ] = None,
    min_p: Annotated[
        float | None,
        sampling("Of those p times as likely as the top; 0: off. (default: the model's, or 0.05)"),
    ] = None,
    repeat_penalty: Annotated[
        float | None,
        sampling("Make repeated tokens less likely; 1: off. (default: the model's, or 1)"),
    ] = None,
    repeat_last_n: Annotated[
        int | None,
        sampling("Last tokens that may repeat; -1: all. (default: the model's, or 64)"),
    ] = None,
    seed: Annotated[
        int | None, sampling("The same seed draws the same tokens; -1: others each time.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", help="End the answer before this text. May be repeated."
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        machine(
            "Tokens of context. (default: what the model was trained for, at most 8192)", min=1
        ),
    ] = None,
    context_policy: Annotated[
        Literal["stop", "drop-oldest"] | None,
        machine(
            "When the context is full: stop, or drop the oldest turns. "
            "(default: stop with a prompt, drop-oldest in a chat)"
        ),
    ] = None,
    kv_type: Annotated[
        Literal["f16", "q8_0"],
        machine("How the KV cache keeps numbers; q8_0 takes about half the memory."),
    ] = "f16",
    mmap: Annotated[
        bool,
        machine(
            "Use the weights where the file is mapped, or copy them to memory, which takes as much "
            "again and may be read faster."
        ),
    ] = True,
    threads: Annotated[int | None, machine("(default: the physical cores)", min=1)] = None,
    gpu_layers: Annotated[
        str,
        gpu(
            "Layers on GPUs, counted from the end; the output head is the first, as in llama.cpp. "
            "(default: auto, as many as fit)",
            metavar="N|all|auto",
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        gpu("GPUs to use, such as cuda:1,cuda:0, or none; the first is filled first.", "LIST"),
    ] = None,
    vram_limit: Annotated[
        str | None, gpu("Use no more than this of each GPU, such as 6GiB.", "SIZE")
    ] = None,
    kv_offload: Annotated[
        bool, gpu("Keep the KV cache of a layer where the layer is, or all of it on the CPU.")
    ] = True,
    cpu_moe: Annotated[
        int, gpu("Keep the experts of the first N layers on the CPU.", "N", min=0)
    ] = 0,
    plan: Annotated[bool, gpu("Show which layers would go where, and exit.")] = False,
    json: Annotated[bool, gpu("With --plan: print it as a JSON object.")] = False,
    backend: Annotated[
        Literal["cpu", "reference"], machine("reference: NumPy, slow, to compare with.")
    ] = "cpu",
    stats: Annotated[
        bool, typer.Option(help="Show tokens read and written, and the speed.")
    ] = True,
) -> None:
    """Talk with a GGUF model, or have it answer one prompt.

    At a terminal it is a chat. With -p, or with piped text, it answers once.

    Then the answer alone goes to standard output and everything else to standard error.
    """
    overrides = {
        "temp": temp,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "repeat_last_n": repeat_last_n,
    }
    _check_usage(overrides, seed=seed, max_tokens=max_tokens, stop=stop or [], think=think or [])
    if json and not plan:
        raise typer.BadParameter("--json goes with --plan")
    offload = _read_offload(
        gpu_layers,
        device=device,
        vram_limit=vram_limit,
        kv_offload=kv_offload,
        cpu_moe=cpu_moe,
        backend=backend,
    )

    # Hundreds of thousands of objects are made and kept before the first token: looking for garbage
    # among them takes a tenth of that time.
    gc.disable()
    from contextlib import ExitStack

    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.models_by_name import find_model
    from runtime.chat import (
        ANSWER_LIMIT,
        BASE_TURN,
        Chat,
        answer_once,
        parse_think,
        switch_note,
    )
    from runtime.conversation import Conversation
    from runtime.embedded import embedded_model
    from runtime.sampling import Sampler, SamplingOptions
    from runtime.session import open_session, plan_lines, refuse_checkpoint
    from runtime.standard_input import check_text, read_prompt
    from runtime.terminal import compiling, remark

    texts = (("-p", prompt), ("--system", system), ("--chat-template", chat_template))
    for name, value in (*texts, *(("--stop", text) for text in stop or [])):
        check_text(name, value)
    text = None if plan else read_prompt(prompt)
    with ExitStack() as stack:
        stack.callback(gc.enable)
        if model is None:
            path = stack.enter_context(embedded_model())
        else:
            path = find_with_bar(find_model, model)
        if plan:
            refuse_checkpoint(path)
            lines = plan_lines(path, offload, n_ctx=ctx, kv_type=kv_type, as_json=json)
            print("\n".join(lines))
            return
        session = stack.enter_context(
            open_session(
                path,
                n_ctx=ctx,
                threads=threads,
                backend=backend,
                kv_type=kv_type,
                in_memory=not mmap,
                chat_template=chat_template,
                raw=raw,
                offload=offload,
                on_compile=compiling,
                on_note=remark,
            )
        )
        gc.freeze()
        gc.enable()
        options, notes = SamplingOptions().with_metadata(session.file.metadata)
        options = _override(options, overrides, seed)
        if system is not None and session.template is None:
            notes.append("--system is not used: only a chat template has a place for it")
        for note in notes:
            remark(f"note: {note}")
        conversation = Conversation(
            session.model,
            session.tokenizer,
            Sampler(options, n_tokens=session.tokenizer.n_tokens),
            template=session.template,
            system=system,
            stop=stop or [],
            max_tokens=None if max_tokens == -1 else max_tokens or ANSWER_LIMIT,
            policy=context_policy or ("stop" if text is not None else "drop-oldest"),
        )
        shown, switch = parse_think(think or [])
        if switch is not None:
            conversation.thinking = switch
            if note := switch_note(session, switch):
                remark(f"note: {note}")
        if text is not None:
            answer_once(session, conversation, text, think=shown, show_stats=stats)
            return
        if session.template is None and max_tokens is None:
            conversation.max_tokens = BASE_TURN
        Chat(session, conversation, think=shown, show_stats=stats).run()


def run_main() -> NoReturn:
    """The console script `run`."""
    run_command(_application(run))


def main() -> NoReturn:
    """`python -m runtime`: the commands by name; without a name it is `run`."""
    known = (run, bench, tune, doctor, tokenize)
    commands: dict[str, Callable[..., None]] = {command.__name__: command for command in known}
    commands["eval"] = evaluate
    command = commands.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is not None:
        del sys.argv[1]
    run_command(_application(command or run))


def _application(command: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(command)
    return app


def _check_usage(
    overrides: Mapping[str, Any],
    *,
    seed: int | None,
    max_tokens: int | None,
    stop: list[str],
    think: list[str],
) -> None:
    """Refuse values out of range before anything is loaded."""
    if max_tokens is not None and max_tokens != -1 and max_tokens < 1:
        raise typer.BadParameter(
            f"--max-tokens is at least 1, or -1 for no limit, not {max_tokens}"
        )
    for word in think:
        if word not in THINK_WORDS:
            raise typer.BadParameter(f"--think is one of {', '.join(THINK_WORDS)}, not {word}")
    if not all(stop):
        raise typer.BadParameter("--stop needs a text that is not empty")
    if seed is not None and seed < -1:
        raise typer.BadParameter(f"--seed is a whole number from 0, or -1 for none, not {seed}")
    from runtime.sampling import check_option

    for name, value in overrides.items():
        if value is not None:
            try:
                check_option(name, value)
            except ValueError as error:
                raise typer.BadParameter(f"--{error}") from None


def _read_offload(gpu_layers: str, **options: Any) -> "Offload":
    """What goes to GPUs; an option that means nothing is a wrong call."""
    from runtime.offload import read_offload

    try:
        return read_offload(gpu_layers, **options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _override(
    options: "SamplingOptions", overrides: Mapping[str, Any], seed: int | None
) -> "SamplingOptions":
    from dataclasses import replace

    given = {name: value for name, value in overrides.items() if value is not None}
    return replace(options, **given, seed=None if seed == -1 else seed)
