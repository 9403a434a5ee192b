"""What a plan may say of optimizer state and of learning rates."""

STATES = ("exact", "copy", "asymmetric", "zero_pad", "drop")


DYNAMICS = ("mup", "exact", None)
