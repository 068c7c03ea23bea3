"""A LoRA adapter as a GGUF file of its own, which a runtime adds to a model while it runs.

    blk.0.attn_q.weight.lora_a   (r, inputs)       blk.0.attn_q.weight.lora_b   (outputs, r)
    token_embd.weight.lora_a     (tokens, r)       token_embd.weight.lora_b     (outputs, r)

The runtime adds scale * adapter.lora.alpha / r * B @ A (llama.cpp's src/llama-adapter.h). What is
done to a matrix's rows on the way to GGUF, such as the new order of q and k, is done to B's.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gguf_tools import archs, views
from gguf_tools.archs.architecture import Architecture, ModelFacts, TensorRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.checkpoint import CONFIG_NAME, listing
from gguf_tools.errors import CheckpointError, UnsupportedQuantError, printable
from gguf_tools.file_types import FileType
from gguf_tools.json_files import read_json, shown
from gguf_tools.lora import Adapter, Pair
from gguf_tools.lora_merging import is_transposed, rule_pattern
from gguf_tools.model_card import card_metadata, read_card
from gguf_tools.naming import model_id, title
from gguf_tools.plan import QUANTIZATION_VERSION, Plan, TensorPlan
from gguf_tools.quants import by_name
from gguf_tools.recipes import Choice
from gguf_tools.safetensors_file import Floats, LazyTensor
from gguf_tools.values import Array, MetadataValue, Value

TYPES = ("F32", "F16", "BF16")


def plan_adapter(
    adapter: Adapter, file_type: FileType, base: str | os.PathLike[str] | None = None
) -> Plan:
    """What the file will hold. Of the base, a folder, only config.json is read.

    Without `base` it is the folder that the adapter itself names, if there is such a folder.
    """
    if file_type.name not in TYPES:
        raise UnsupportedQuantError(
            f"type {file_type.name}: an adapter is written as {', '.join(TYPES)}: its matrices are "
            "too thin for blocks"
        )
    folder = _base_folder(adapter, base)
    config = HFConfig(read_json(folder / CONFIG_NAME), shown(folder / CONFIG_NAME))
    architecture = archs.find(config)
    facts = architecture.read_facts(config)
    if adapter.whole:
        names = listing(map(printable, adapter.whole), 3)
        raise CheckpointError(
            f"{shown(adapter.folder)} has tensors whole ({names}), for which a GGUF adapter has no "
            "place: merge it with --lora"
        )
    alpha = adapter.alpha
    if adapter.rank_stabilised:  # GGUF knows alpha / r only
        alpha = max(pair.factor * pair.rank for pair in adapter.pairs)
    quant = by_name(file_type.name)
    choice = Choice(quant.name, quant.name)
    tensors: list[TensorPlan] = []
    problems: list[str] = []
    for pair in adapter.pairs:
        rules = list(_rules(pair, architecture, facts))
        problem = _problem(pair, rules, architecture, facts)
        if problem:
            problems.append(problem)
            continue
        for name, rule in rules:
            a = views.transposed(pair.a) if pair.embedding else pair.a
            b = _times(pair.b, pair.factor * pair.rank / alpha)
            if rule.part is not None:
                b = views.part(b, *rule.part)
            if rule.regrouped is not None:
                b = views.regrouped(b, *rule.regrouped(facts))
            change = rule.transform(facts) if rule.transform else None
            tensors.append(TensorPlan(f"{name}.lora_a", a, None, quant, choice))
            tensors.append(TensorPlan(f"{name}.lora_b", b, change, quant, choice))
    if problems:
        raise CheckpointError(
            f"{shown(adapter.folder)} cannot be an adapter for {shown(folder)} "
            f"({architecture.name}): {listing(problems, 5)}"
        )
    metadata: dict[str, MetadataValue] = {
        "general.architecture": Value("str", architecture.name),
        "general.type": Value("str", "adapter"),
        "general.name": Value("str", title(model_id(adapter.folder))),
        **card_metadata(read_card(adapter.folder)),
        "adapter.type": Value("str", "lora"),
        "adapter.lora.alpha": Value("f32", alpha),
    }
    if adapter.invocation_tokens:
        tokens = Array("u32", adapter.invocation_tokens)
        metadata["adapter.alora.invocation_tokens"] = tokens
    metadata["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    metadata["general.file_type"] = Value("u32", file_type.file_type_id)
    return Plan(file_type, tuple(tensors), metadata, ())


def _base_folder(adapter: Adapter, base: str | os.PathLike[str] | None) -> Path:
    folder = Path(base if base is not None else adapter.base or "\0")
    try:
        found = (folder / CONFIG_NAME).is_file()
    except ValueError:  # a name that no file can have
        found = False
    if found:
        return folder
    if base is not None:
        raise CheckpointError(f"--base {shown(folder)} has no {CONFIG_NAME}: expected a checkpoint")
    named = f" (it says {printable(adapter.base)})" if adapter.base else ""
    raise CheckpointError(
        f"{shown(adapter.folder)}: expected --base MODEL_DIR, the model that the adapter was "
        f"trained on{named}: its {CONFIG_NAME} is needed, its weights are not"
    )


def _rules(
    pair: Pair, architecture: Architecture, facts: ModelFacts
) -> Iterator[tuple[str, TensorRule]]:
    """The tensors of the file that are made from the pair's module, with their rules."""
    source = architecture.rename(pair.module + ".weight")
    on = facts.switches | {switch for switch, _ in architecture.layouts}
    for rule in (architecture.embedding, architecture.head, *architecture.tensors):
        match = rule_pattern(rule.source).fullmatch(source)
        if match is None or (rule.when and rule.when not in on):
            continue
        layer = int(match.groupdict().get("layer") or 0)
        if layer in (rule.layers(facts) if rule.layers else range(max(facts.n_layers, 1))):
            yield rule.name.replace("{layer}", str(layer)), rule


def _problem(
    pair: Pair, rules: list[tuple[str, TensorRule]], architecture: Architecture, facts: ModelFacts
) -> str:
    """Why the pair has no place in a file; nothing if it has."""
    module = printable(pair.module)
    if not rules:
        return f"the base has no {module}"
    source = architecture.rename(pair.module + ".weight")
    if source == architecture.head.source and facts.tied:
        return f"{module} is tied to the embedding and no tensor of its own: merge it with --lora"
    rule = rules[0][1]
    if rule.cut or rule.every or rule.mxfp4 or "{expert}" in rule.source or len(rule.shape) != 2:
        return f"{module} has another form in GGUF than one matrix: merge it with --lora"
    expected = rule.source_shape(facts)
    if is_transposed(architecture, source):
        expected = expected[::-1]
    found = (pair.b.shape[0], pair.a.shape[1])
    found = found[::-1] if pair.embedding else found
    return "" if found == expected else f"{module} is {expected}, the adapter's change {found}"


def _times(tensor: LazyTensor, factor: float) -> LazyTensor:
    """The tensor times what alpha / r leaves out: a rank or an alpha of its own."""
    if abs(factor - 1) < 1e-6:
        return tensor

    def load(first: int, last: int) -> Floats:
        return tensor.load(first, last) * np.float32(factor)

    return LazyTensor(tensor.name, tensor.shape, "F32", load)
