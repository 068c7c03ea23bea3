"""Which types the tensors of a model can have, and what choices of them come to.

A choice is told as a list of --tensor-type options, with which it can be made again.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gguf_tools import views
from gguf_tools.describe import TARGET, short_size
from gguf_tools.errors import GGUFError, UnsupportedQuantError
from gguf_tools.file_types import FileType
from gguf_tools.mixture import Option, choose, least_size
from gguf_tools.overrides import EMBEDDINGS, WRITTEN, Overrides, Pattern
from gguf_tools.plan import Plan, TensorPlan, kind_of_name
from gguf_tools.quants import by_name
from gguf_tools.recipes import (
    BLOCK_SIZES,
    NEED_IMPORTANCE,
    available,
    block_number,
    choose_types,
    is_quantisable,
)
from gguf_tools.target_options import Target
from gguf_tools.type_trials import Measured
from gguf_tools.values import DEFAULT_ALIGNMENT, MetadataValue, Value
from gguf_tools.writer import file_size

TRIED = tuple(type_ for type_ in WRITTEN if type_ not in ("F32", "BF16"))
MAX_TEXT_NAME = 127  # bytes, as of other names that files keep

Types = Mapping[str, str]  # of tensors, by name


@dataclass(frozen=True)
class Mixture:
    """A choice for all free tensors."""

    file_type: FileType  # that it is, or is closest to
    types: Types
    n_bytes: int  # of the file
    patterns: tuple[Pattern, ...] = ()
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


class Choices:
    """A target for one model: which tensors can have which types, and what that comes to."""

    def __init__(
        self,
        target: Target,
        base: Plan,
        overrides: Overrides,
        room: int = 0,
        others: Sequence[str] = (),
    ) -> None:
        """`base` is the plan of any file type; `room` are bytes that the file needs besides;
        `others` are options that decide bytes, beside those on types and their importance.
        """
        self._target, self._base, self._overrides = target, base, overrides
        self._free = {t.name: t for t in base.tensors if _is_free(t, base, overrides)}
        self.types: dict[str, list[str]] = {
            name: [type_ for type_ in TRIED if tensor.shape[-1] % BLOCK_SIZES[type_] == 0]
            for name, tensor in self._free.items()
        }
        taken = sum(_padded(tensor.nbytes) for tensor in self._free.values())
        self._room, self._options = room, others
        self._others = base.total_size + room - taken  # what no choice changes

    def check(self) -> None:
        """Refuse what no choice can reach, and what needs none."""
        if not self._free:
            raise GGUFError(f"{self._target.option}: there is no tensor whose type can be chosen")
        smallest, largest = (
            {name: pick(types, key=_bits) for name, types in self.types.items()}
            for pick in (min, max)
        )
        if not self._fits(smallest):
            raise UnsupportedQuantError(
                f"{self._target.option}: this model takes at least {self._said(smallest)}, with "
                "every tensor in the smallest type that its rows fit; ask for more"
            )
        if self._fits(largest):
            raise GGUFError(
                f"{self._target.option}: nothing so large is needed: with all weights in F16 this "
                f"model takes {self._said(largest)}; choose --type F16 or BF16"
            )

    def tried(self) -> Types:
        """The type of each tensor that is measured: about as large as the mean will be."""
        n_weights = sum(tensor.source.n_elements for tensor in self._free.values())
        mean = 8 * self._budget / n_weights
        chosen = {}
        for name, types in self.types.items():
            fitting = [type_ for type_ in types if _bits(type_) <= mean]
            chosen[name] = max(fitting, key=_bits) if fitting else min(types, key=_bits)
        return chosen

    def solve(self, measured: Measured) -> Mixture:
        """The mixture of least cost that fits, with what the file tells of it."""
        options = {
            name: [
                Option(type_, self._n_bytes(tensor, type_), cost)
                for type_, cost in measured.costs[name].items()
            ]
            for name, tensor in self._free.items()
        }
        closest = self.best_recipe(measured) or self._smallest_recipe()
        budget = self._budget
        while True:  # what the file tells of its choice takes room, too
            if least_size(options) > budget:
                raise UnsupportedQuantError(
                    f"{self._target.option}: there is no room for the smallest types and what the "
                    "file tells of its making; ask for a little more"
                )
            types = {name: option.type for name, option in choose(options, budget).items()}
            patterns = (*self._overrides.patterns, *_patterns(types))
            metadata = self._metadata(measured, closest, patterns)
            mixture = Mixture(
                closest.file_type, types, self._exactly(types, metadata), patterns, metadata
            )
            excess = (
                mixture.n_bytes
                + self._room
                - (self._target.n_bytes or mixture.n_bytes + self._room)
            )
            if excess <= 0:
                return mixture
            budget -= excess

    def best_recipe(self, measured: Measured) -> Mixture | None:
        """The file type that fits and is expected to cost least; None if all are larger."""
        fitting = [recipe for recipe in self._recipes() if self._fits(recipe.types)]

        def cost(recipe: Mixture) -> float:
            return expected(recipe.types, measured)

        return min(fitting, key=cost, default=None)

    def _smallest_recipe(self) -> Mixture:
        return min(self._recipes(), key=lambda recipe: recipe.n_bytes)

    def _recipes(self) -> Iterator[Mixture]:
        """The types that each file type gives the free tensors."""
        facts = self._base.facts
        assert facts is not None
        shapes = {tensor.name: tensor.shape for tensor in self._base.tensors}
        for file_type in available():
            lacks = not (facts.has_importance or facts.is_calibrated)
            if file_type.is_mix and not (lacks and file_type.name in NEED_IMPORTANCE):
                choices = choose_types(file_type, shapes, facts=facts, overrides=self._overrides)
                types = {name: choices[name].type for name in self._free}
                yield Mixture(file_type, types, self._total(types))

    @property
    def _budget(self) -> int:
        """Bytes for the tensors whose types are chosen."""
        if self._target.n_bytes is not None:
            return self._target.n_bytes - self._others
        free = sum(tensor.nbytes for tensor in self._free.values())
        others = sum(tensor.nbytes for tensor in self._base.tensors) - free
        return int((self._target.bits_per_weight or 0) * self._base.n_parameters / 8) - others

    def _n_bytes(self, tensor: TensorPlan, type_: str) -> int:
        """Of a tensor; in a target of bits per weight without what fills up a file."""
        n_bytes = tensor.source.n_rows * by_name(type_).row_bytes(tensor.source.row_length)
        return n_bytes if self._target.n_bytes is None else _padded(n_bytes)

    def _fits(self, types: Types) -> bool:
        return (
            sum(self._n_bytes(self._free[n], type_) for n, type_ in types.items()) <= self._budget
        )

    def _total(self, types: Types) -> int:
        """Bytes of the file, but for what it tells of a choice."""
        sizes = (_with_type(self._free[name], type_).nbytes for name, type_ in types.items())
        return self._others - self._room + sum(map(_padded, sizes))

    def _exactly(self, types: Types, metadata: Mapping[str, MetadataValue]) -> int:
        """Bytes of the file with these metadata; its whole header is encoded for that."""
        free = {name: _with_type(self._free[name], type_) for name, type_ in types.items()}
        specs = [free[t.name].spec if t.name in free else t.spec for t in self._base.tensors]
        return file_size({**self._base.metadata, **metadata}, specs)

    def _said(self, types: Types) -> str:
        """The size of such a file, for a sentence."""
        free = sum(tensor.nbytes for tensor in self._free.values())
        n_bytes = sum(t.nbytes for t in self._base.tensors) - free
        n_bytes += sum(_with_type(self._free[n], type_).nbytes for n, type_ in types.items())
        total = self._total(types)
        bits = 8 * n_bytes / max(self._base.n_parameters, 1)
        return f"{total:,} bytes ({short_size(total)}, {bits:.2f} bits per weight)"

    def _metadata(
        self, measured: Measured, closest: Mixture, patterns: Sequence[Pattern]
    ) -> dict[str, MetadataValue]:
        """How the choice was made, and the options that make it again."""
        if self._target.n_bytes is not None:
            asked = {"size": Value("u64", self._target.n_bytes)}
        else:
            asked = {"bits_per_weight": Value("f64", self._target.bits_per_weight)}
        words = ["convert", "MODEL", "--type", closest.file_type.name]
        for pattern in patterns:
            words += ["--tensor-type", f"{pattern.regex.pattern}={pattern.type}"]
        words += self._options
        for option, value in (
            ("--output-type", self._overrides.output),
            ("--embedding-type", self._overrides.embedding),
            *(("--keep", name) for name in self._overrides.keep),
            ("--imatrix", str(self._base.matrix.path) if self._base.matrix else ""),
        ):
            words += [option, value] if value else []
        text = measured.text.encode(errors="replace")[:MAX_TEXT_NAME].decode(errors="ignore")
        # Numbers that are not known yet take the room that they will.
        return prefixed(
            {
                **asked,
                "command": Value("str", shlex.join(words)),
                "text": Value("str", text),
                "text_sha256": Value("str", measured.digest),
                "tokens": Value("u32", measured.tokens),
                "file_type": Value("str", closest.file_type.name),
                "kl": Value("f32", 0.0),
                "kl_tokens": Value("u32", 0),
                **({"file_type_kl": Value("f32", 0.0)} if self._fits(closest.types) else {}),
            }
        )


def expected(types: Types, measured: Measured) -> float:
    """The mean KL divergence that such a mixture is expected to have."""
    return sum(measured.costs[name].get(type_, 0.0) for name, type_ in types.items())


def _is_free(tensor: TensorPlan, plan: Plan, overrides: Overrides) -> bool:
    """Whether a tensor's type is to be chosen: a matrix that the user said nothing about."""
    name = tensor.name
    is_tied = all(other.name != "output.weight" for other in plan.tensors)
    is_head = name == "output.weight" or (name in EMBEDDINGS and is_tied)
    return (
        is_quantisable(name, tensor.shape)
        and tensor.quant.name != views.MXFP4
        and not overrides.keeps(name)
        and not overrides.by_pattern(name)
        and not overrides.final(name)
        and not (is_head and overrides.output)
    )


def _patterns(types: Types) -> Iterator[Pattern]:
    """Options that give just these types: for each kind the exceptions first, then the rest."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for name, type_ in types.items():
        kinds.setdefault(kind_of_name(name), {}).setdefault(type_, []).append(block_number(name))
    for kind, by_type in kinds.items():
        *few, most = sorted(by_type, key=lambda type_: (len(by_type[type_]), type_))
        end = re.escape(kind.removeprefix("blk.*."))
        for type_ in few:
            layers = "|".join(map(str, by_type[type_]))
            yield Pattern(re.compile(rf"^blk\.({layers})\.{end}$", re.IGNORECASE), type_)
        start = r"^blk\.\d+\." if kind.startswith("blk.*.") else "^"
        yield Pattern(re.compile(f"{start}{end}$", re.IGNORECASE), most)


def _with_type(tensor: TensorPlan, type_: str) -> TensorPlan:
    return replace(tensor, quant=by_name(type_))


def _bits(type_: str) -> float:
    quant = by_name(type_)
    return 8 * quant.block_bytes / quant.block_size


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % DEFAULT_ALIGNMENT


def prefixed(entries: Mapping[str, MetadataValue]) -> dict[str, MetadataValue]:
    return {TARGET + name: value for name, value in entries.items()}
