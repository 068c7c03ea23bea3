"""`convert`: its options, and what it shows while it works and when it is done.

Everything heavy is imported inside: `--help` answers at once.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gguf_tools.command import undisturbed_ending

if TYPE_CHECKING:
    from gguf_tools.file_types import FileType
    from gguf_tools.journal import Journal
    from gguf_tools.losses import Losses
    from gguf_tools.overrides import Overrides
    from gguf_tools.plan import Plan
    from gguf_tools.values import MetadataValue

# Options that leave the bytes of the output as they are; any other starts a conversion over.
DECIDE_NO_BYTE = (
    *("model_dir", "output", "threads", "force", "no_resume", "strict", "dry_run"),
    *("no_check", "check_details"),
)


def convert(
    context: typer.Context,
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            help="The folder of a Hugging Face checkpoint (config.json, tokenizer, safetensors), "
            "hf:OWNER/REPO to fetch it from the hub, or a GGUF file to quantise.",
            show_default=False,
        ),
    ],
    file_type: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, "
            "Q4_0, IQ4_XS, IQ4_NL, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K or Q2_K_S (with --imatrix); "
            "upper or lower case.",
        ),
    ] = "Q8_0",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write. By default it is named after the folder and the type, in the "
            "current folder.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=1024, help="By default the physical cores.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it exists.")
    ] = False,
    no_resume: Annotated[
        bool,
        typer.Option(
            "--no-resume",
            help="Start over, whatever a stopped run has left. Without it the same command goes on "
            "from FILE.part.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail, and leave no file, where a tensor would not get the type asked for, or "
            "where the self-check finds something wrong. Without it both are only told.",
        ),
    ] = False,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="Leave out the self-check of the finished file: its tokenizer against the "
            "checkpoint's, its chat template, its logits against the source's weights.",
        ),
    ] = False,
    quality: Annotated[
        bool | None,
        typer.Option(
            "--quality/--no-quality",
            help="Measure what quantising costs: a short text, read by the file and by the "
            "source's weights. The figures are shown, and kept in the file. By default of models "
            "with less than 1 B parameters, as a part of the self-check.",
            show_default=False,
        ),
    ] = None,
    raise_cliff: Annotated[
        bool,
        typer.Option(
            "--raise-cliff",
            help="Where that shows a precision cliff, give the tensors that cost most more bits, "
            "and convert again (twice at most).",
        ),
    ] = False,
    check_details: Annotated[
        bool,
        typer.Option("--check-details", help="Show what the self-check measured, a line for each."),
    ] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="An importance matrix (GGUF or .dat, of llama-imatrix): how much "
            "an error in each column counts.",
            show_default=False,
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="The type of the tensors in whose name the expression is found, such as "
            "ffn_down=Q6_K; may be given several times, the first that matches holds.",
            show_default=False,
        ),
    ] = None,
    output_type: Annotated[
        str | None,
        typer.Option(
            "--output-type",
            metavar="TYPE",
            help="The type of output.weight, or of the embedding that takes its place.",
            show_default=False,
        ),
    ] = None,
    embedding_type: Annotated[
        str | None,
        typer.Option(
            "--embedding-type",
            metavar="TYPE",
            help="The type of token_embd.weight.",
            show_default=False,
        ),
    ] = None,
    pure: Annotated[
        bool,
        typer.Option("--pure", help="One type for all matrices, without a mixture's exceptions."),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="NAME",
            help="A tensor that stays in the type it has (F32 in a quantised checkpoint); * stands "
            "for anything; may be given several times.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show every tensor's type and the exact final size; write nothing."
        ),
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="ADAPTER[:SCALE]",
            help="Merge a LoRA adapter (the folder that PEFT saved, or hf:OWNER/REPO) into the "
            "weights; of several the changes add up.",
            show_default=False,
        ),
    ] = None,
    lora_only: Annotated[
        bool,
        typer.Option(
            "--lora-only",
            help="MODEL_DIR is a LoRA adapter: write it as a GGUF adapter (F32, F16 or BF16).",
        ),
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="MODEL_DIR",
            help="With --lora-only: the model that the adapter is for (a folder, or "
            "hf:OWNER/REPO); its weights are not needed.",
            show_default=False,
        ),
    ] = None,
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize",
            help="Quantise a GGUF file whose weights are quantised already: both errors add up.",
        ),
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT|default",
            help="Round the weights so that the least is lost on a text: a file, or `default`, "
            "the text that comes with this program. The size stays the same.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="How --calibrate rounds: imatrix (columns weighed, as with --imatrix), awq (the "
            "same of channels that are scaled first; what they feed undoes it), gptq (what "
            "rounding a weight does is made up for by those rounded later), or best (gptq of "
            "scaled channels: the default).",
            show_default=False,
        ),
    ] = None,
    calibrate_windows: Annotated[
        int | None,
        typer.Option(
            "--calibrate-windows",
            metavar="N",
            min=1,
            help="So many windows of 512 tokens of the text are read, by default 58.",
            show_default=False,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            metavar="SIZE",
            help="Instead of --type: the best types for a file of at most this size (4.2GiB, "
            "700MB), by what each costs this model, which is measured.",
            show_default=False,
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            "--target-bpw",
            metavar="BITS",
            help="The same for so many bits per weight, such as 4.5.",
            show_default=False,
        ),
    ] = None,
    target_text: Annotated[
        str | None,
        typer.Option(
            "--target-text",
            metavar="TEXT|default",
            help="What they are measured on: a file, or `default`, the text that comes with this "
            "program.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint, or a GGUF file, to a GGUF file of another type."""
    from functools import partial

    from gguf_tools.cores import default_threads
    from gguf_tools.self_check import CliffFoundError, SelfCheck, Source
    from gguf_tools.vocab import begin_trial

    # Two processes, which take a while to load: before all else.
    n_threads = threads or default_threads()
    new_check = partial(SelfCheck, threads=n_threads, strict=strict, checks=not no_check)
    checked = None
    trials = []
    if not dry_run and not lora_only:
        if not no_check or quality or raise_cliff:
            checked = context.with_resource(new_check())
        trials.append(context.with_resource(begin_trial(model_dir)))

    import time

    from gguf_tools.calibration import ROOM, SCALING, read_settings, remove_work
    from gguf_tools.calibration_bar import calibrate_with_bar
    from gguf_tools.cliffs import (
        ATTEMPTS,
        ROOM_IN_FILE,
        raised_types,
        raising_lines,
        request_sheet,
        with_room,
        with_types,
    )
    from gguf_tools.conversion import plan_conversion, protect_input, refuse_output
    from gguf_tools.download_bar import find_with_bar
    from gguf_tools.imatrix import read_importance_matrix
    from gguf_tools.journal import Journal
    from gguf_tools.lora import open_adapter
    from gguf_tools.lora_file import plan_adapter
    from gguf_tools.lora_merging import read_scaled
    from gguf_tools.losses import Losses
    from gguf_tools.models_by_name import find_adapter, find_checkpoint, find_config
    from gguf_tools.naming import output_name
    from gguf_tools.overrides import NO_OVERRIDES, parse_overrides
    from gguf_tools.plan import refuse_fallbacks
    from gguf_tools.quants.blocks import import_compilers
    from gguf_tools.reader import GGUFFile
    from gguf_tools.recipes import find_file_type
    from gguf_tools.report import closing_rows, loss_notes, plan_lines, quality_rows
    from gguf_tools.requantising import is_gguf, plan_requantisation, source_name
    from gguf_tools.target_bar import settle_with_bar
    from gguf_tools.target_options import read_target
    from gguf_tools.target_size import BEFORE
    from gguf_tools.type_trials import TypeTrials

    if lora if lora_only else base is not None:
        raise typer.BadParameter("--base goes with --lora-only, and --lora does not")
    source = context.get_parameter_source("file_type")
    if lora_only and source is not None and source.name == "DEFAULT":
        file_type = "F32"
    wanted = read_target(target_size, target_bpw, target_text)
    if wanted:
        if lora_only or pure or (source is not None and source.name != "DEFAULT"):
            other = "--lora-only" if lora_only else "--pure" if pure else "--type"
            raise typer.BadParameter(f"{other} and a target exclude each other")
        file_type = BEFORE
    chosen = find_file_type(file_type)
    overrides = parse_overrides(
        tensor_types=tensor_type or (),
        output=output_type,
        embedding=embedding_type,
        pure=pure,
        keep=keep or (),
    )
    settings = read_settings(calibrate, method, calibrate_windows)
    if settings and (imatrix is not None or lora_only):
        other = "--lora-only" if lora_only else "--imatrix"
        raise typer.BadParameter(f"--calibrate and {other} exclude each other")
    matrix = read_importance_matrix(imatrix) if imatrix is not None else None
    if lora_only and (matrix or overrides != NO_OVERRIDES):
        raise typer.BadParameter("--lora-only takes neither --imatrix nor types by name")
    if raise_cliff:
        excluded = {
            "--calibrate": settings,
            "--lora-only": lora_only,
            "--no-quality": quality is False,
            "--target-size and --target-bpw": wanted,
        }
        for other in (option for option, given in excluded.items() if given):
            raise typer.BadParameter(f"--raise-cliff and {other} exclude each other")
    model_dir = find_with_bar(find_adapter if lora_only else find_checkpoint, model_dir)
    base = find_with_bar(find_config, base) if base is not None else None
    adapters = [read_scaled(t, lambda name: find_with_bar(find_adapter, name)) for t in lora or ()]
    start = time.monotonic()
    file = GGUFFile(model_dir) if not lora_only and is_gguf(model_dir) else None
    if file and adapters:
        raise typer.BadParameter("a GGUF file takes no --lora: merge it into the checkpoint")
    if not dry_run:
        import_compilers()
    options, files = _deciding_options(context)
    merged = [scaled.adapter.folder for scaled in adapters]
    inputs = file.paths if file else (model_dir,)
    new_journal = partial(
        Journal, (*inputs, *files, *merged), options=options, resume=not no_resume
    )
    journal = new_journal()

    def plan_for(file_type: "FileType", overrides: "Overrides") -> "Plan":
        if lora_only:
            return plan_adapter(open_adapter(model_dir), file_type, base)
        if file:
            return plan_requantisation(
                file,
                file_type,
                allow_requantize=allow_requantize,
                overrides=overrides,
                matrix=matrix,
            )
        return plan_conversion(
            model_dir,
            file_type,
            adapters,
            overrides=overrides,
            matrix=matrix,
            trial=trials.pop() if trials else None,
        )

    plan = plan_for(chosen, overrides)
    end = wanted.name if wanted else chosen.name
    named = output_name(source_name(model_dir) if file else model_dir, end, adapters=merged)
    target = output if output is not None else Path(named)
    for path in (*(file.paths if file else ()), model_dir, *merged, *files):
        protect_input(path, target)
    request = partial(
        request_sheet,
        asked=True if raise_cliff else quality,
        checks=not no_check,
        compiles=bool(quality),
        is_scaled=settings is not None and settings.method in SCALING,
    )
    sheet = None if lora_only else request(plan)
    seconds = calibrated = settled = None
    raised: list[str] = []
    losses = Losses()
    made_from = Source(
        model_dir,
        is_checkpoint=file is None,
        adapters=tuple(lora or ()),
        encodings=plan.encodings,
    )
    if wanted:
        if not dry_run:
            refuse_output(plan, target, force=force)
        settled = settle_with_bar(
            wanted,
            plan,
            overrides,
            plan_for,
            TypeTrials(made_from, text=wanted.text, imatrix=imatrix, threads=n_threads),
            room=(ROOM if settings else 0) + (ROOM_IN_FILE if sheet else 0),
        )
        plan = settled.plan
        sheet = request(plan) if sheet else None
    if sheet:
        plan = with_room(plan)
    if strict:
        refuse_fallbacks(plan)
    if dry_run:
        for line in plan_lines(plan):
            print(line)
        print()
    else:
        if settings:
            calibrated = calibrate_with_bar(
                plan,
                made_from,
                target,
                settings,
                inputs=(*inputs, *merged),
                threads=n_threads,
                force=force,
                resume=not no_resume,
            )
            plan = calibrated.plan
            journal.add_option(calibrated.digest)
        for attempt in range(ATTEMPTS):
            begun = None
            if checked:
                raises = raise_cliff and attempt < ATTEMPTS - 1
                begun = partial(
                    checked.begin, source=made_from, output=target, sheet=sheet, raises=raises
                )
            try:
                losses = _write(
                    plan,
                    target,
                    threads=n_threads,
                    force=force,
                    begun=begun,
                    check=checked.end if checked else None,
                    journal=journal,
                )
                break
            except CliffFoundError as cliff:
                types = raised_types(cliff.sheet, plan, steps=2 * attempt)
                raised += raising_lines(cliff.sheet, plan, types)
                plan = with_types(plan, types)
                checked = context.with_resource(new_check())
                journal = new_journal()
        if calibrated:
            remove_work(calibrated)
        seconds = time.monotonic() - start
    self_check = "" if dry_run else "left out, as --no-check asks"
    if checked is not None and not no_check:
        self_check = checked.line
    elif lora_only and not dry_run:
        self_check = "left out: an adapter does not run without its base"
    said = calibrated.line if calibrated else ""
    for line in settled.lines if settled else ():
        print(line)
    rows = list(closing_rows(plan, target, seconds, self_check, calibration=said))
    rows += [("target", settled.line)] if settled else []
    _print_pairs([*rows, *quality_rows(checked, sheet, raised)])
    for detail in checked.details if checked and check_details else ():
        print(detail)
    sys.stdout.flush()
    found = checked.problems if checked else ()
    for note in (*plan.notes, *loss_notes(plan, losses), *found):
        print(f"note: {note}", file=sys.stderr)


def _deciding_options(context: typer.Context) -> tuple[str, list[Path]]:
    """The options that decide bytes, as text, and the files among them."""
    given = {name: value for name, value in context.params.items() if name not in DECIDE_NO_BYTE}
    values = [v for value in given.values() for v in (value if _is_list(value) else [value])]
    return repr(sorted(given.items())), [value for value in values if isinstance(value, Path)]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _write(
    plan: "Plan",
    target: Path,
    *,
    threads: int,
    force: bool,
    begun: "Callable[[Path], None] | None",
    check: "Callable[[Path], Mapping[str, MetadataValue]] | None",
    journal: "Journal",
) -> "Losses":
    """Convert, with a progress bar on a terminal. Of what is kept of a stopped run, say so."""
    from contextlib import closing

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from gguf_tools.conversion import convert as write_file
    from gguf_tools.errors import printable
    from gguf_tools.losses import Losses

    def note(text: str) -> None:
        if text:
            console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    losses = Losses()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(tensor.nbytes for tensor in plan.tensors)
    steps = write_file(
        plan,
        target,
        threads=threads,
        force=force,
        begun=begun,
        check=check,
        journal=journal,
    )
    try:
        with (
            undisturbed_ending(),
            Progress(
                *columns, console=console, transient=True, disable=not console.is_terminal
            ) as bar,
            closing(steps),
        ):
            task = bar.add_task("", total=total)
            for number, step in enumerate(steps):
                if number == 0:
                    note(journal.remark)
                name = f"{printable(step.tensor.name, 40)} {step.tensor.quant.name}"
                bar.update(task, advance=step.n_bytes, description=f"{name:<32}")
                if step.loss is not None:
                    losses.add(step.tensor.name, step.loss)
                if step.finished and step.index == len(plan.tensors) - 1 and check is not None:
                    bar.update(task, description=f"{'self-check':<32}")
    except (KeyboardInterrupt, SystemExit):
        note(journal.kept)
        raise
    return losses


def _print_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """A table of labels and texts."""
    pairs = list(rows)
    width = max(len(label) for label, _ in pairs)
    for label, text in pairs:
        print(f"{label:<{width}}  {text}")
