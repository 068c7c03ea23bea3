"""`python -m gguf_tools convert MODEL_DIR`, `python -m gguf_tools info FILE`."""

from gguf_tools.cli import main

if __name__ == "__main__":
    main()
