"""The fast quantisers, one file per format; compiled at first use.

Each module has

    quantize(x, data, n_blocks, scratch)    addresses; float32 blocks become bytes
    GROUP      n_blocks must be a multiple of it
    SCRATCH    bytes the kernel may use at `scratch`, which is 64-byte aligned

and, where ggml quantises otherwise with an importance matrix, in the same way

    quantize_weighted(x, weights, data, n_blocks, scratch)    weights: how much an error counts
    WEIGHTED_GROUP, WEIGHTED_SCRATCH

ggml's reference routines add in a fixed order, and every bit of the result hangs on it. So a
kernel turns the weights around: what ggml does for one group of weights after the other is done
for 16 groups at once, one in each lane, in the same order within the lane. There is no fused
multiply-add and no reassociation anywhere; the bytes equal those of the references.
"""
