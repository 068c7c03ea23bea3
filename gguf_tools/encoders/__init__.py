"""The tokenizer of a GGUF file: its metadata, checked, and the encoders that run it."""

from gguf_tools.encoders.text import GUARD, TextEncoder, well_formed
from gguf_tools.encoders.vocabulary import Vocabulary, read_vocabulary

__all__ = ["GUARD", "TextEncoder", "Vocabulary", "read_vocabulary", "well_formed"]
