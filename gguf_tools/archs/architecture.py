"""What an architecture's file says: facts, tensors, metadata."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.rope import Rope
from gguf_tools.archs.transforms import Transform

Fact = int | float | bool | str | tuple[bool, ...]  # a tuple becomes an array


@dataclass(frozen=True)
class ModelFacts:
    """The numbers that config.json gives, checked. Fields that a model lacks are None."""

    n_layers: int
    dim: int
    ffn_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    norm_epsilon: float
    rope: Rope
    tied: bool | None = None  # tie_word_embeddings, if config.json says it
    key_length: int | None = None  # head_dim, if config.json gives one
    sliding_window: int | None = None
    window_pattern: tuple[bool, ...] | None = None  # which layers have it; None: GGUF knows
    switches: frozenset[str] = field(default_factory=frozenset)  # what is there: "attention_bias"
    n_experts: int | None = None
    more_sizes: Mapping[str, int] = field(default_factory=dict)  # for the shapes of tensor rules
    more: Mapping[str, Fact | None] = field(default_factory=dict)  # for metadata rules
    notes: tuple[str, ...] = ()  # for the user

    @property
    def sizes(self) -> dict[str, int]:
        """What the shapes of tensor rules are made of."""
        return {
            "vocab": self.n_vocab,
            "dim": self.dim,
            "ffn": self.ffn_dim,
            "q": self.n_heads * self.head_dim,
            "kv": self.n_kv_heads * self.head_dim,
            "head": self.head_dim,
            "heads": self.n_heads,
            "experts": self.n_experts or 0,
            "one": 1,
            **self.more_sizes,
        }

    def value(self, field: str) -> Fact | None:
        """A fact by its name, for metadata."""
        if field in self.more:
            return self.more[field]
        value: Fact | None = getattr(self, field)
        return value


@dataclass(frozen=True)
class TensorRule:
    """One tensor, or with {layer} in its names one of every layer.

    With {expert} in `source`, as many tensors are stacked as the first size of the shape says.
    Several rules may take parts of the same source.
    """

    source: str  # its name in the checkpoint
    name: str  # its name in the file
    shape: tuple[str, ...]  # in the file: keys of ModelFacts.sizes, outermost first
    transform: Callable[[ModelFacts], Transform] | None = None
    when: str = ""  # the switch that must be on
    transposed: bool = False  # the checkpoint has the last two axes the other way round
    part: tuple[int, int] | None = None  # (index, count): an equal part of the source's rows
    regrouped: Callable[[ModelFacts], tuple[int, int]] | None = None  # views.regrouped
    cut: Callable[[ModelFacts], tuple[int, int, int, int]] | None = None  # views.cut
    layers: Callable[[ModelFacts], Sequence[int]] | None = None  # those that have it; None: all
    # The source are blocks of MXFP4, whose name ends in "_blocks", beside "_scales"; `part` is then
    # every count-th row.
    mxfp4: bool = False
    every: tuple[int, int] | None = None  # (index, count): every count-th element of source rows

    def source_shape(self, facts: ModelFacts) -> tuple[int, ...]:
        """The shape that the tensor (one expert's, where they are stacked) has in a checkpoint."""
        shape = [facts.sizes[size] for size in self.shape]
        if "{expert}" in self.source:
            shape = shape[1:]
        if self.part is not None:
            shape[-2] *= self.part[1]
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        if self.cut is not None:
            n_groups, height, *_ = self.cut(facts)
            shape = [n_groups * height, shape[-1]]
        if self.every is not None:
            shape[-1] *= self.every[1]
        return tuple(shape)


@dataclass(frozen=True)
class GeneratedTensor:
    """A tensor that is computed from the configuration, in models that need it."""

    name: str
    make: Callable[[ModelFacts], npt.NDArray[np.float32] | None]


@dataclass(frozen=True)
class MetadataRule:
    """A field of ModelFacts (or a key of its `more`) as metadata ARCHITECTURE.KEY.

    Written when it is not None.
    """

    key: str
    type: str  # of the elements where the fact is a tuple
    field: str


@dataclass(frozen=True)
class Architecture:
    """Everything that conversion knows about a kind of model."""

    name: str  # general.architecture
    classes: tuple[str, ...]  # in config.json's `architectures`
    model_types: tuple[str, ...]
    read_facts: Callable[[HFConfig], ModelFacts]
    embedding: TensorRule
    head: TensorRule
    tensors: tuple[TensorRule, ...]  # all others
    generated: tuple[GeneratedTensor, ...]
    metadata: tuple[MetadataRule, ...]
    ignored: tuple[str, ...]  # endings of names that are buffers, not weights
    renamed: tuple[tuple[str, str], ...] = ()  # beginnings of names, and what the rules call them
    skipped: tuple[str, ...] = ()  # beginnings of names that the file has no place for; said
    # Ways in which checkpoints name the same weights: a switch, and the ending of a name that shows
    # it. The first that is there is switched on.
    layouts: tuple[tuple[str, str], ...] = ()
    predictors: bool = False  # checkpoints have further layers that guess ahead: left out, said

    def rename(self, name: str) -> str:
        """A checkpoint's name as the rules have it."""
        for beginning, instead in self.renamed:
            if name.startswith(beginning):
                return instead + name.removeprefix(beginning)
        return name
