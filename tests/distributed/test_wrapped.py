"""Under ``fully_shard``, models whose blocks are compiled or checkpointed grow and train as one process trains the bare model."""

import processes
import pytest
import torch
from wrapped_worker import AT, STEPS, WRAPS

pytestmark = [processes.together, pytest.mark.slow]
BEFORE, AFTER = AT, STEPS - AT


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("wrapped")
    log = folder / "log"
    started = [processes.start("wrapped_worker", folder, rank, 2, log=log) for rank in range(2)]
    processes.end(started, log)
    return {rank: torch.load(folder / f"{rank}.pt") for rank in range(2)}


@pytest.mark.parametrize("case", WRAPS)
def test_a_wrapped_and_sharded_model_grows_and_trains_as_the_bare_one(case, found):
    expected = found[0]["alone, keyed" if "keyed" in case else "alone"]

    for rank in range(2):
        run = found[rank][case]
        assert run["losses"] == pytest.approx(expected["losses"], rel=0, abs=1e-9)
        for name, p in expected["weights"].items():
            torch.testing.assert_close(run["weights"][name], p, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "case",
    [case for case in WRAPS if "compiled" in case or "torchtitan" in case or "tensor" in case],
)
def test_every_new_block_runs_its_compiled_graph(case, found):
    for rank in range(2):
        assert found[rank][case]["runs"] == [2] * BEFORE + [3] * AFTER  # one graph per block
        assert found[rank][case]["forwards"] == [0] * STEPS  # none runs outside of its graph
        assert len({*found[rank][case]["kinds"]}) == 1


def test_a_model_that_is_compiled_as_a_whole_stays_so(found):
    for rank in range(2):
        *_, before, after = sorted({*found[rank]["whole"]["runs"]})
        assert after == before + 1
        assert found[rank]["whole"]["forwards"] == [0] * STEPS


@pytest.mark.parametrize("case", ["checkpointed", "composable"])
def test_new_blocks_are_computed_again_in_the_backward(case, found):
    for rank in range(2):
        assert found[rank][case]["forwards"] == [2 * 2] * BEFORE + [2 * 3] * AFTER


def test_a_wrapper_that_is_sharded_in_the_place_of_the_model_is_refused(found):
    for rank in range(2):
        assert (
            "embed_tokens.weight: is sharded with a wrapper of the model" in found[rank]["refused"]
        )
