"""The architectures that can be converted: one data file each.

An architecture names its tensors, says what each one's shape follows from and how it is to be
changed, and which metadata describe it. Nothing here reads a file or touches a weight.
"""

from gguf_tools.archs import (
    deepseek2,
    gemma,
    gemma3,
    gpt2,
    gptneox,
    gptoss,
    granite,
    llama,
    mixtral,
    olmo2,
    phi3,
    qwen,
    qwenmoe,
    smollm3,
    stablelm,
    starcoder2,
)
from gguf_tools.archs.architecture import Architecture
from gguf_tools.archs.config import HFConfig
from gguf_tools.errors import UnsupportedModelError, printable

ARCHITECTURES: tuple[Architecture, ...] = (
    llama.ARCHITECTURE,
    mixtral.ARCHITECTURE,
    qwen.QWEN2,
    qwen.QWEN3,
    qwenmoe.QWEN2MOE,
    qwenmoe.QWEN3MOE,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma3.ARCHITECTURE,
    smollm3.ARCHITECTURE,
    granite.ARCHITECTURE,
    olmo2.ARCHITECTURE,
    phi3.ARCHITECTURE,
    gpt2.ARCHITECTURE,
    starcoder2.ARCHITECTURE,
    stablelm.ARCHITECTURE,
    gptneox.ARCHITECTURE,
    gptoss.ARCHITECTURE,
    deepseek2.ARCHITECTURE,
)


def find(config: HFConfig) -> Architecture:
    """The architecture that config.json names: its class, or its model_type if it names no class.

    UnsupportedModelError lists those that are known.
    """
    class_name, model_type = config.class_name, config.model_type
    for architecture in ARCHITECTURES:
        if class_name in architecture.classes:
            return architecture
        if not class_name and model_type in architecture.model_types:
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    found = class_name or model_type
    if not found:
        raise UnsupportedModelError(
            f"{config.where}: architectures: expected one of {known}, found neither this nor a "
            "model_type"
        )
    raise UnsupportedModelError(
        f"{config.where}: architecture {printable(found)} is not supported; known are {known}"
    )
