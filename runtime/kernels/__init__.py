"""Compiled kernels of the CPU backend: one file per block format, and the steps of a program."""
