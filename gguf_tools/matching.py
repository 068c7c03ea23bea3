"""A checkpoint held against its architecture: which tensor of the file is made from which.

Each tensor that config.json promises must be there in its shape, and nothing else. No weight is
read, but for a head that may be a copy of the embedding.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from gguf_tools import views
from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.transforms import Transform
from gguf_tools.checkpoint import CONFIG_NAME, Checkpoint, listing
from gguf_tools.errors import CheckpointError, MissingTensorError, printable
from gguf_tools.safetensors_file import READABLE, LazyTensor, unreadable

COMPARED_ROWS = 1024
BLOCK_BYTES = ("U8",)  # the dtype of blocks and scales


@dataclass(frozen=True)
class Matched:
    """A tensor of the output file and where its weights come from."""

    name: str
    source: LazyTensor
    transform: Transform | None = None


@dataclass(frozen=True)
class MatchedModel:
    """A checkpoint that is what its config.json says."""

    checkpoint: Checkpoint
    architecture: Architecture
    facts: ModelFacts
    tensors: tuple[Matched, ...]
    notes: tuple[str, ...]  # for the user


def match_tensors(checkpoint: Checkpoint, architecture: Architecture) -> MatchedModel:
    """Find every tensor that the architecture asks for; all that is wrong is one error."""
    config = HFConfig(checkpoint.config, printable(checkpoint.folder / CONFIG_NAME, limit=1000))
    facts = architecture.read_facts(config)
    present, skipped = _present(checkpoint, architecture)
    if architecture.predictors:
        present, ahead = _without_predictors(present, facts.n_layers)
        skipped += ahead
    facts = replace(facts, switches=facts.switches | _layout(present, architecture))
    wanted, head = _expected(present, architecture, facts)
    named = dict.fromkeys(source for want in wanted for source in want.sources)
    missing = [source for want in wanted for source in want.sources if source not in present]
    unexpected = [name for name in present if name not in named]
    if head.dropped_head:
        unexpected.remove(architecture.head.source)
    misshapen = [
        f"{printable(source)} is {present[source].shape} where config.json gives {shape}"
        for want in wanted
        for source, shape in zip(want.sources, want.shapes(facts), strict=True)
        if source in present and present[source].shape != shape
    ]
    problems = [
        f"{kind}: {listing(map(printable, names))}"
        for kind, names in (("missing", dict.fromkeys(missing)), ("unexpected", unexpected))
        if names
    ]
    if misshapen:
        problems.append(f"wrong shape: {listing(misshapen)}")
    if problems:
        raise MissingTensorError(
            f"{printable(checkpoint.folder, limit=1000)}: the tensors do not fit config.json "
            f"({architecture.name}, {facts.n_layers} layers): {'; '.join(problems)}"
        )
    blocks = {source for want in wanted if want.rule.mxfp4 for source in want.sources}
    odd = [
        unreadable(s, present[s].dtype)
        for s in named
        if present[s].dtype not in (BLOCK_BYTES if s in blocks else READABLE)
    ]
    if odd:
        more = f" (and {len(odd) - 1:,} more like it)" if len(odd) > 1 else ""
        raise CheckpointError(f"{printable(checkpoint.folder, limit=1000)}: {odd[0]}{more}")
    tensors = [want.match(present, facts) for want in wanted]
    for generated in architecture.generated:
        values = generated.make(facts)
        if values is not None:
            tensors.append(Matched(generated.name, _constant(generated.name, values)))
    notes = (*facts.notes, *head.texts, *skipped)
    return MatchedModel(checkpoint, architecture, facts, tuple(tensors), notes)


@dataclass(frozen=True)
class _HeadNotes:
    texts: tuple[str, ...] = ()
    dropped_head: bool = False


@dataclass(frozen=True)
class _Wanted:
    """A tensor of the file: its rule, and the names of what it is made from."""

    rule: TensorRule
    name: str
    sources: tuple[str, ...]

    def shapes(self, facts: ModelFacts) -> list[tuple[int, ...]]:
        """What config.json gives for each of the sources."""
        shape = self.rule.source_shape(facts)
        if self.rule.mxfp4:
            scales = (*shape[:-1], -(-shape[-1] // 32))
            return [(*scales, 16), scales]
        return [shape] * len(self.sources)

    def match(self, present: Mapping[str, LazyTensor], facts: ModelFacts) -> Matched:
        rule = self.rule
        tensor = present[self.sources[0]]
        if rule.mxfp4:
            return Matched(self.name, self._blocks(present, facts))
        if "{expert}" in rule.source:
            tensor = views.stacked([present[source] for source in self.sources], self.name)
        if rule.every is not None:
            tensor = views.every(tensor, *rule.every)
        if rule.cut is not None:
            tensor = views.cut(tensor, *rule.cut(facts))
        if rule.transposed:
            tensor = views.transposed(tensor)
        if rule.part is not None:
            tensor = views.part(tensor, *rule.part)
        if rule.regrouped is not None:
            tensor = views.regrouped(tensor, *rule.regrouped(facts))
        return Matched(self.name, tensor, rule.transform(facts) if rule.transform else None)

    def _blocks(self, present: Mapping[str, LazyTensor], facts: ModelFacts) -> LazyTensor:
        blocks, scales = (present[source] for source in self.sources)
        index, count = self.rule.part or (0, 1)
        tensor = views.mxfp4(blocks, scales, index=index, count=count)
        width = facts.sizes[self.rule.shape[-1]]
        if tensor.row_length != width:
            raise CheckpointError(
                f"tensor {printable(blocks.name)}: expected rows of {width} weights, which are not "
                "whole blocks of 32"
            )
        return tensor


def _present(
    checkpoint: Checkpoint, architecture: Architecture
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The checkpoint's tensors under the names that the rules use, and a note of those skipped."""
    present: dict[str, LazyTensor] = {}
    skipped: list[LazyTensor] = []
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(architecture.ignored):
            continue
        if architecture.skipped and name.startswith(architecture.skipped):
            skipped.append(tensor)
            continue
        name = architecture.rename(name)
        if name in present:
            raise CheckpointError(
                f"{printable(checkpoint.folder, limit=1000)}: tensor {printable(name)} is there "
                "twice, under two names"
            )
        present[name] = tensor
    if not skipped:
        return present, ()
    n_parameters = sum(tensor.n_elements for tensor in skipped)
    beginnings = sorted({tensor.name.split(".")[0] for tensor in skipped})
    note = (
        f"{len(skipped):,} tensors ({n_parameters:,} parameters) are left out: this file holds the "
        f"text model only, without {', '.join(map(printable, beginnings))}"
    )
    return present, (note,)


def _without_predictors(
    present: Mapping[str, LazyTensor], n_layers: int
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The tensors of the model's own layers, and a note if there were others."""
    numbers = {name: re.match(r"model\.layers\.(\d{1,9})\.", name) for name in present}
    own = {
        name: tensor
        for name, tensor in present.items()
        if (number := numbers[name]) is None or int(number[1]) < n_layers
    }
    n_left_out = len(present) - len(own)
    if not n_left_out:
        return own, ()
    note = f"{n_left_out:,} tensors of layers that predict further tokens are left out"
    return own, (note,)


def _layout(present: Iterable[str], architecture: Architecture) -> set[str]:
    """The switch of the layout that the checkpoint has."""
    for switch, ending in architecture.layouts:
        if any(name.endswith(ending) for name in present):
            return {switch}
    return set()


def _expected(
    present: Mapping[str, LazyTensor], architecture: Architecture, facts: ModelFacts
) -> tuple[list[_Wanted], _HeadNotes]:
    """Everything that the file will hold, and from which tensors of the checkpoint."""
    heads, notes = _embedding_and_head(present, architecture, facts)
    wanted = [_Wanted(rule, rule.name, (source,)) for source, rule in heads.items()]
    for rule in architecture.tensors:
        if rule.when and rule.when not in facts.switches:
            continue
        layers: Sequence[int] = range(facts.n_layers) if "{layer}" in rule.source else range(1)
        if rule.layers is not None:
            layers = rule.layers(facts)
        for layer in layers:
            source, name = (
                text.replace("{layer}", str(layer)) for text in (rule.source, rule.name)
            )
            experts = range(facts.sizes[rule.shape[0]] if "{expert}" in source else 1)
            sources = tuple(source.replace("{expert}", str(expert)) for expert in experts)
            if rule.mxfp4:
                sources = (source, source.removesuffix("_blocks") + "_scales")
            wanted.append(_Wanted(rule, name, sources))
    return wanted, notes


def _embedding_and_head(
    present: Mapping[str, LazyTensor], architecture: Architecture, facts: ModelFacts
) -> tuple[dict[str, TensorRule], _HeadNotes]:
    """Tied weights may be stored under either name, or twice; a head of its own under its own."""
    embedding, head = architecture.embedding, architecture.head
    stored_embedding = present.get(embedding.source)
    stored_head = present.get(head.source)
    separate = {embedding.source: embedding, head.source: head}
    if facts.tied and stored_head is not None and stored_embedding is None:
        rule = TensorRule(head.source, embedding.name, embedding.shape, embedding.transform)
        return {head.source: rule}, _HeadNotes()
    if stored_head is None and facts.tied is not False:
        if facts.tied:
            return {embedding.source: embedding}, _HeadNotes()
        note = (
            f"there is no {head.source} and config.json does not say tie_word_embeddings: "
            "the embedding is taken as the head"
        )
        return {embedding.source: embedding}, _HeadNotes((note,))
    if facts.tied and stored_embedding is not None and stored_head is not None:
        if _are_equal(stored_embedding, stored_head):
            note = (
                f"{head.source} is left out: it is a copy of {embedding.source}, and config.json "
                "says that they are tied"
            )
            return {embedding.source: embedding}, _HeadNotes((note,), dropped_head=True)
        note = (
            f"config.json says that {head.source} and {embedding.source} are tied, but they "
            "differ: both are written"
        )
        return separate, _HeadNotes((note,))
    return separate, _HeadNotes()


def _are_equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors hold the same bytes; stops at the first band that differs."""
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype not in READABLE:
        return False
    for row in range(0, one.n_rows, COMPARED_ROWS):
        end = min(row + COMPARED_ROWS, one.n_rows)
        left, right = (tensor.load(row, end).view(np.uint32) for tensor in (one, other))
        if not np.array_equal(left, right):
            return False
    return True


def _constant(name: str, values: npt.NDArray[np.float32]) -> LazyTensor:
    rows = values.reshape(prod(values.shape[:-1]), values.shape[-1])
    return LazyTensor(name, values.shape, "F32", lambda first, last: rows[first:last])
