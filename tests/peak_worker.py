"""Grow a checkpoint in a process of its own and print the peak of its memory: ``main(small, big, out, to)``.

The peak is over what is resident after the growth of a small checkpoint, which imports and allocates what is needed once.
"""

from pathlib import Path

import torch

from growkern.checkpoints import grow as checkpoint
from growkern.support import memory


def resident(key: str) -> int:
    """Return a figure of this process in bytes: ``VmRSS``, or ``VmHWM`` for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main(small: Path, big: Path, out: Path, to: object) -> None:
    torch.set_num_threads(1)
    checkpoint.grow(small, out / "first")
    memory.trim()
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    grown = checkpoint.grow(big, out / "big", to=to)
    print("peak", resident("VmHWM") - start, *grown.n_bytes)
