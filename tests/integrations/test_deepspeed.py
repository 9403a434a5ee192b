"""DeepSpeed is refused by name, and the way over a checkpoint, which the refusal names, goes on at the same loss. Needs deepspeed."""

from importlib.util import find_spec

import processes
import pytest
import torch


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_refused_and_its_checkpoint_grows(stage, tmp_path):
    log = tmp_path / "log"
    started = [
        processes.start("deepspeed_worker", tmp_path, rank, 2, stage, log=log) for rank in range(2)
    ]
    processes.end(started, log)

    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for error in found["refused"]:
            assert "save, grow the checkpoint (growkern grow), and initialize anew" in error
        assert found["hidden"] == 48
        assert found["after"] == pytest.approx(found["before"], rel=0, abs=1e-5)  # of float32
        assert found["next"] < found["after"] - 0.1  # it trains
