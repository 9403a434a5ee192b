"""Helpers that import nothing else of growkern: argument types, memory, dtypes, interrupts, live objects, named tensors, renamed names, text, wrappers."""
