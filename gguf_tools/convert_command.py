"""`convert`: its options. What it does is a job (gguf_tools/convert_job.py).

Everything heavy is imported inside: `--help` answers at once.
"""

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from gguf_tools.convert_options import ContradictionError, Options, refuse_contradictions
from gguf_tools.shared_options import Force, Threads


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
            "Q4_0, IQ4_XS, IQ4_NL, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K or Q2_K_S (with --imatrix "
            "or --calibrate); upper or lower case.",
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
    threads: Threads = None,
    force: Force = False,
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
            "and convert again (twice at most), calibrated again, too, with --calibrate.",
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
    source = context.get_parameter_source("file_type")
    options = Options(
        model_dir=model_dir,
        file_type=file_type,
        type_is_given=source is not None and source.name != "DEFAULT",
        output=output,
        threads=threads,
        force=force,
        no_resume=no_resume,
        strict=strict,
        no_check=no_check,
        quality=quality,
        raise_cliff=raise_cliff,
        check_details=check_details,
        imatrix=imatrix,
        tensor_type=tensor_type or (),
        output_type=output_type,
        embedding_type=embedding_type,
        pure=pure,
        keep=keep or (),
        dry_run=dry_run,
        lora=lora or (),
        lora_only=lora_only,
        base=base,
        allow_requantize=allow_requantize,
        calibrate=calibrate,
        method=method,
        calibrate_windows=calibrate_windows,
        target_size=target_size,
        target_bpw=target_bpw,
        target_text=target_text,
    )
    # Hundreds of thousands of tokens are read and kept: looking for garbage among them takes a
    # tenth of a second. It is looked for again when all is planned.
    gc.disable()
    try:
        refuse_contradictions(options)
        _run(options)
    except ContradictionError as error:
        raise typer.BadParameter(str(error)) from error
    finally:
        gc.enable()


def _run(options: Options) -> None:
    """Convert, and tell of it."""
    from gguf_tools.convert_processes import Processes

    with Processes(options) as processes:  # which begin here: before all else is imported
        from gguf_tools.convert_job import Job

        told = Job(options, processes).run()
    for line in told.lines:
        print(line)
    sys.stdout.flush()
    for note in told.notes:
        print(f"note: {note}", file=sys.stderr)
