"""The machine: run a GGUF file on this computer and talk with it."""
