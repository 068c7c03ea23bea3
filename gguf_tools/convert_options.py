"""What `convert` is asked for, and what of it excludes each other. Nothing heavy is imported."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

# Options that leave the bytes of the output as they are; any other starts a conversion over.
DECIDE_NO_BYTE = (
    *("model_dir", "type_is_given", "output", "threads", "force", "no_resume", "strict"),
    *("dry_run", "no_check", "check_details"),
)
# Of each pair one can be given; the names are those of `_given`.
EXCLUDE_EACH_OTHER = (
    ("--lora-only", "a target"),
    ("--pure", "a target"),
    ("--type", "a target"),
    ("--calibrate", "--lora-only"),
    ("--calibrate", "--imatrix"),
    ("--raise-cliff", "--lora-only"),
    ("--raise-cliff", "--no-quality"),
    ("--raise-cliff", "--target-size and --target-bpw"),
)


@dataclass(frozen=True)
class Options:
    """The command line, by the names of its options."""

    model_dir: Path
    file_type: str
    type_is_given: bool
    output: Path | None
    threads: int | None
    force: bool
    no_resume: bool
    strict: bool
    no_check: bool
    quality: bool | None
    raise_cliff: bool
    check_details: bool
    imatrix: Path | None
    tensor_type: Sequence[str]
    output_type: str | None
    embedding_type: str | None
    pure: bool
    keep: Sequence[str]
    dry_run: bool
    lora: Sequence[str]
    lora_only: bool
    base: Path | None
    allow_requantize: bool
    calibrate: str | None
    method: str | None
    calibrate_windows: int | None
    target_size: str | None
    target_bpw: float | None
    target_text: str | None

    @property
    def has_target(self) -> bool:
        return self.target_size is not None or self.target_bpw is not None

    @property
    def has_types_by_name(self) -> bool:
        by_name = (self.output_type, self.embedding_type)
        return bool(self.tensor_type or self.keep or self.pure) or by_name != (None, None)

    @property
    def deciding(self) -> str:
        """All that decides bytes, as text."""
        names = sorted(field.name for field in fields(self) if field.name not in DECIDE_NO_BYTE)
        return repr([(name, getattr(self, name)) for name in names])


class ContradictionError(Exception):
    """Options that do not go together: a wrong call of the command."""


def refuse_contradictions(options: Options) -> None:
    """ContradictionError where the options alone say that they cannot be meant."""
    if options.lora if options.lora_only else options.base is not None:
        raise ContradictionError("--base goes with --lora-only, and --lora does not")
    given = _given(options)
    for one, other in EXCLUDE_EACH_OTHER:
        if given[one] and given[other]:
            raise ContradictionError(f"{one} and {other} exclude each other")
    if options.lora_only and (options.imatrix is not None or options.has_types_by_name):
        raise ContradictionError("--lora-only takes neither --imatrix nor types by name")


def _given(options: Options) -> dict[str, bool]:
    return {
        "--type": options.type_is_given,
        "--pure": options.pure,
        "--imatrix": options.imatrix is not None,
        "--calibrate": options.calibrate is not None,
        "--lora-only": options.lora_only,
        "--raise-cliff": options.raise_cliff,
        "--no-quality": options.quality is False,
        "a target": options.has_target,
        "--target-size and --target-bpw": options.has_target,
    }
