"""Pairwise covering: a choice among many cases that still holds every pair of values."""

from itertools import combinations


def pairwise(cases: list[tuple]) -> list[tuple]:
    """Return some of the cases, in their order, in which every pair of values of two places occurs that occurs in all of the cases."""
    pairs = [set(combinations(enumerate(map(repr, case)), 2)) for case in cases]
    missing, kept = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        kept.add(best)
        missing -= pairs[best]
    return [cases[i] for i in sorted(kept)]
