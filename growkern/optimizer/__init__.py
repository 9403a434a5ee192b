"""What a growth means for an optimizer: the rules of its state, its learning rates; nothing is written to a live one."""
