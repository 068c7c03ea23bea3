"""The text of the quality sheet, run by a file as far as that has been written."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import takewhile

from gguf_tools.recipes import block_number
from runtime.program import Floats
from runtime.quality.likely_costs import estimate, layer_shares, lookup_error
from runtime.quality.source_run import SourceRun
from runtime.sources import Source

TOGETHER = 4  # layers: a program is built for as many, and nobody waits long for them
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


class FileRun:
    """What a file makes of the text, and what its tensors are likely to cost."""

    def __init__(self, run: SourceRun, *, names_tensors: bool = True) -> None:
        """Without `names_tensors` nothing is said of single tensors."""
        self.run, self.names_tensors = run, names_tensors
        self.hidden: list[Floats] = []  # of each window, after `n_layers` layers
        self.n_layers = 0
        self.estimates: dict[str, float] = {}  # what tensors are likely to cost, in no unit
        self._estimated: set[int] = set()  # the layers of these; -1: what is in none

    def look(self, file: Source, there: Collection[str]) -> bool:
        """Do a part of what can be done by now; False where there is nothing to do.

        `there` are the tensors of `file` that are. A GGUFError where it cannot be run.
        """
        missing = {block_number(name) for name in file.tensors if name not in there}
        if -1 in missing:
            return False
        rest = range(self.n_layers, len(self.run.probes))
        ready = list(takewhile(lambda layer: layer not in missing, rest))
        if not ready or len(ready) < min(TOGETHER, len(rest)):
            return False
        self._go_on(file, ready[:TOGETHER])
        return True

    def finish(self, file: Source) -> None:
        """Do what is left: all of the file is there."""
        self._go_on(file, range(self.n_layers, len(self.run.probes)))

    def _go_on(self, file: Source, layers: Iterable[int]) -> None:
        """Run these layers, the next ones."""
        layers = list(layers)
        with self.run.run_as(file) as model:
            if not self.hidden:
                self.hidden = [model.embed(ids) for ids in self.run.read]
            for layer in layers:
                self.hidden = [model.layer(layer, x) for x in self.hidden]
                self.n_layers += 1
        if self.names_tensors:
            self._estimate({-1, *layers} - self._estimated, file)

    def _estimate(self, layers: set[int], file: Source) -> None:
        """What the changed tensors of these layers are likely to cost."""
        for name, tensor in file.tensors.items():
            before = self.run.source.tensors.get(name)
            if before is None or len(tensor.shape) < 2 or tensor.quant.name == before.quant.name:
                continue
            layer = block_number(name)
            if layer not in layers:
                continue
            run = self.run
            inputs = run.probes[layer].inputs.get(name) if layer >= 0 else None
            if inputs:
                shares = layer_shares(run.states[layer], run.states[layer + 1])[run.positions]
                self.estimates[name] = estimate(name, inputs, shares, run.source, file)
            elif cost := self._cost_of_ends(name, file):
                self.estimates[name] = cost
        self._estimated |= layers

    def _cost_of_ends(self, name: str, file: Source) -> float:
        """As embedding and as head, which may be one tensor; 0 for any other."""
        run, cost = self.run, 0.0
        if name == EMBEDDING:
            ids = [run.read[0][position] for position in run.positions]
            cost += lookup_error(name, ids, run.source, file)
        if name == (HEAD if HEAD in run.source.tensors else EMBEDDING):
            cost += estimate(name, run.head_inputs(name), None, run.source, file)
        return cost
