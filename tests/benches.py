"""Helpers that import ``bench/``, which is not installed, from the repository root, and read its results."""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def importable() -> Iterator[None]:
    """Keep the repository root on ``sys.path``."""
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))


def rows_of(folder: Path, curves: bool = False) -> list[dict[str, str]]:
    """Read the only CSV file of results in a folder, or the only one of loss curves."""
    (path,) = [p for p in folder.glob("*.csv") if p.stem.endswith("-curves") == curves]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
