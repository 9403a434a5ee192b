"""Modes of the optimizer state (``state=``) and of the learning rates (``dynamics=``)."""

STATES = ("exact", "copy", "asymmetric", "zero_pad", "drop")


DYNAMICS = ("mup", "exact", None)
