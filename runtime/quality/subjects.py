"""What is evaluated: a GGUF file, or as a reference the checkpoint that files were made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.conversion import plan_conversion
from gguf_tools.cores import default_threads
from gguf_tools.describe import bits_per_weight
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from runtime.layerwise import LayerwiseModel
from runtime.model import Model
from runtime.quality.evaluation import CheckpointScorer, Ids, ModelScorer, Scorer
from runtime.sources import PlannedWeights, Source
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is ready to be evaluated."""

    name: str
    n_bytes: int  # of the file, or of a checkpoint's weights
    bits_per_weight: float
    tokenizer: Tokenizer
    model: Model | LayerwiseModel
    source: Source

    def scorer(self, windows: Ids, bos: int | None) -> Scorer:
        """What reads these windows, each once and in this order."""
        if isinstance(self.model, LayerwiseModel):
            return CheckpointScorer(self.model, windows, bos)
        return ModelScorer(self.model)


@contextmanager
def open_file(path: Path, *, n_ctx: int, threads: int | None) -> Iterator[Subject]:
    """A GGUF file."""
    with GGUFFile(path) as file:
        tokenizer = Tokenizer(file.metadata)
        with Model.load(file, n_ctx=n_ctx, threads=threads) as model:
            bits = bits_per_weight(file) or 0.0
            yield Subject(path.name, file.file_size, bits, tokenizer, model, file)


@contextmanager
def open_checkpoint(folder: Path, *, n_ctx: int, threads: int | None) -> Iterator[Subject]:
    """The weights of a checkpoint as a conversion would have them, before any is quantised."""
    plan = plan_conversion(folder, find_file_type("F32"))
    source = PlannedWeights(folder, plan.tensors, plan.metadata)
    tokenizer = Tokenizer(source.metadata)
    n_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
    n_weights = sum(tensor.n_elements for tensor in source.tensors.values())
    with LayerwiseModel(source, n_tokens=n_ctx, threads=threads or default_threads()) as model:
        yield Subject(folder.name, n_bytes, 8 * n_bytes / n_weights, tokenizer, model, source)


@dataclass(frozen=True, eq=False)
class Layered:
    """A model that is run layer by layer, and what it is made of."""

    name: str
    paths: tuple[Path, ...]  # its files, or the checkpoint's folder
    source: Source
    tokenizer: Tokenizer
    model: LayerwiseModel


@contextmanager
def open_layered(
    path: Path,
    *,
    n_ctx: int,
    threads: int | None,
    on_compile: Callable[[int, int], None] | None = None,
) -> Iterator[Layered]:
    """A GGUF file, or a checkpoint as a conversion would have it before anything is quantised."""
    with ExitStack() as stack:
        source: Source
        if path.is_dir():
            plan = plan_conversion(path, find_file_type("F32"))
            source = PlannedWeights(path, plan.tensors, plan.metadata)
            paths: tuple[Path, ...] = (path,)
        else:
            source = file = stack.enter_context(GGUFFile(path))
            paths = tuple(file.paths)
        tokenizer = Tokenizer(source.metadata)
        model = LayerwiseModel(
            source,
            n_tokens=n_ctx,
            threads=threads or default_threads(),
            on_compile=on_compile,
        )
        yield Layered(path.name, paths, source, tokenizer, stack.enter_context(model))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """What files are called: by their names, with folders where these do not tell them apart."""
    names: list[str] = []
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
