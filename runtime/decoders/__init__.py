"""From a model's configuration and tensors to its program: one file per kind of block."""

from __future__ import annotations

from gguf_tools.errors import FormatError, UnsupportedModelError, printable
from gguf_tools.reader import GGUFFile
from runtime.config import ModelConfig
from runtime.decoders import llama
from runtime.program import Program
from runtime.weights import Weights

DECODERS = {"llama": llama.build}


def build_program(file: GGUFFile, config: ModelConfig) -> Program:
    """The program of the model in `file`.

    UnsupportedModelError lists the known architectures; MissingTensorError names every tensor
    that is missing, of another shape, or not expected.
    """
    build = DECODERS.get(config.architecture)
    if build is None:
        raise UnsupportedModelError(
            f"{printable(file.path)}: the architecture {printable(config.architecture)} cannot be "
            f"run yet; known: {', '.join(sorted(DECODERS))}"
        )
    if not file.tensors:
        raise FormatError(f"{printable(file.path)}: holds a vocabulary only, no weights to run")
    weights = Weights(file)
    program = build(weights, config)
    weights.finish()
    return program
