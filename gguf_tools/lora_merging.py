"""LoRA adapters merged into a checkpoint's weights.

Done in float32 on the bands that conversion reads, before anything else is done to them: only the
adapter's thin matrices are in memory besides.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gguf_tools.archs.architecture import Architecture
from gguf_tools.archs.config import HFConfig
from gguf_tools.checkpoint import CONFIG_NAME, Checkpoint, listing
from gguf_tools.errors import CheckpointError, printable
from gguf_tools.json_files import shown
from gguf_tools.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, Pair, open_adapter
from gguf_tools.naming import model_id
from gguf_tools.safetensors_file import Floats, LazyTensor

MAX_SCALE = 1e6


@dataclass(frozen=True)
class Scaled:
    """An adapter and how strongly it is to be merged."""

    adapter: Adapter
    scale: float = 1.0


def read_scaled(text: str, find: Callable[[Path], Path] = Path) -> Scaled:
    """ADAPTER or ADAPTER:SCALE, as the option has it: a folder, and a number.

    `find` gives the folder of what is named.
    """
    name, colon, number = text.rpartition(":")
    if not colon or not name or Path(text).exists():
        return Scaled(open_adapter(find(Path(text))))
    try:
        scale = float(number)
    except ValueError:  # the colon is part of the name
        return Scaled(open_adapter(find(Path(text))))
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise CheckpointError(
            f"--lora {printable(text)}: expected a scale of at most {MAX_SCALE:g}, "
            f"found {printable(number)}"
        )
    return Scaled(open_adapter(find(Path(name))), scale)


def with_adapters(
    checkpoint: Checkpoint, architecture: Architecture, adapters: Sequence[Scaled]
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint with the adapters merged into its tensors, and notes; no weight is read."""
    config = HFConfig(checkpoint.config, shown(checkpoint.folder / CONFIG_NAME))
    stored = {architecture.rename(name): name for name in checkpoint.tensors}
    ends = (architecture.embedding.source, architecture.head.source)
    tied = architecture.read_facts(config).tied is not False
    tensors = dict(checkpoint.tensors)
    changes: dict[str, _Change] = {}
    notes: list[str] = []
    for scaled in adapters:
        if scaled.adapter.invocation_tokens:
            raise CheckpointError(
                f"{shown(scaled.adapter.folder)} is an activated LoRA, which acts from certain "
                "tokens on: it cannot be merged; make a file of it with --lora-only"
            )
        found = _find_changes(scaled, architecture, stored)
        if tied and any(end in found and found[end].apart for end in ends):
            _untie(tensors, stored, ends)
        notes += _notes(scaled, checkpoint.folder, found)
        wrong = []
        for name, change in found.items():
            if name not in stored:
                wrong.append(f"the base has no {printable(name)}")
                continue
            wrong += change.misfits(tensors[stored[name]])
            if name in changes:
                if change.whole is not None:
                    wrong.append(f"{printable(name)}: another adapter changes it, too")
                before = changes[name]
                change = _Change(before.whole, (*before.deltas, *change.deltas))
            changes[name] = change
        if wrong:
            raise CheckpointError(
                f"{shown(scaled.adapter.folder)} is no adapter for {shown(checkpoint.folder)}: "
                f"{listing(wrong, 5)}"
            )
    for name, change in changes.items():
        tensors[stored[name]] = change.applied(tensors[stored[name]])
    folders = [scaled.adapter.folder for scaled in adapters]
    files = [folder / name for folder in folders for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    files = [*checkpoint.files, *files]
    return replace(checkpoint, tensors=tensors, files=tuple(files)), tuple(notes)


def is_transposed(architecture: Architecture, source: str) -> bool:
    """Whether checkpoints of this architecture have the matrix with inputs as rows (Conv1D)."""
    return any(
        rule.transposed and rule.cut is None and rule_pattern(rule.source).fullmatch(source)
        for rule in architecture.tensors
    )


def rule_pattern(source: str) -> "re.Pattern[str]":
    """The names that the source of a rule stands for; groups layer and expert."""
    text = re.escape(source)
    for part in ("layer", "expert"):
        text = text.replace(rf"\{{{part}\}}", rf"(?P<{part}>\d{{1,9}})")
    return re.compile(text)


# --- changes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Delta:
    pair: Pair
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        n_outputs, n_inputs = self.pair.b.shape[0], self.pair.a.shape[1]
        return (n_inputs, n_outputs) if self.transposed else (n_outputs, n_inputs)


@dataclass(frozen=True)
class _Change:
    """What becomes of one tensor of the checkpoint."""

    whole: LazyTensor | None = None  # takes its place
    deltas: tuple[_Delta, ...] = ()  # are added
    copied: bool = False  # `whole` is a copy beside the base's own

    @property
    def apart(self) -> bool:
        """Whether a tensor that is tied to this one stays as it is."""
        return bool(self.deltas) or self.copied

    def misfits(self, base: LazyTensor) -> list[str]:
        shapes = [delta.shape for delta in self.deltas]
        shapes += [self.whole.shape] if self.whole is not None else []
        return [
            f"{printable(base.name)} is {base.shape}, the adapter's change {shape}"
            for shape in shapes
            if shape != base.shape
        ]

    def applied(self, base: LazyTensor) -> LazyTensor:
        start = base if self.whole is None else replace(self.whole, name=base.name)
        if not self.deltas:
            return start

        def load(first: int, last: int) -> Floats:
            rows = start.load(first, last)
            for delta in self.deltas:
                change = delta.pair.rows(first, last, delta.transposed)
                change *= np.float32(delta.scale)
                rows = rows + change
            return rows

        return replace(base, dtype="F32", load=load, raw=None)


def _find_changes(
    scaled: Scaled, architecture: Architecture, stored: Mapping[str, str]
) -> dict[str, _Change]:
    """By the name that the architecture's rules use; parts that the file leaves out are not."""
    adapter = scaled.adapter
    changes: dict[str, _Change] = {}
    for name, tensor in adapter.whole.items():
        if name.startswith(architecture.skipped):
            continue
        if scaled.scale != 1:
            raise CheckpointError(
                f"{shown(adapter.folder)}: expected scale 1, found {scaled.scale:g}: the adapter "
                f"has {printable(name)} whole, which cannot be merged in part"
            )
        changes[architecture.rename(name)] = _Change(tensor, copied=name in adapter.copies)
    for pair in adapter.pairs:
        name = pair.module + ".weight"
        if name.startswith(architecture.skipped):
            continue
        if pair.embedding:
            raise CheckpointError(
                f"{shown(adapter.folder)} changes the embedding {printable(name)} by a product, "
                "which is not merged here: where a head is tied to it PEFT would change that, too. "
                "Merge it with PEFT (merge_and_unload) and convert the result, or make a file of "
                "it with --lora-only"
            )
        name = architecture.rename(name)
        transposed = is_transposed(architecture, name)
        before = changes.get(name, _Change())
        changes[name] = replace(before, deltas=(_Delta(pair, scaled.scale, transposed),))
    return changes


def _untie(tensors: dict[str, LazyTensor], stored: dict[str, str], ends: tuple[str, str]) -> None:
    """Give embedding and head a tensor each where they share one: only one of them changes."""
    for here, there in (ends, ends[::-1]):
        if here in stored and there not in stored:
            stored[there] = there
            tensors[there] = replace(tensors[stored[here]], name=there)


def _notes(scaled: Scaled, folder: Path, found: Mapping[str, _Change]) -> list[str]:
    adapter = scaled.adapter
    n_whole = sum(change.whole is not None for change in found.values())
    n_pairs = sum(len(change.deltas) for change in found.values())
    ranks = sorted({pair.rank for pair in adapter.pairs})
    rank = f" of rank {listing(map(str, ranks), 4)}" if ranks else ""
    text = f"{printable(model_id(adapter.folder))} is merged at scale {scaled.scale:g}: {n_pairs:,}"
    text += f" matrices{rank}" + (f", {n_whole:,} tensors replaced" if n_whole else "")
    left_out = len(adapter.pairs) + len(adapter.whole) - n_pairs - n_whole
    if left_out:
        text += f"; {left_out:,} changes of parts that the file leaves out are ignored"
    notes = [text]
    base = model_id(Path(adapter.base)) if adapter.base else ""
    if base and base.lower() != model_id(folder).lower():
        notes.append(
            f"{printable(model_id(adapter.folder))} says that it was trained on "
            f"{printable(adapter.base)}; its shapes fit {printable(model_id(folder))}, whether its "
            "weights do cannot be seen"
        )
    return notes
