"""What growing saves: annealed held-out loss at equal FLOPs, of runs that grow, runs from scratch, and sources that never grow."""
