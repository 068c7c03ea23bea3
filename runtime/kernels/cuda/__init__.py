"""The CUDA kernels, written as Python functions that numba-cuda compiles.

Three kinds of functions:

    primitives   an instruction of the GPU, with a body in plain Python that says what it does
    @helper      what one lane computes; compiled for the CPU as well, which is how it is tested
    @cuda.jit    kernels: which lane does what, shared memory and barriers

Buffers are flat arrays of float32; token t of a buffer starts at t * stride.
"""
