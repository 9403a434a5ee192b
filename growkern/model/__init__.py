"""DESCRIBE: a model to a ModelSpec of names and shapes, without values."""
