"""What the options of `convert` name: types and texts that are read, models that are opened."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf_tools.calibration import SCALING, Settings, read_settings
from gguf_tools.conversion import plan_conversion, protect_input
from gguf_tools.convert_options import ContradictionError, Options
from gguf_tools.download_bar import find_with_bar
from gguf_tools.file_types import FileType
from gguf_tools.imatrix import ImportanceMatrix, read_importance_matrix
from gguf_tools.lora import open_adapter
from gguf_tools.lora_file import plan_adapter
from gguf_tools.lora_merging import Scaled, read_scaled
from gguf_tools.models_by_name import find_adapter, find_checkpoint, find_config
from gguf_tools.naming import output_name
from gguf_tools.overrides import Overrides, parse_overrides
from gguf_tools.plan import Plan
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.requantising import is_gguf, plan_requantisation, source_name
from gguf_tools.self_check import Source
from gguf_tools.target_options import Target, read_target
from gguf_tools.target_size import BEFORE
from gguf_tools.vocab.trial import RunningTrial

ADAPTERS_TYPE = "F32"  # of an adapter's file, where none is asked for


@dataclass(frozen=True)
class Wishes:
    """The types that the tensors are to have, and how they are found and rounded."""

    file_type: FileType
    overrides: Overrides
    target: Target | None
    settings: Settings | None  # of calibration
    matrix: ImportanceMatrix | None

    @property
    def name(self) -> str:
        """For the end of the output's name."""
        return self.target.name if self.target else self.file_type.name


def read_wishes(options: Options) -> Wishes:
    """GGUFError says which option cannot be, ContradictionError which two of them."""
    target = read_target(options.target_size, options.target_bpw, options.target_text)
    name = options.file_type
    if target:
        name = BEFORE
    elif options.lora_only and not options.type_is_given:
        name = ADAPTERS_TYPE
    file_type = find_file_type(name)
    overrides = parse_overrides(
        tensor_types=options.tensor_type,
        output=options.output_type,
        embedding=options.embedding_type,
        pure=options.pure,
        keep=options.keep,
    )
    settings = read_settings(options.calibrate, options.method, options.calibrate_windows)
    if options.raise_cliff and settings and settings.method in SCALING:
        raise ContradictionError(
            f"--raise-cliff and --method {settings.method} exclude each other: where channels are "
            "scaled, what a tensor costs cannot be measured alone; choose --method gptq or imatrix"
        )
    matrix = None if options.imatrix is None else read_importance_matrix(options.imatrix)
    return Wishes(file_type, overrides, target, settings, matrix)


def repeating(options: Options, settings: Settings | None, threads: int) -> list[str]:
    """The options that decide bytes, but for those on types and their importance: for the command
    that makes the file again.
    """
    words = [word for text in options.lora for word in ("--lora", text)]
    words += ["--allow-requantize"] if options.allow_requantize else []
    if settings and options.calibrate is not None:
        words += ["--calibrate", options.calibrate, "--method", settings.method]
        words += ["--calibrate-windows", str(settings.windows)]
        words += ["--threads", str(threads)]  # sums of another order differ in their last bits
    if options.quality is not None or options.no_check:  # whether there is a quality sheet
        words.append("--quality" if options.quality else "--no-quality")
    return words


@dataclass(frozen=True)
class Inputs:
    """Where the weights come from. Models that are named by the hub's names are here by now."""

    options: Options
    model: Path  # a checkpoint's or an adapter's folder, or a GGUF file
    base: Path | None  # the model that an adapter is for
    adapters: tuple[Scaled, ...]  # to be merged

    @cached_property
    def file(self) -> GGUFFile | None:
        """The model, where it is a GGUF file; it stays open."""
        return None if self.options.lora_only or not is_gguf(self.model) else GGUFFile(self.model)

    @property
    def merged(self) -> list[Path]:
        return [scaled.adapter.folder for scaled in self.adapters]

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files and folders that weights come from."""
        return (*(self.file.paths if self.file else (self.model,)), *self.merged)

    @property
    def read(self) -> tuple[Path, ...]:
        """All files and folders that bytes of the output come from."""
        others = (self.options.imatrix, self.base)
        return (*self.weights, *(path for path in others if path is not None))

    def plan(
        self,
        file_type: FileType,
        overrides: Overrides,
        wishes: Wishes,
        trial: RunningTrial | None,
    ) -> Plan:
        """What a file of these types would hold; `trial` is of the checkpoint's tokenizer."""
        matrix, calibrates = wishes.matrix, wishes.settings is not None
        if self.options.lora_only:
            return plan_adapter(open_adapter(self.model), file_type, self.base)
        if self.file:
            return plan_requantisation(
                self.file,
                file_type,
                allow_requantize=self.options.allow_requantize,
                overrides=overrides,
                matrix=matrix,
                calibrates=calibrates,
            )
        return plan_conversion(
            self.model,
            file_type,
            self.adapters,
            overrides=overrides,
            matrix=matrix,
            calibrates=calibrates,
            trial=trial,
        )

    def source(self, plan: Plan | None = None) -> Source:
        """The same for the processes that run the model, with what the plan knows of it."""
        return Source(
            self.model,
            is_checkpoint=self.file is None,
            adapters=tuple(self.options.lora),
            encodings=plan.encodings if plan else None,
        )

    def output(self, end: str) -> Path:
        """The file to write: as the user calls it, or named after the model, with this end."""
        if self.options.output is not None:
            return self.options.output
        model = source_name(self.model) if self.file else self.model
        return Path(output_name(model, end, adapters=self.merged))

    def protect(self, output: Path) -> None:
        """OutputError if writing there would destroy what is read."""
        for path in (*self.read, self.model):
            protect_input(path, output)


def find_inputs(options: Options) -> Inputs:
    """What is named by a name of the hub's is fetched first."""
    find_source = find_adapter if options.lora_only else find_checkpoint
    model = find_with_bar(find_source, options.model_dir)
    base = None if options.base is None else find_with_bar(find_config, options.base)
    adapters = tuple(
        read_scaled(text, lambda name: find_with_bar(find_adapter, name)) for text in options.lora
    )
    if adapters and is_gguf(model):
        raise ContradictionError("a GGUF file takes no --lora: merge it into the checkpoint")
    return Inputs(options, model, base, adapters)
