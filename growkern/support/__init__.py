"""Helpers that import nothing else of growkern: memory, dtypes, interrupts, live objects, named tensors, renamed names, text, wrappers."""
