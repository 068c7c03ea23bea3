"""Quantising with second-order error feedback (GPTQ), onto the exact blocks of GGUF's formats."""
