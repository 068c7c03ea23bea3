"""Checks for a GPU or the simulator: tests/cuda/test_simulator.py and benchmarks/gpu.py run them.

A process has either numba.cuda or its simulator, so they run in processes of their own.
"""
