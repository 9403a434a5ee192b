"""Cut the shards of a checkpoint short while it is read, and print the error: ``main(source, out, command, when)``.

In a process of its own: reading a memory map of a file that was cut short ends the process.
"""

import os
from pathlib import Path

from growkern.checkpoints import grow, load
from growkern.errors import CheckpointError


def main(source: Path, out: Path, command: str, when: str) -> None:
    def cut(*_: int) -> None:
        for path in source.glob("*.safetensors"):
            os.truncate(path, 0)

    slices = load.slices

    def cut_first(*arguments):
        cut()
        return slices(*arguments)

    if when == "load":
        load.slices = cut_first
    try:
        if command == "grow":
            grow.grow(source, out, on_progress=cut)
        else:
            load.load(source)
        print("accepted")
    except CheckpointError as error:
        print("refused:", str(error).replace("\n", " "))
