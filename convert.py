"""`python convert.py MODEL_DIR` is the same as `convert MODEL_DIR`."""

from gguf_tools.cli import convert_main

if __name__ == "__main__":
    convert_main()
