"""From instructions to kernel launches: which kernel, how many threads, which arrays.

The position a step begins at is in memory (`Room.state`), not among the arguments: the launches for
one token can be captured once and replayed for every token. Neighbours that one launch can do go
together (cuda_fusion.py), and what is quantised next is by the kernel that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.cuda_draft import MOST_THREADS, THREADS, Constants, Draft, Launch, threads_for
from runtime.backends.cuda_fusion import Fusion, Group, next_int8
from runtime.backends.cuda_products import FEW_TOKENS, Products, taken
from runtime.backends.cuda_room import Buffer, Memory, Room, ranges_for
from runtime.backends.flow import unknown, written_by
from runtime.kernels.cuda import attention, elementwise, norms, positions, routing
from runtime.kernels.cuda.tiles import TILES, Tiles
from runtime.program import (
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    RMSNorm,
    Rope,
    Route,
    Scale,
    Show,
    SigmoidScale,
    SoftCap,
    StoreKV,
)


class Launches:
    """Makes launches over one room."""

    def __init__(self, room: Room, memory: Memory, tiles: Mapping[str, Tiles] = TILES) -> None:
        """`tiles` are the kernels for many tokens, by format."""
        self._room = room
        self._constants = Constants(room, memory)
        self._tiles = tiles

    def make(
        self,
        steps: Iterable[Instruction],
        n_tokens: int,
        *,
        holding: Mapping[str, int] | None = None,
        instead: Mapping[str, Buffer] | None = None,
    ) -> list[Launch]:
        """Launches of `steps` for the first n_tokens tokens of the buffers.

        `holding` says how many numbers a token has in buffers that have room for more; `instead`
        are other buffers than the room's, such as its later rows.
        """
        buffers = {**self._room.buffers, **(instead or {})}
        draft = Draft(self._room, buffers, n_tokens, holding or {})
        products = Products(draft, self._constants, self._tiles)
        computed = [step for step in steps if not isinstance(step, Show)]
        _Emitter(computed, draft, products, self._constants).emit()
        return draft.made


class _Emitter:
    """One run of instructions, made into launches."""

    def __init__(
        self, steps: Sequence[Instruction], draft: Draft, products: Products, constants: Constants
    ) -> None:
        self._steps = steps
        self._draft = draft
        self._room = draft.room
        self._products = products
        self._constants = constants

    def emit(self) -> None:
        few = self._draft.n <= FEW_TOKENS
        fusion = Fusion(self._draft.width, self._draft.shapes, joins_products=few)
        for group, following in fusion.groups(self._steps):
            quantises = self._quantises(group, following)
            self._emit(group, quantises)
            for step in group:
                self._note(step)
            if quantises:
                name = str(written_by(group[0]))
                self._products.quantised(name, self._draft.width(name))

    def _emit(self, group: Group, quantises: bool) -> None:
        draft, vector = self._draft, self._constants.vector
        first, last = group[0], group[-1]
        if isinstance(last, StoreKV):
            self._heads(group[:-1], last)
            return
        total = draft.total(last.target if isinstance(last, Add) else None)
        match first:
            case RMSNorm() | LayerNorm():
                self._norm(first, *total, *self._int8(quantises))
            case MatMul():
                self._products.matmuls(group)
            case ExpertMatMul():
                self._products.experts(group)
            case ExpertSum():
                self._expert_sum(first, *total)
            case AddBias():
                bias = vector(first.bias)
                draft.columns(
                    elementwise.add_bias, len(first.bias), *draft.places(first.target), bias
                )
            case Rope():
                self._rope(first)
            case Attend():
                self._attend(first, *self._int8(quantises))
            case Gate():
                kernel, width = elementwise.GATES[first.activation], draft.width(first.gate)
                places = draft.places(first.gate, first.up, first.target)
                draft.columns(kernel, width, *places, *self._int8(quantises))
            case Activate():
                self._on_target(elementwise.ALONE[first.activation], first, *self._int8(quantises))
            case Add():
                self._on_target(elementwise.add, first, source=first.source)
            case Scale():
                self._on_target(elementwise.scale, first, np.float32(first.factor))
            case SoftCap():
                self._on_target(elementwise.softcap, first, np.float32(first.cap))
            case Route():
                self._route(first)
            case ExpertBias():
                n_rows = first.biases.shape[1]
                places = draft.places(first.target, first.routes)
                constants = (vector(first.biases), n_rows)
                draft.columns(elementwise.expert_bias, first.n_used * n_rows, *places, *constants)
            case SigmoidScale():
                self._on_target(elementwise.sigmoid_scale, first, source=first.gate)
            case StoreKV() | Show():  # is last in its group; is in none
                pass
            case _:
                unknown(first)

    # --- what buffers hold -----------------------------------------------------------------

    def _note(self, step: Instruction) -> None:
        self._draft.note(step)
        target = written_by(step)
        if target is not None:
            self._products.forget(target)

    def _quantises(self, group: Group, following: int) -> bool:
        """Whether all that the first step makes is next taken as int8, and its kernel can do it."""
        match step := group[0]:
            case RMSNorm() if isinstance(group[-1], StoreKV):
                return False
            case RMSNorm() | LayerNorm():
                width = step.weight.shape[-1]
                if width != self._draft.width(step.source):
                    return False
            case Gate():
                width = self._draft.width(step.gate)
            case Activate():
                width = self._draft.width(step.target)
            case Attend():
                shape = self._draft.shapes[step.layer]
                if shape.value_dim % 32:
                    return False
                width = shape.n_heads * shape.value_dim
            case _:
                return False
        product = next_int8(self._steps, following, step.target)
        return product is not None and taken(product, width) == width

    def _int8(self, quantises: bool) -> tuple[Any, ...]:
        """Where a kernel puts int8 activations, and whether."""
        room = self._room.quantised
        return room.values, room.scales, room.sums, quantises

    # --- launches --------------------------------------------------------------------------

    def _on_target(
        self,
        kernel: Any,
        step: Activate | Add | Scale | SoftCap | SigmoidScale,
        *constants: Any,
        source: str | None = None,
    ) -> None:
        names = (step.target,) if source is None else (source, step.target)
        places = self._draft.places(*names)
        self._draft.columns(kernel, self._draft.width(step.target), *places, *constants)

    def _norm(self, step: RMSNorm | LayerNorm, *ending: Any) -> None:
        draft, size = self._draft, step.weight.shape[-1]
        groups = draft.width(step.source) // size
        places = draft.places(step.source, step.target)
        constants: tuple[Any, ...] = (self._constants.vector(step.weight),)
        kernel = norms.rms_norm
        if isinstance(step, LayerNorm):
            kernel, along = norms.layer_norm, size if step.weight.ndim == 2 else 0
            constants += (along, self._constants.vector(step.bias), step.bias is not None)
        # A token on its own has the GPU to itself, and but one block of it.
        threads = threads_for(size, MOST_THREADS if draft.n * groups == 1 else THREADS)
        arguments = (*places, *constants, size, np.float32(step.epsilon), *ending)
        draft.add(kernel, (groups, draft.n, 1), (threads, 1), arguments)

    def _rope(self, step: Rope) -> None:
        table = step.table
        if table.n_dims < 2:
            return
        arguments = (
            *(*self._draft.places(step.target), step.head_dim),
            *(table.n_dims, table.interleaved, *self._constants.angles(table)),
            self._room.state,
        )
        block = (threads_for(table.n_dims // 2), 1)
        self._draft.add(positions.rope, (step.n_heads, self._draft.n, 1), block, arguments)

    def _heads(self, before: Group, store: StoreKV) -> None:
        """Norms of queries and keys, their turns, and what is stored: all in one launch."""
        draft, room, vector = self._draft, self._room, self._constants.vector
        cache = room.caches[store.layer]
        shape = cache.shape
        weights = [step for step in before if isinstance(step, RMSNorm)]
        turns = [step.table for step in before if isinstance(step, Rope)]
        queries = written_by(before[0]) if before else None
        norm: tuple[Any, ...] = (False, room.nothing, np.float32(0), room.nothing, np.float32(0))
        if weights:
            each = ((vector(step.weight), np.float32(step.epsilon)) for step in weights)
            norm = (True, *(value for pair in each for value in pair))
        turn: tuple[Any, ...] = (0, False, room.nothing, room.nothing)
        if turns:
            turn = (turns[0].n_dims, turns[0].interleaved, *self._constants.angles(turns[0]))
        n_heads = shape.n_heads if queries else 0
        kept = [
            (kept.numbers, kept.scales, kept.dim, kept.padded)
            for kept in (cache.keys, cache.values)
        ]
        arguments = (
            *(draft.places(queries) if queries else (room.nothing, 0)),
            *(*draft.places(store.keys, store.values), n_heads, shape.n_kv_heads),
            *(*norm, *turn, *kept[0], *kept[1], room.n_ctx, room.state),
        )
        block = (threads_for(max(cache.keys.padded, cache.values.padded)), 1)
        grid = (n_heads + 2 * shape.n_kv_heads, draft.n, 1)
        draft.add(positions.STORE[room.kv_type], grid, block, arguments)

    def _attend(self, step: Attend, *ending: Any) -> None:
        draft, room = self._draft, self._room
        cache = room.caches[step.layer]
        shape = cache.shape
        group = shape.n_heads // shape.n_kv_heads
        n_ranges = ranges_for(room.n_ctx, room.n_batch, draft.n)
        # The queries of a block: of several heads as far as they read the same keys, or tokens.
        log_heads = attention.heads_of_block(group)
        heads_each, tokens_each = 1 << log_heads, attention.QUERIES >> log_heads
        arguments = (
            *draft.places(step.queries),
            cache.keys.numbers,
            cache.keys.scales,
            cache.values.numbers,
            cache.values.scales,
            room.mixes,
            room.extremes,
            room.state,
            draft.n,
            shape.n_heads,
            group,
            log_heads,
            cache.keys.dim,
            cache.keys.padded,
            cache.values.dim,
            cache.values.padded,
            room.n_ctx,
            np.float32(step.scale),
            step.window,
            np.float32(step.softcap),
        )
        draft.add(
            attention.ATTEND[room.kv_type],
            (shape.n_kv_heads * -(-group // heads_each), -(-draft.n // tokens_each), n_ranges),
            (attention.THREADS, 1),
            arguments,
            attention.shared_bytes(cache.keys.padded, cache.values.padded),
        )
        sinks = (self._constants.vector(step.sinks), step.sinks is not None)
        arguments = (
            *(room.mixes, room.extremes, n_ranges, room.state, draft.n, tokens_each, step.window),
            *(*sinks, *draft.places(step.target), shape.value_dim, *ending),
        )
        block = (threads_for(shape.value_dim), 1)
        draft.add(attention.combine, (shape.n_heads, draft.n, 1), block, arguments)

    def _route(self, step: Route) -> None:
        draft = self._draft
        n_experts = draft.width(step.scores)
        arguments = (
            *(*draft.places(step.scores, step.routes), n_experts, step.n_used),
            *(routing.GATINGS[step.gating], step.normalize, np.float32(step.scale)),
            *(self._constants.vector(step.bias), step.bias is not None),
            *(step.n_groups, step.n_groups_used, step.n_compared),
        )
        shared = routing.shared_bytes(n_experts, step.n_groups)
        draft.add(routing.route, (draft.n, 1, 1), (32, 1), arguments, shared)

    def _expert_sum(self, step: ExpertSum, *total: Any) -> None:
        draft = self._draft
        width = draft.width(step.source) // step.n_used
        arguments = (*draft.places(step.source, step.routes), step.n_used)
        places = draft.places(step.target)
        draft.columns(elementwise.expert_sum, width, *arguments, *places, *total)
