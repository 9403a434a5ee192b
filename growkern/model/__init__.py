"""DESCRIBE: what a model is, as names and shapes; never values."""
