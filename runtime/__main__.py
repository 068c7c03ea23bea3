"""`python -m runtime ...` is `run ...`; `python -m runtime bench` and `doctor` are those."""

from runtime.cli import main

if __name__ == "__main__":
    main()
