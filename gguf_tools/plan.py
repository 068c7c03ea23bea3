"""What a conversion will write: every tensor with its type and size, and the metadata.

gguf_tools/matching.py says which tensors there are and what each is made from; here each gets a
type, and the sizes are added up. No weight is read.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gguf_tools import views
from gguf_tools.archs.transforms import Transform
from gguf_tools.errors import GGUFError, UnsupportedQuantError, printable
from gguf_tools.file_types import FileType, RecipeFacts
from gguf_tools.imatrix import Importance, ImportanceMatrix
from gguf_tools.matching import MatchedModel
from gguf_tools.model_card import card_metadata, read_card
from gguf_tools.naming import model_id, name_parts, size_label, title
from gguf_tools.overrides import NO_OVERRIDES, Overrides
from gguf_tools.quants import by_name
from gguf_tools.quants.quanttype import QuantType
from gguf_tools.recipes import (
    Choice,
    block_number,
    choose_types,
    is_quantisable,
    needs_importance,
    sorted_names,
)
from gguf_tools.safetensors_file import Bytes, LazyTensor
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.vocab.trial import Encodings
from gguf_tools.writer import TensorSpec, file_size

QUANTIZATION_VERSION = 2
PLAIN = ("F32", "F16", "BF16")
NOTHING_TO_WEIGH = (*PLAIN, "Q8_0", views.MXFP4)  # types that are the same with an importance


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output file."""

    name: str
    source: LazyTensor
    transform: Transform | None
    quant: QuantType
    choice: Choice
    importance: Importance | None = None
    ready: Callable[[int, int], Bytes] | None = None  # blocks of rows that are rounded already

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def is_second(self) -> bool:
        """Whether weights that were quantised before are rounded again."""
        return bool(self.source.scheme) and self.quant.name not in ("F32", self.source.dtype)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.quant, self.shape)

    @property
    def nbytes(self) -> int:
        return self.source.n_rows * self.quant.row_bytes(self.source.row_length)


@dataclass(frozen=True)
class Fallback:
    """Tensors of one kind that did not get the type that was asked for."""

    pattern: str  # blk.*.attn_k.weight
    count: int
    wanted: str
    type: str
    reason: str
    nbytes: int  # of all of them


@dataclass(frozen=True)
class Plan:
    """The whole output file, before its first byte is written."""

    file_type: FileType
    tensors: tuple[TensorPlan, ...]  # in the order of the file
    metadata: Mapping[str, MetadataValue]
    notes: tuple[str, ...]
    matrix: ImportanceMatrix | None = None
    encodings: Encodings | None = None  # of the test texts, by the checkpoint's tokenizer
    facts: RecipeFacts | None = None  # what the rules of file types ask; None of an adapter

    @property
    def specs(self) -> list[TensorSpec]:
        return [tensor.spec for tensor in self.tensors]

    @cached_property
    def total_size(self) -> int:
        return file_size(self.metadata, self.specs)

    @property
    def n_parameters(self) -> int:
        return sum(tensor.source.n_elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the tensors' bytes, as llama.cpp counts them; 0 of a vocabulary alone."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / max(self.n_parameters, 1)

    @property
    def types(self) -> Counter[str]:
        return Counter(tensor.quant.name for tensor in self.tensors)

    @property
    def fallbacks(self) -> list[Fallback]:
        groups: dict[tuple[str, str, str, str], list[int]] = {}
        for tensor in self.tensors:
            choice = tensor.choice
            if choice.reason:
                kind = (kind_of_name(tensor.name), choice.wanted, choice.type, choice.reason)
                groups.setdefault(kind, []).append(tensor.nbytes)
        return [Fallback(k[0], len(n), *k[1:], sum(n)) for k, n in groups.items()]

    @property
    def weighable(self) -> list[TensorPlan]:
        """The tensors that are quantised to a type that makes use of an importance matrix."""
        return [t for t in self.tensors if t.choice.type not in (*NOTHING_TO_WEIGH, t.source.dtype)]


def build_plan(
    model: MatchedModel,
    *,
    file_type: FileType,
    vocab_metadata: Mapping[str, MetadataValue],
    sampling: Mapping[str, MetadataValue],
    overrides: Overrides = NO_OVERRIDES,
    matrix: ImportanceMatrix | None = None,
    calibrates: bool = False,
) -> Plan:
    """Types, sizes and metadata of the output file.

    With `calibrates` types that need an importance are fine without a matrix: it is the plan of a
    file to be calibrated (gguf_tools/calibration.py), which refuses what it cannot give it to.
    """
    facts = model.facts
    recipe_facts = RecipeFacts(
        model.architecture.name,
        facts.n_layers,
        facts.n_heads,
        facts.n_kv_heads,
        facts.n_experts or 0,
        has_importance=matrix is not None,
        is_calibrated=calibrates,
    )
    tensors = plan_tensors(
        {tensor.name: (tensor.source, tensor.transform) for tensor in model.tensors},
        file_type=file_type,
        facts=recipe_facts,
        kept={t.name: _kept_type(t.name, t.source, overrides) for t in model.tensors},
        overrides=overrides,
        matrix=matrix,
    )
    metadata = {
        **_general_metadata(model, tensors, sampling),
        **model_metadata(model),
        **vocab_metadata,
        # Last, where llama-quantize puts them: its file and ours are then the same to the byte.
        "general.quantization_version": Value("u32", QUANTIZATION_VERSION),
        "general.file_type": Value("u32", file_type.file_type_id),
        **(matrix.metadata() if matrix is not None else {}),
    }
    notes = (*model.notes, *_second_quantisation(model.checkpoint.scheme, tensors))
    return Plan(file_type, tensors, metadata, notes, matrix, facts=recipe_facts)


def plan_tensors(
    sources: Mapping[str, tuple[LazyTensor, Transform | None]],
    *,
    file_type: FileType,
    facts: RecipeFacts,
    kept: Mapping[str, str],
    overrides: Overrides,
    matrix: ImportanceMatrix | None,
) -> tuple[TensorPlan, ...]:
    """Every tensor with its type, in the order of the file.

    `kept` has the types of those that stay as they are, and nothing (or "") for the others.
    """
    shapes = {name: source.shape for name, (source, _) in sources.items()}
    overrides.check(sorted_names(shapes), is_mix=file_type.is_mix, file_type=file_type.name)
    choices = choose_types(file_type, shapes, facts=facts, overrides=overrides)
    choices |= {name: Choice(type_, type_) for name, type_ in kept.items() if type_}
    if matrix is not None and all(name not in matrix.entries for name in shapes):
        raise GGUFError(
            f"{printable(matrix.path, limit=1000)}: expected the importance of this model's "
            f"tensors, found none of them, but {printable(next(iter(matrix.entries)))} and others; "
            "give the matrix that was made with this model"
        )
    tensors = []
    for name in sorted_names(shapes):
        (source, transform), choice = sources[name], choices[name]
        weighed = None
        if source.dtype != choice.type:  # others are copied
            weighed = _importance(name, source.shape, choice.type, matrix)
            needs = needs_importance(file_type, name, choice.type)
            if needs and weighed is None and not facts.is_calibrated:
                raise _lacks_importance(name, choice.type, file_type, matrix)
        tensors.append(TensorPlan(name, source, transform, by_name(choice.type), choice, weighed))
    return tuple(tensors)


def kind_of_name(name: str) -> str:
    """`blk.*.attn_k.weight` for those of all layers."""
    return "blk.*." + name.split(".", 2)[2] if block_number(name) >= 0 else name


def refuse_fallbacks(plan: Plan) -> None:
    """UnsupportedQuantError if a tensor did not get the type that was asked for."""
    if plan.fallbacks:
        fallback = plan.fallbacks[0]
        more = f", and {len(plan.fallbacks) - 1} more kinds" if len(plan.fallbacks) > 1 else ""
        raise UnsupportedQuantError(
            f"--strict: {printable(fallback.pattern)} would be {fallback.type} instead of "
            f"{fallback.wanted}{more}: {fallback.reason}; choose types that fit with --tensor-type "
            "or another --type (--dry-run without --strict shows them all)"
        )


def _kept_type(name: str, source: LazyTensor, overrides: Overrides) -> str:
    """The type of a tensor that stays as it is, or nothing."""
    if source.dtype == views.MXFP4:  # whatever the file type
        return views.MXFP4
    if not overrides.keeps(name) or not is_quantisable(name, source.shape):
        return ""
    return source.dtype if source.dtype in PLAIN else "F32"


def _importance(
    name: str, shape: tuple[int, ...], type_: str, matrix: ImportanceMatrix | None
) -> Importance | None:
    """What the matrix has of a tensor whose type makes use of it."""
    return None if matrix is None or type_ in NOTHING_TO_WEIGH else matrix.find(name, shape)


def _lacks_importance(
    name: str, type_: str, file_type: FileType, matrix: ImportanceMatrix | None
) -> UnsupportedQuantError:
    if matrix is None:
        what = "needs an importance matrix: give one with --imatrix, --calibrate the file"
    else:
        what = f"needs its importance, which {printable(matrix.path, limit=1000)} has not"
    return UnsupportedQuantError(
        f"tensor {printable(name)} as {type_} of a {file_type.name} file {what}, or choose Q2_K, "
        "which needs none"
    )


def _second_quantisation(scheme: str, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    """A note for those whose source has lost something already."""
    matrices = {tensor.quant.name for tensor in tensors if len(tensor.shape) > 1}
    lossy = sorted(matrices.difference(PLAIN))
    if not scheme:
        return ()
    said = f"the checkpoint is quantised already ({scheme})"
    if not lossy:
        return (f"{said}: its weights are written as they are, without what was lost then",)
    return (
        f"{said}: {', '.join(lossy)} quantise its weights a second time, and both errors add up; "
        "the original checkpoint, if there is one, gives a better file",
    )


# --- metadata -----------------------------------------------------------------------------------


def _general_metadata(
    model: MatchedModel, tensors: Sequence[TensorPlan], sampling: Mapping[str, MetadataValue]
) -> dict[str, MetadataValue]:
    """general.*, in the order of llama.cpp's converter."""
    n_parameters = sum(tensor.source.n_elements for tensor in tensors)
    folder = model.checkpoint.folder
    card = read_card(folder)
    name = model_id(folder)
    parts = name_parts(name, n_parameters)
    given = card.get("model_name", [])
    entries: dict[str, MetadataValue] = {
        "general.architecture": Value("str", model.architecture.name),
        "general.type": Value("str", "model"),
        **sampling,
        "general.name": Value("str", given[0] if given else title(name)),
    }
    for key, text in (
        ("version", parts.version),
        ("finetune", parts.fine_tune),
        ("basename", parts.base),
        ("size_label", parts.size or _size_label(tensors)),
    ):
        if text:
            entries[f"general.{key}"] = Value("str", text)
    return {**entries, **card_metadata(card)}


def _size_label(tensors: Sequence[TensorPlan]) -> str:
    """`135M`, or `8x7B`: as many experts, and what a model with a single one has."""
    stacked = [t.source for t in tensors if "_exps." in t.name and len(t.shape) >= 3]
    single = sum(source.n_elements // source.shape[0] for source in stacked)
    n_parameters = sum(tensor.source.n_elements for tensor in tensors)
    if not stacked:
        return size_label(n_parameters)
    others = n_parameters - sum(source.n_elements for source in stacked)
    return f"{stacked[0].shape[0]}x{size_label(others + single)}"


def model_metadata(model: MatchedModel) -> dict[str, MetadataValue]:
    """The keys `ARCHITECTURE.*`, of config.json's numbers."""
    name = model.architecture.name
    entries: dict[str, MetadataValue] = {}
    for rule in model.architecture.metadata:
        value = model.facts.value(rule.field)
        if isinstance(value, tuple):
            entries[f"{name}.{rule.key}"] = Array(rule.type, value)
        elif value is not None:
            entries[f"{name}.{rule.key}"] = Value(rule.type, value)
    for key, type_, value in model.facts.rope.metadata():
        entries[f"{name}.{key}"] = Value(type_, value)
    return entries
