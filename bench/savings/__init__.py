"""Savings by growth: annealed held-out losses at equal FLOPs of runs that grow, runs from scratch, and sources that never grow."""
