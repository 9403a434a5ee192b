"""Pairwise covering: a choice among many cases that still holds every pair of values."""

from collections import Counter
from itertools import combinations


def pairwise(cases: list[tuple]) -> list[tuple]:
    """Return some of the cases, in their order, in which every pair of values of two places occurs that occurs in all of the cases.

    Of the cases that bring the most new pairs, the one is taken whose pairs were met the least, so that values mix evenly.
    """
    pairs = [set(combinations(enumerate(map(repr, case)), 2)) for case in cases]
    missing, met, kept = set().union(*pairs), Counter(), set()

    def value(i: int) -> tuple[int, int]:
        return len(pairs[i] & missing), -sum(met[pair] for pair in pairs[i])

    while missing:
        best = max(range(len(cases)), key=value)
        kept.add(best)
        met.update(pairs[best])
        missing -= pairs[best]
    return [cases[i] for i in sorted(kept)]
