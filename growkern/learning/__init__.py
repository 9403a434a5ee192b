"""Learned growth: the index maps of a plan become matrices of parameters, which a few steps of training learn (LiGO, Mango)."""
