"""A function of ``check=`` that fails in one process, before its forward gathers shards, ends as an error in all, without a wait."""

import processes
import pytest
import torch

WORLD = 2


@processes.together
@pytest.mark.slow
def test_a_check_that_fails_in_one_process_fails_in_all(tmp_path):
    log = tmp_path / "log"
    started = [
        processes.start("checked_worker", tmp_path, rank, WORLD, log=log) for rank in range(WORLD)
    ]
    processes.end(started, log)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]

    for name in ("before", "after", "attached"):
        assert "only here" in found[1][name]
        assert "another process" in found[0][name]
    assert found[0]["never"] == found[1]["never"] == "nothing"
    assert found[0]["loss"] == found[1]["loss"]
