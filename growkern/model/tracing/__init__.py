"""Description of a model by one forward: which coordinates of which tensors move together."""
