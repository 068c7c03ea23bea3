"""What can be done with GGUF files: compare, edit, verify, split and merge them."""
