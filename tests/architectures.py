"""Tiny checkpoints of every architecture, and the logits transformers computes with them.

They lie in data/architectures, with the scripts that made them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from runtime.model import Model

FOLDER = Path(__file__).parent / "data" / "architectures"
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/config.json")))


@dataclass(frozen=True)
class Prompt:
    """Ids, and the logits after some of them."""

    ids: tuple[int, ...]
    positions: np.ndarray  # (n_positions,)
    logits: np.ndarray  # (n_positions, n_vocab)
    n_ctx: int  # the context it was answered with


def prompts(name: str) -> Iterator[Prompt]:
    """Those of a checkpoint, the shortest first."""
    with np.load(FOLDER / name / "answers.npz") as answers:
        lengths = sorted(int(key.split("_")[1]) for key in answers if key.startswith("ids_"))
        for n in lengths:
            yield Prompt(
                ids=tuple(answers[f"ids_{n}"].tolist()),
                positions=answers[f"positions_{n}"],
                logits=answers[f"logits_{n}"],
                n_ctx=int(answers[f"n_ctx_{n}"]),
            )


def converted(name: str, target: Path) -> Path:
    """The checkpoint as an F32 file in the folder `target`."""
    path = target / f"{name}.gguf"
    for _ in convert(plan_conversion(FOLDER / name, find_file_type("F32")), path, threads=1):
        pass
    return path


def disagreement(
    path: Path, prompt: Prompt, backend: str, batches: tuple[int, ...] = (), **options: object
) -> float:
    """The worst position's largest difference, relative to its largest logit.

    The ids are read in batches of these sizes, and what is left in a last one.
    """
    ids, parts = list(prompt.ids), []
    options = {"n_ctx": prompt.n_ctx, "threads": 1, **options}
    with GGUFFile(path) as file, Model.load(file, backend=backend, **options) as model:
        for size in (*batches, len(ids) - sum(batches)):
            parts.append(model.forward(ids[:size], all_logits=True))
            del ids[:size]
    got = np.concatenate(parts)[prompt.positions]
    expected = prompt.logits[:, : got.shape[1]]  # the file may leave out rows that are padding
    differences = np.abs(got - expected).max(1) / np.abs(expected).max(1)
    return float(differences.max()) if np.isfinite(got).all() else float("inf")
