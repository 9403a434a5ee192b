"""Runs in processes that tests may kill, forked from a server that has imported their modules once.

The imports of torch, transformers and Lightning take 9 of the 10 seconds that such a run takes in a fresh interpreter.
"""

import importlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
WORKERS = ["killed_hf", "killed_lightning"]
WORKERS += ["resume_worker", "ddp_worker", "peak_worker", "refused_worker"]
WORKERS += ["cli_worker", "cut_worker", "fsdp_worker", "tensor_parallel_worker"]
WORKERS += [
    "sharded_peak_worker",
    "gather_worker",
    "engines_worker",
    "wrapped_worker",
    "dcp_worker",
    "dcp_peak_worker",
]

together = pytest.mark.xdist_group("processes")  # one server is enough


def start(worker: str, *arguments: object, log: Path) -> BaseProcess:
    """Start ``main(*arguments)`` of a worker module; the process appends its output to the file ``log``."""
    SERVER.set_forkserver_preload(WORKERS)
    process = SERVER.Process(target=_run, args=(worker, arguments, log))
    # the server finds the workers, and the growkern that is tested here
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()
    return process


def end(processes: Sequence[BaseProcess], log: Path, status: int = 0) -> None:
    """Wait for processes to end, each with this exit status: a signal's number, negated, where a signal ended it."""
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [status] * len(processes), log.read_text()[-4000:]


def wait_for_lines(process: BaseProcess, log: Path, n: int) -> None:
    """Wait until a process has written ``n`` lines that are numbers: steps that it has saved."""
    while not log.exists() or sum(line.isdigit() for line in log.read_text().split("\n")) < n:
        assert process.is_alive(), log.read_text()[-4000:]


def kill(*_: object) -> None:
    """Kill the process that calls."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run(worker: str, arguments: Sequence[object], log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    importlib.import_module(worker).main(*arguments)
