"""Helpers that import nothing else of growkern: argument types, interrupts, live objects, memory, renamed names, text, wrappers, ..."""
