"""From a model's configuration and tensors to its program: one file per kind of block."""

from __future__ import annotations

from collections.abc import Callable

from gguf_tools.errors import FormatError, UnsupportedModelError, printable
from runtime.config import ModelConfig
from runtime.decoders import deepseek2, gemma, gpt, gptoss, llama, olmo2, stablelm
from runtime.program import Program
from runtime.sources import Source
from runtime.weights import Weights

Build = Callable[[Weights, ModelConfig, int], Program]

DECODERS: dict[str, Build] = {
    "llama": llama.build,
    "qwen2": llama.build_qwen2,
    "qwen3": llama.build_qwen3,
    "qwen2moe": llama.build_qwen2moe,
    "qwen3moe": llama.build_qwen3moe,
    "smollm3": llama.build_smollm3,
    "granite": llama.build_granite,
    "olmo2": olmo2.build,
    "gemma": gemma.build,
    "gemma2": gemma.build_gemma2,
    "gemma3": gemma.build_gemma3,
    "phi3": llama.build_phi3,
    "gpt2": gpt.build_gpt2,
    "starcoder2": gpt.build_starcoder2,
    "gptneox": gpt.build_gptneox,
    "deepseek2": deepseek2.build,
    "gpt-oss": gptoss.build,
    "stablelm": stablelm.build,
}


def check_architecture(file: Source) -> None:
    """Refuse a file that no decoder here runs, before its other keys are looked at.

    UnsupportedModelError lists the known architectures; FormatError for a file without weights.
    """
    found = file.metadata.get("general.architecture")
    if isinstance(found, str) and found not in DECODERS:
        raise UnsupportedModelError(
            f"{printable(file.path)}: the architecture {printable(found)} cannot be "
            f"run yet; known: {', '.join(sorted(DECODERS))}"
        )
    if not file.tensors:
        raise FormatError(f"{printable(file.path)}: holds a vocabulary only, no weights to run")


def build_program(
    file: Source,
    config: ModelConfig,
    *,
    n_ctx: int = 0,
    in_memory: bool = False,
    stream: bool = False,
) -> Program:
    """The program of the model in `file`, to be run with a context of n_ctx tokens.

    The context matters to models whose positions change beyond their original one (longrope); 0
    stands for the context they were trained for. With `in_memory` the weights are copied from the
    mapped file; with `stream` matrices are read when they are multiplied with.

    UnsupportedModelError lists the known architectures; MissingTensorError names every tensor
    that is missing, of another shape, or not expected.
    """
    check_architecture(file)
    weights = Weights(file, in_memory=in_memory, stream=stream)
    program = DECODERS[config.architecture](weights, config, n_ctx or config.n_ctx_train)
    weights.finish()
    return program
