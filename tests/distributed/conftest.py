"""Results of the worker of a test module, run once in every number of processes."""

from collections.abc import Callable
from functools import cache

import processes
import pytest
import torch


@pytest.fixture(scope="module")
def found_in(tmp_path_factory, request) -> Callable[[int], dict]:
    """Return a function that runs the module's ``WORKER`` in n processes, once, and returns the saved results of each rank."""

    @cache
    def found(n: int) -> dict:
        folder = tmp_path_factory.mktemp("processes")
        log, worker = folder / "log", request.module.WORKER
        started = [processes.start(worker, folder, rank, n, log=log) for rank in range(n)]
        processes.end(started, log)
        return {rank: torch.load(folder / f"{rank}.pt") for rank in range(n)}

    return found


@pytest.fixture
def assert_as_alone() -> Callable[[dict, dict], None]:
    """Return a function that compares a run with the run of one process: all at the growth, losses, and weights at the end."""

    def check(run: dict, alone: dict) -> None:
        assert run["kept"] and run["preserves"] == alone["preserves"]
        assert run["state"].keys() == alone["state"].keys()
        for key, value in alone["state"].items():
            torch.testing.assert_close(run["state"][key], value, rtol=1e-10, atol=1e-14, msg=str(key))  # fmt: skip
        for name, tensors in alone.get("grown", {}).items():
            for own, t in zip(run["grown"][name], tensors, strict=True):
                torch.testing.assert_close(own, t, rtol=1e-10, atol=1e-13, msg=name)
        norm = alone["norm"]
        assert run["norm"] == (None if norm is None else pytest.approx(norm, rel=1e-9, abs=0))
        assert run["losses"] == pytest.approx(alone["losses"], rel=0, abs=1e-9)
        for name, p in alone["weights"].items():
            torch.testing.assert_close(run["weights"][name], p, rtol=0, atol=1e-8, msg=name)

    return check
