"""How a growth changes an optimizer: growth rules of its state, factors on its learning rates. Live optimizers are only read."""
