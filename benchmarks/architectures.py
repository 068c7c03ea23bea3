"""Every architecture: does it convert, does it run, and how near is it to transformers.

    python benchmarks/architectures.py [NAME...] [--cases]

Converts the tiny checkpoints of tests/data/architectures to F32, reads their prompts on both
backends and prints a table for the README: the largest difference from transformers' logits,
relative to the largest logit, over all prompts of all checkpoints of the architecture. --cases
prints a row for each checkpoint instead.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gguf_tools.errors import GGUFError  # noqa: E402
from gguf_tools.reader import GGUFFile  # noqa: E402
from tests.architectures import FOLDER, NAMES, converted, disagreement, prompts  # noqa: E402

# Real models that were run, and what was seen: by name of the architecture in the file.
REAL_MODELS = {
    "llama": "SmolLM2-135M",
    "gemma3": "Gemma-3-270M",
    "qwen2": "Qwen2.5-0.5B",
}
BACKENDS = ("reference", "cpu")


@dataclass(frozen=True)
class Outcome:
    """What became of one checkpoint."""

    case: str
    architecture: str  # general.architecture, or model_type where it does not convert
    classes: tuple[str, ...]
    converts: bool
    differences: tuple[float | None, ...]  # of each backend; nothing where it does not run
    why: str = ""


def measure(name: str, folder: Path) -> Outcome:
    config = json.loads((FOLDER / name / "config.json").read_text())
    classes = tuple(config["architectures"])
    nothing = (None,) * len(BACKENDS)
    try:
        path = converted(name, folder)
    except GGUFError as error:
        return Outcome(name, config["model_type"], classes, False, nothing, str(error))
    with GGUFFile(path) as file:
        architecture = str(file.metadata["general.architecture"])
    try:
        differences = tuple(
            max(disagreement(path, prompt, backend) for prompt in prompts(name))
            for backend in BACKENDS
        )
    except GGUFError as error:
        return Outcome(name, architecture, classes, True, nothing, str(error))
    return Outcome(name, architecture, classes, True, differences)


def by_architecture(outcomes: list[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    for architecture in sorted({outcome.architecture for outcome in outcomes}):
        yield architecture, [each for each in outcomes if each.architecture == architecture]


def worst(outcomes: list[Outcome], backend: int) -> str:
    values = [outcome.differences[backend] for outcome in outcomes]
    return "-" if None in values else f"{max(value for value in values if value is not None):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="checkpoints whose names begin so; default: all")
    parser.add_argument("--cases", action="store_true", help="a row for each checkpoint")
    options = parser.parse_args()
    names = [name for name in NAMES if name.startswith(tuple(options.names) or "")]
    if not names:
        parser.error(f"no checkpoint's name begins so; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [measure(name, Path(folder)) for name in names]
    if options.cases:
        print("| checkpoint | reference | cpu |\n|---|---|---|")
        for outcome in outcomes:
            print(f"| {outcome.case} | {worst([outcome], 0)} | {worst([outcome], 1)} |")
    else:
        print("| architecture | classes | checkpoints | converts | runs | reference | CPU | real |")
        print("|---|---|---|---|---|---|---|---|")
        for architecture, group in by_architecture(outcomes):
            print("| " + " | ".join(row(architecture, group)) + " |")
    for outcome in outcomes:
        if outcome.why:
            print(f"\n{outcome.case}: {outcome.why}")


def row(architecture: str, group: list[Outcome]) -> tuple[str, ...]:
    classes = dict.fromkeys(name for outcome in group for name in outcome.classes)
    runs = all(None not in outcome.differences for outcome in group)
    return (
        f"`{architecture}`",
        ", ".join(name.removesuffix("ForCausalLM") for name in classes),
        str(len(group)),
        "yes" if all(outcome.converts for outcome in group) else "no",
        "yes" if runs else "no",
        worst(group, 0),
        worst(group, 1),
        REAL_MODELS.get(architecture, ""),
    )


if __name__ == "__main__":
    main()
