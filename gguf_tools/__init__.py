"""What the bytes mean: read and write GGUF files, read checkpoints, quantise, convert."""

__version__ = "0.1.0"
