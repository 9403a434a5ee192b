"""What knows nothing of growkern: memory, dtypes, interrupts, tensors by name, text, wrappers."""
