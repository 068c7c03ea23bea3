"""What a model of this folder is made of."""

from dataclasses import dataclass
from typing import Any

VOCAB = 288  # the tokenizer has 280
CONTEXT = 128
WINDOW = 16
BEYOND_WINDOW = (1, 7, 33, 48)  # lengths of prompts


@dataclass(frozen=True)
class Case:
    """One folder."""

    name: str
    config: dict[str, Any]
    lengths: tuple[int, ...] = (1, 7, 33)  # of its prompts
    original_context: int = 0  # of longrope: prompts within it are answered with it as context
    top_k: int = 0  # experts chosen
    older_form: bool = False  # config.json as transformers 4 wrote it
    omitted: tuple[str, ...] = ()  # from config.json, being what transformers assumes
    bare: str = ""  # the prefix that tensor names have lost
    buffers: str = ""  # where early versions kept the causal mask, {layer} by {layer}
    like: str = ""  # the case whose weights it has
    gemma: bool = False  # norms are stored less one
    vision: bool = False
    embedding_spread: float = 1.0
    deep: bool = False  # so many layers that each may only change a little

    @property
    def weights(self) -> str:
        return self.like or self.name

    def context_for(self, length: int) -> int:
        small = 0 < length <= self.original_context
        return self.original_context if small else CONTEXT


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

SMALL = {  # of the second and further models of a family
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def case(name: str, model_type: str, *, config: dict[str, Any], **facts: Any) -> Case:
    sizes = {**SIZES, **SMALL} if "-" in name else SIZES
    config = {"model_type": model_type, **sizes, **config}
    return Case(name, {key: value for key, value in config.items() if value is not ...}, **facts)


def rope(kind: str = "default", base: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": base, **scaling}
