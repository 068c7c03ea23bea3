"""GELU has two forms: with erf, which config.json calls gelu, and close to it, with tanh.

llama.cpp computes the second whatever the model was trained with. The key hidden_activation, which
it reads for a few architectures only, tells our runtime where a model's own form is not the usual
one of its architecture.
"""

from gguf_tools.archs.architecture import MetadataRule
from gguf_tools.archs.config import HFConfig
from gguf_tools.archs.facts import GELU_TANH

GELU_ERF = "gelu"
TANH_FIRST = (*GELU_TANH, GELU_ERF)  # what may be in config.json; the first if it is silent
ERF_FIRST = (GELU_ERF, *GELU_TANH)

ACTIVATION = MetadataRule("hidden_activation", "str", "hidden_activation")


def unusual(config: HFConfig, key: str, known: tuple[str, ...]) -> str | None:
    """The activation, if it is not the form of the first of `known`."""
    name = config.text(key, default=known[0])
    return name if (name == GELU_ERF) != (known[0] == GELU_ERF) else None
