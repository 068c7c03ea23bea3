"""The instructions a decoder is made of.

A program is data: a decoder (runtime/decoders) emits it from a model's configuration and tensors,
and every backend runs it. Buffers are named; each holds one row of `width` float32 per token.

    x       the hidden state; `embed` writes it before the first layer
    logits  one row of n_vocab; written by the head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.quants import QuantType
from runtime.streamed_rows import StreamedRows

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix as it lies in the file: n_rows outputs of n_columns inputs each."""

    name: str
    quant: QuantType
    n_rows: int
    n_columns: int
    # (n_rows, row_bytes): a view into the mapped file, or what reads it when it is needed
    data: npt.NDArray[np.uint8] | StreamedRows
    index: int | None = None  # in a stacked tensor: which of its matrices, as an expert's number

    def rows(self, chosen: slice | npt.NDArray[np.intp]) -> Floats:
        """Some rows as float32 (len(chosen), n_columns)."""
        return self.quant.dequantize(np.ascontiguousarray(self.data[chosen]))


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Rotary positions: pair i of a head turns by position * frequencies[i]; then times scale."""

    n_dims: int  # the first dimensions of a head that turn
    interleaved: bool  # pairs (0, 1), (2, 3)... as llama's GGUF; else (0, n/2), (1, n/2 + 1)...
    frequencies: npt.NDArray[np.float64]  # (n_dims / 2,)
    scale: float

    def angles(self, positions: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Cosines and sines, (len(positions), n_dims / 2)."""
        turns = positions[:, None] * self.frequencies[None, :]
        cosines = (np.cos(turns) * self.scale).astype(np.float32)
        return cosines, (np.sin(turns) * self.scale).astype(np.float32)


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """target = source / sqrt(mean(source^2) + epsilon) * weight, over groups of len(weight)."""

    source: str
    target: str
    weight: Floats
    epsilon: float
    name: str = ""  # the weight's tensor


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """target = (source - mean) / sqrt(variance + epsilon) * weight + bias, over groups.

    A group has as many elements as a row of `weight`; where that is a matrix, group i has row i.
    """

    source: str
    target: str
    weight: Floats  # (size,) or (n_groups, size)
    bias: Floats | None  # as weight
    epsilon: float
    name: str = ""  # the weight's tensor
    bias_name: str = ""  # and the bias's


@dataclass(frozen=True, eq=False)
class MatMul:
    """target = source @ matrix.T"""

    source: str
    target: str
    matrix: Matrix


@dataclass(frozen=True, eq=False)
class Show:
    """Computes nothing: what matrices of a file are multiplied with elsewhere.

    Where a program multiplies with another form of them, this is what an observer is told
    (runtime/backends/observing.py). Matrix i takes its n_columns from column i * stride of source.
    """

    source: str
    matrices: tuple[Matrix, ...]
    stride: int = 0


@dataclass(frozen=True, eq=False)
class AddBias:
    """target += bias"""

    target: str
    bias: Floats
    name: str = ""  # its tensor
    first: int = 0  # the element of that tensor with which it begins


@dataclass(frozen=True, eq=False)
class Rope:
    """Turn each head of target by its token's position."""

    target: str
    n_heads: int
    head_dim: int
    table: RopeTable


@dataclass(frozen=True, eq=False)
class StoreKV:
    """Put this step's keys and values in the KV cache of a layer."""

    keys: str
    values: str
    layer: int


@dataclass(frozen=True, eq=False)
class Attend:
    """Causal attention of the queries on the KV cache of a layer."""

    queries: str
    target: str
    layer: int
    scale: float
    window: int  # a token sees itself and the window - 1 tokens before; 0 = all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0 = as they are
    sinks: Floats | None = None  # (n_heads,) one more score in each head's softmax, of no value


@dataclass(frozen=True, eq=False)
class Gate:
    """target = activation(gate) * up"""

    gate: str
    up: str
    target: str
    activation: str = "silu"  # one of ACTIVATIONS


@dataclass(frozen=True, eq=False)
class Activate:
    """target = activation(target)"""

    target: str
    activation: str  # one of ACTIVATIONS


@dataclass(frozen=True, eq=False)
class Add:
    """target += source"""

    source: str
    target: str


@dataclass(frozen=True, eq=False)
class Scale:
    """target *= factor"""

    target: str
    factor: float


@dataclass(frozen=True, eq=False)
class SoftCap:
    """target = cap * tanh(target / cap)"""

    target: str
    cap: float


@dataclass(frozen=True, eq=False)
class Route:
    """Choose the n_used experts with the highest scores, and their weights, for each token.

    `scores` holds a router's output, one per expert; `routes` gets the n_used experts' numbers (as
    float32, best first; the lower number where scores are equal), then their n_used weights.
    """

    scores: str
    routes: str
    n_used: int
    gating: str = "softmax"  # of all scores; or "sigmoid" of each; or "chosen": softmax of those
    normalize: bool = True  # divide the weights by their sum
    scale: float = 1.0  # then times this
    bias: Floats | None = None  # (n_experts,) added to what is compared, not to the weights
    # Experts lie in n_groups groups of one size; only those of the n_groups_used best may be
    # chosen. A group is as good as its n_compared best experts, added up.
    n_groups: int = 1
    n_groups_used: int = 1
    n_compared: int = 1  # 1 or 2


@dataclass(frozen=True, eq=False)
class ExpertMatMul:
    """target[slot] = source @ experts[routes[slot]].T for each of a token's n_used slots.

    `source` is one row for all slots (n_columns wide) or one for each (n_used * n_columns).
    """

    source: str
    target: str  # (n_used * n_rows)
    routes: str
    n_used: int
    experts: tuple[Matrix, ...]  # all of one type and shape
    name: str = ""  # of the stacked tensor, for messages


@dataclass(frozen=True, eq=False)
class ExpertBias:
    """target[slot] += biases[routes[slot]]"""

    target: str  # (n_used * n_rows)
    routes: str
    n_used: int
    biases: Floats  # (n_experts, n_rows)
    name: str = ""  # their tensor


@dataclass(frozen=True, eq=False)
class ExpertSum:
    """target = sum over slots of weight[slot] * source[slot]"""

    source: str  # (n_used * width of target)
    routes: str
    n_used: int
    target: str


@dataclass(frozen=True, eq=False)
class SigmoidScale:
    """target *= sigmoid(gate), where gate is one number per token"""

    gate: str
    target: str


ACTIVATIONS = (
    "silu",
    "gelu",  # with tanh, as ggml and transformers' gelu_pytorch_tanh and gelu_new
    "gelu_erf",
    "relu",
    "swiglu_oai",  # gpt-oss: both sides clamped; gate * sigmoid(1.702 gate) * (up + 1)
)

Instruction = (
    RMSNorm
    | LayerNorm
    | MatMul
    | Show
    | AddBias
    | Rope
    | StoreKV
    | Attend
    | Gate
    | Activate
    | Add
    | Scale
    | SoftCap
    | Route
    | ExpertMatMul
    | ExpertBias
    | ExpertSum
    | SigmoidScale
)


@dataclass(frozen=True)
class KVShape:
    """The KV cache of one layer, per token."""

    n_heads: int  # query heads
    n_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, eq=False)
class Program:
    """A whole decoder: embed a token, run the layers, run the head on the rows wanted."""

    buffers: Mapping[str, int]  # name -> width
    embedding: Matrix
    layers: tuple[tuple[Instruction, ...], ...]
    head: tuple[Instruction, ...]
    caches: tuple[KVShape, ...]  # one per layer
    embedding_scale: float = 1.0
    positions: Matrix | None = None  # learned positions: row p is added to a token at position p

    def embed(self, ids: npt.NDArray[np.int64], start: int) -> Floats:
        """The hidden state of tokens at positions start, start + 1, ...: (len(ids), dim)."""
        x = self.embedding.rows(ids)
        if self.embedding_scale != 1.0:
            x = x * np.float32(self.embedding_scale)
        if self.positions is not None:
            x = x + self.positions.rows(np.arange(start, start + len(ids)))
        return x

    @property
    def steps(self) -> list[Instruction]:
        """All instructions, in order."""
        return [*(step for layer in self.layers for step in layer), *self.head]


@dataclass(frozen=True, eq=False)
class Span:
    """Instructions that run one after the other on a device, and what goes in and comes out.

    The buffers of `inputs` are given, those of `outputs` are what others need of it: each with the
    numbers per token that it holds.
    """

    body: tuple[Instruction, ...]  # for every token; may be none
    head: tuple[Instruction, ...]  # then, for the tokens whose logits are wanted; may be none
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]  # of a head: the logits, for those tokens alone


@dataclass(frozen=True, eq=False)
class Stage:
    """What one device has of a program: spans of its instructions, and their KV caches."""

    buffers: Mapping[str, int]
    spans: tuple[Span, ...]
    caches: tuple[KVShape, ...]  # what StoreKV and Attend call layer i

    @property
    def steps(self) -> list[Instruction]:
        """All instructions, in order."""
        return [step for span in self.spans for step in (*span.body, *span.head)]


def matrices(program: Program | Stage) -> list[Matrix]:
    """Every matrix the program multiplies by, in order of use."""
    found: list[Matrix] = []
    for step in program.steps:
        if isinstance(step, MatMul):
            found.append(step.matrix)
        elif isinstance(step, ExpertMatMul):
            found += step.experts
    return found
