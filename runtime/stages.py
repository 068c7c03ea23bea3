"""A program cut into stages, each a device's part of it, and run from the first to the last.

A place is a number that stands for a device. Where every instruction has the same place there is
one stage of one span, and running it costs nothing more. Else each run of instructions with the
same place is a span, and what passes from one to another goes through the host: usually the hidden
state, once; where experts or attention stay elsewhere, what those read and write in each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from runtime.backends import Backend
from runtime.backends.flow import read_by, width_written, written_by
from runtime.program import Attend, Floats, Instruction, Program, Span, Stage, StoreKV


@dataclass(frozen=True, eq=False)
class Cut:
    """The stages of a program by place, and the spans in the order they run."""

    stages: Mapping[int, Stage]
    route: tuple[tuple[int, int], ...]  # (place, index of the span in that place's stage)


class Pipeline:
    """A program whose stages are ready to run."""

    def __init__(self, program: Program, cut: Cut, backends: Mapping[int, Backend]) -> None:
        self._program = program
        self._backends = backends
        self._n_vocab = program.buffers["logits"]
        self._visits = [
            (backends[place], index, cut.stages[place].spans[index]) for place, index in cut.route
        ]

    @classmethod
    def open(cls, program: Program, cut: Cut, make: Callable[[int, Stage], Backend]) -> Pipeline:
        """Make a backend for each stage, the last first; those made are closed when one fails."""
        backends: dict[int, Backend] = {}
        try:
            for place in sorted(cut.stages, reverse=True):
                backends[place] = make(place, cut.stages[place])
        except BaseException:
            for backend in backends.values():
                backend.close()
            raise
        return cls(program, cut, backends)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user, each once."""
        return tuple(dict.fromkeys(n for backend in self._backends.values() for n in backend.notes))

    def run(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        """Process ids at positions start, start + 1...; logits (n_outputs, n_vocab) of the last.

        Positions before `start` must have been processed; those from `start` on are overwritten.
        """
        values = {"x": self._program.embed(ids, start)}
        for backend, index, span in self._visits:
            if not span.body:
                if not n_outputs:
                    return np.empty((0, self._n_vocab), np.float32)
                values = {"x": values["x"][-n_outputs:]}
                start += len(ids) - n_outputs
            given = {name: values[name] for name in span.inputs}
            values.update(backend.run(index, given, start, n_outputs))
        return values["logits"]

    def close(self) -> None:
        for backend in self._backends.values():
            backend.close()


def whole(program: Program) -> Stage:
    """The one stage of a program that runs in one place."""
    return cut_program(program, [0] * len(program.steps)).stages[0]


def cut_program(program: Program, places: Sequence[int]) -> Cut:
    """Give each instruction to the place of `places` with its index in `program.steps`.

    ValueError when the head is in several places, or a layer's KV cache.
    """
    steps = program.steps
    n_body = len(steps) - len(program.head)
    if len(places) != len(steps):
        raise ValueError(f"{len(places)} places for {len(steps)} instructions")
    if len(set(places[n_body:])) > 1:
        raise ValueError("the head must be in one place")
    ends = [i for i in range(1, len(steps)) if places[i] != places[i - 1]]
    widths = _widths(program)
    layers: dict[int, dict[int, int]] = {}  # place -> layer -> its number there
    spans: dict[int, list[Span]] = {}
    route = []
    for first, end in zip([0, *ends], [*ends, len(steps)], strict=True):
        place = places[first]
        mine = layers.setdefault(place, {})
        inside = [_renumbered(step, mine) for step in steps[first:end]]
        n_mine = max(0, min(n_body, end) - first)
        span = Span(
            body=tuple(inside[:n_mine]),
            head=tuple(inside[n_mine:]),
            inputs={name: widths[first][name] for name in sorted(_needed(inside))},
            outputs={name: widths[end][name] for name in sorted(_passed_on(steps, first, end))},
        )
        spans.setdefault(place, []).append(span)
        route.append((place, len(spans[place]) - 1))
    _check_caches(layers)
    stages = {
        place: Stage(
            buffers={name: program.buffers[name] for name in sorted(_named(spans[place]))},
            spans=tuple(spans[place]),
            caches=tuple(program.caches[layer] for layer in layers[place]),
        )
        for place in spans
    }
    return Cut(stages, tuple(route))


def _renumbered(step: Instruction, layers: dict[int, int]) -> Instruction:
    """An instruction with the number that its layer's cache has in its stage."""
    if not isinstance(step, (StoreKV, Attend)):
        return step
    return replace(step, layer=layers.setdefault(step.layer, len(layers)))


def _check_caches(layers: Mapping[int, Mapping[int, int]]) -> None:
    everywhere = [layer for mine in layers.values() for layer in mine]
    if len(set(everywhere)) < len(everywhere):
        raise ValueError("a layer's KV cache must be in one place")


def _widths(program: Program) -> list[dict[str, int]]:
    """The numbers per token in each buffer before every instruction, and after the last."""
    widths = dict(program.buffers)
    every = [widths]
    for step in program.steps:
        target = written_by(step)
        width = width_written(step, widths.__getitem__, program.caches)
        if target is not None and width is not None:
            widths = {**widths, target: width}
        every.append(widths)
    return every


def _needed(steps: Sequence[Instruction]) -> set[str]:
    """Buffers that are read before they are written."""
    needed: set[str] = set()
    for step in reversed(steps):
        needed.discard(written_by(step) or "")
        needed.update(read_by(step))
    return needed


def _passed_on(steps: Sequence[Instruction], first: int, end: int) -> set[str]:
    """Buffers written by a span that are needed after it."""
    written = {name for step in steps[first:end] if (name := written_by(step)) is not None}
    return written & (_needed(steps[end:]) if end < len(steps) else {"logits"})


def _named(spans: Sequence[Span]) -> set[str]:
    """Every buffer of some spans."""
    names = {name for span in spans for name in (*span.inputs, *span.outputs)}
    for span in spans:
        for step in (*span.body, *span.head):
            names.update(read_by(step), {written_by(step) or "x"})
    return names
