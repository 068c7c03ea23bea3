"""deepseek2: latent attention; plain feed-forwards first, then experts beside shared ones.

    q   = [nope | rotary] of each head, from x or from a short vector of it
    kv  = norm of a short vector (the latent) of x;  r = one rotary part for all heads
    k   = [keys of kv | r] of each head;  v = values of kv

Keys and values are expanded and cached as other models' are. llama.cpp keeps the latent and
multiplies queries with the keys' matrix instead (src/models/deepseek2.cpp): the same sums in
another order. So a file has that matrix transposed; it is turned round here, as float32, with rows
of zeros where the rotary part is added. An observer is told of both as they are in the file: what
comes to the keys' matrix there are the queries, without their rotary parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gguf_tools.quants import by_name
from runtime.config import MAX_LAYERS, MAX_SIZE, ModelConfig
from runtime.decoders.blocks import Blocks, Experts
from runtime.decoders.experts import MAX_EXPERTS, has_experts, read_experts
from runtime.program import Add, Floats, MatMul, Matrix, Program, Rope, RopeTable, Show
from runtime.rope import rope_table
from runtime.weights import Weights

GATINGS = {0: "softmax", 1: "softmax", 2: "sigmoid"}  # llama.cpp: llama_expert_gating_func_type
MAX_GROUPS = 32
MAX_EXPANDED = 1 << 26  # elements of a matrix that is made here; DeepSeek V3's have 2**23.6


@dataclass(frozen=True)
class Latent:
    """The sizes of latent attention."""

    q_rank: int  # 0: queries come from x itself
    kv_rank: int
    nope: int  # dimensions of a key without a position
    rotary: int  # and with one
    value: int
    n_heads: int

    @property
    def key(self) -> int:
        return self.nope + self.rotary


def build(weights: Weights, config: ModelConfig, n_ctx: int) -> Program:
    """deepseek2: pairs of neighbours turn, at the end of each head."""
    latent = read_latent(config)
    experts = read_mixture(config)
    n_dense = config.own.integer("leading_dense_block_count", low=0, high=MAX_LAYERS, default=0)
    scale, tables = _positions(config, latent)
    heads = replace(config, n_kv_heads=latent.n_heads, key_dim=latent.key, value_dim=latent.value)
    blocks = Blocks(weights, heads)
    spread = _spread(latent)

    def layer(index: int) -> None:
        blocks.norm("attn_norm")
        _queries(blocks, latent, tables[0])
        _keys_and_values(blocks, latent, tables[1], spread)
        blocks.attend(scale=scale)
        blocks.residual()
        blocks.norm("ffn_norm")
        if experts is None or index < n_dense:
            blocks.gated_ffn()
        else:
            bias = weights.optional_vector(f"blk.{index}.exp_probs_b.bias", experts.n_experts)
            blocks.moe_ffn(replace(experts, bias=bias))
        blocks.residual()

    return blocks.program(layer)


def read_latent(config: ModelConfig) -> Latent:
    """The sizes; FormatError names the key that is missing or contradicts."""
    own = config.own
    # Files from before 2025 give the heads' sizes under the usual keys, and no others.
    key = own.integer("attention.key_length_mla", low=1, high=MAX_SIZE, default=config.key_dim)
    rotary = config.rope_dims
    if not 0 < rotary < key or (key - rotary) % 2:
        expected = f"even numbers of the {key} dimensions of a key, with and without a position"
        raise own.refuse("rope.dimension_count", expected, rotary)
    if own.real("attention.temperature_scale", low=-1e9, high=1e9, default=0.0):
        raise own.refuse("attention.temperature_scale", "no such key: it cannot be run yet", "one")
    latent = Latent(
        q_rank=own.integer("attention.q_lora_rank", low=0, high=MAX_SIZE, default=0),
        kv_rank=own.integer("attention.kv_lora_rank", low=1, high=MAX_SIZE),
        nope=key - rotary,
        rotary=rotary,
        value=own.integer(
            "attention.value_length_mla", low=1, high=MAX_SIZE, default=config.value_dim
        ),
        n_heads=config.n_heads,
    )
    if latent.n_heads * latent.key * max(latent.kv_rank, rotary) > MAX_EXPANDED:
        expected = f"keys of all heads with at most {MAX_EXPANDED:,} weights"
        raise own.refuse("attention.kv_lora_rank", expected, latent.kv_rank)
    return latent


def read_mixture(config: ModelConfig) -> Experts | None:
    """The experts of the layers that have some; None if none has."""
    if not has_experts(config):
        return None
    own = config.own
    experts = read_experts(config, normalize=False)
    gating = own.integer("expert_gating_func", low=0, high=255, default=0)
    if gating not in GATINGS:
        raise own.refuse("expert_gating_func", "0, 1 (softmax) or 2 (sigmoid)", gating)
    n_groups = own.integer("expert_group_count", low=0, high=MAX_GROUPS, default=1) or 1
    n_compared = 2 if GATINGS[gating] == "sigmoid" else 1  # V3, V2
    size = experts.n_experts // n_groups
    if experts.n_experts % n_groups or size < n_compared:
        expected = f"a divisor of the {experts.n_experts} experts"
        raise own.refuse("expert_group_count", expected, n_groups)
    n_groups_used = own.integer("expert_group_used_count", low=0, high=n_groups, default=1) or 1
    if experts.n_used > n_groups_used * size:
        expected = f"enough groups of {size} for {experts.n_used} experts"
        raise own.refuse("expert_group_used_count", expected, n_groups_used)
    n_shared = own.integer("expert_shared_count", low=0, high=MAX_EXPERTS, default=0)
    return replace(
        experts,
        gating=GATINGS[gating],
        n_groups=n_groups,
        n_groups_used=n_groups_used,
        n_compared=n_compared,
        scale=own.real("expert_weights_scale", low=0.0, high=1e6, default=0.0) or 1.0,
        shared_ffn_dim=n_shared * experts.ffn_dim,
    )


def _positions(config: ModelConfig, latent: Latent) -> tuple[float, tuple[RopeTable, RopeTable]]:
    """The factor of the scores, and the tables for q, whose heads turn at the end, and for r."""
    table = rope_table(config, interleaved=True)
    still = np.zeros(latent.nope // 2)
    frequencies = np.concatenate([still, table.frequencies])
    scale, magnitude = 1 / math.sqrt(latent.key), table.scale
    if config.own.has("rope.scaling.yarn_log_multiplier"):
        multiplier = config.own.real("rope.scaling.yarn_log_multiplier", low=0.0, high=1e3)
        grown = 1 + multiplier * math.log(max(config.rope_scaling.factor, 1.0))
        scale, magnitude = scale * grown * grown, 1.0
    # Of q only the end may be scaled; so r takes both factors.
    q_table = RopeTable(latent.key, True, frequencies, 1.0)
    return scale, (q_table, replace(table, scale=magnitude * magnitude))


def _queries(blocks: Blocks, latent: Latent, table: RopeTable) -> None:
    n_rows = latent.n_heads * latent.key
    if latent.q_rank:
        blocks.linear("attn_q_a", "normed", "q_latent", latent.q_rank)
        blocks.norm("attn_q_a_norm", "q_latent", "q_latent")
        blocks.linear("attn_q_b", "q_latent", "q", n_rows, latent.q_rank)
    else:
        blocks.linear("attn_q", "normed", "q", n_rows)
    blocks.emit(Rope("q", latent.n_heads, latent.key, table))


def _keys_and_values(blocks: Blocks, latent: Latent, table: RopeTable, spread: Matrix) -> None:
    sizes = (latent.kv_rank, latent.rotary)
    blocks.split_linear("attn_kv_a_mqa", "normed", ("kv_latent", "k_rotary"), sizes)
    blocks.emit(Rope("k_rotary", 1, latent.rotary, table))
    blocks.norm("attn_kv_a_norm", "kv_latent", "kv_latent")
    if blocks.weights.stream:
        blocks.emit(*_shown(blocks, latent))
    keys, values = _expanding(blocks, latent)
    width = latent.n_heads * latent.key
    k, v = blocks.buffer("k", width), blocks.buffer("v", latent.n_heads * latent.value)
    blocks.emit(
        MatMul("kv_latent", k, keys),
        MatMul("k_rotary", blocks.buffer("k_spread", width), spread),
        Add("k_spread", k),
        MatMul("kv_latent", v, values),
    )


def _expanding(blocks: Blocks, latent: Latent) -> tuple[Matrix, Matrix]:
    """The matrices that keys and values of all heads come from."""
    weights, prefix, heads = blocks.weights, blocks.prefix, latent.n_heads
    name = f"{prefix}attn_k_b.weight"
    if weights.has(f"{prefix}attn_kv_b.weight"):  # before April 2025: one, not transposed
        each = latent.nope + latent.value
        whole = weights.matrix(f"{prefix}attn_kv_b.weight", heads * each, latent.kv_rank)
        if not len(whole.data):
            return _empty(name, heads * latent.key, latent.kv_rank), whole
        rows = np.arange(heads * each, dtype=np.intp).reshape(heads, each)
        nope = whole.rows(rows[:, : latent.nope].reshape(-1))
        chosen = rows[:, latent.nope :].reshape(-1)
        data = np.ascontiguousarray(whole.data[chosen])
        values = replace(whole, n_rows=heads * latent.value, data=data)
        return _keys(name, nope.reshape(heads, latent.nope, -1), latent), values
    values = weights.flattened(f"{prefix}attn_v_b.weight", heads, latent.value, latent.kv_rank)
    turned = weights.flattened(name, heads, latent.kv_rank, latent.nope)
    if not len(turned.data):
        return _empty(name, heads * latent.key, latent.kv_rank), values
    each_head = turned.rows(slice(None)).reshape(heads, latent.kv_rank, latent.nope)
    return _keys(name, each_head.swapaxes(1, 2), latent), values


def _shown(blocks: Blocks, latent: Latent) -> list[Show]:
    """What is made into other matrices, as it is in the file; nothing of what is missing."""
    weights, heads = blocks.weights, latent.n_heads
    old, name = f"{blocks.prefix}attn_kv_b.weight", f"{blocks.prefix}attn_k_b.weight"
    if weights.has(old):
        whole = weights.matrix(old, heads * (latent.nope + latent.value), latent.kv_rank)
        return [Show("kv_latent", (whole,))]
    if weights.has(name):
        return [Show("q", weights.experts(name, heads, latent.kv_rank, latent.nope), latent.key)]
    return []


def _keys(name: str, nope: Floats, latent: Latent) -> Matrix:
    """The keys' matrix of every head (n_heads, nope, kv_rank) and zeros for the rotary part."""
    whole = np.zeros((latent.n_heads, latent.key, latent.kv_rank), np.float32)
    whole[:, : latent.nope] = nope
    return _floats(name, whole.reshape(-1, latent.kv_rank))


def _spread(latent: Latent) -> Matrix:
    """What puts the rotary part at the end of each head's key."""
    whole = np.zeros((latent.n_heads, latent.key, latent.rotary), np.float32)
    whole[:, latent.nope :] = np.eye(latent.rotary, dtype=np.float32)
    return _floats("the rotary part of the keys", whole.reshape(-1, latent.rotary))


def _floats(name: str, values: npt.NDArray[np.float32]) -> Matrix:
    n_rows, n_columns = values.shape
    return Matrix(name, by_name("F32"), n_rows, n_columns, values.view(np.uint8))


def _empty(name: str, n_rows: int, n_columns: int) -> Matrix:
    """In place of a tensor that is missing, which `weights` has noted."""
    return Matrix(name, by_name("F32"), n_rows, n_columns, np.empty((0, 0), np.uint8))
