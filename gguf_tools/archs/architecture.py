"""What an architecture's file says: facts, tensors, metadata."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.rope import Rope
from gguf_tools.archs.transforms import Transform


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
    switches: frozenset[str] = field(default_factory=frozenset)  # what is there: "attention_bias"
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
        }


@dataclass(frozen=True)
class TensorRule:
    """One tensor, or with {layer} in its names one of every layer."""

    source: str  # its name in the checkpoint
    name: str  # its name in the file
    shape: tuple[str, ...]  # keys of ModelFacts.sizes, outermost first
    transform: Callable[[ModelFacts], Transform] | None = None
    when: str = ""  # the switch that must be on


@dataclass(frozen=True)
class GeneratedTensor:
    """A tensor that is computed from the configuration, in models that need it."""

    name: str
    make: Callable[[ModelFacts], npt.NDArray[np.float32] | None]


@dataclass(frozen=True)
class MetadataRule:
    """A field of ModelFacts as metadata ARCHITECTURE.KEY; written when it is not None."""

    key: str
    type: str
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
