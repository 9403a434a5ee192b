"""Run the command line in a process that may be sent signals: ``main(*arguments)``."""

import sys

from growkern.cli.main import main as run


def main(*arguments: object) -> None:
    sys.argv = ["growkern", *map(str, arguments)]
    run()
