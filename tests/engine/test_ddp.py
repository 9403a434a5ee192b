"""Under DistributedDataParallel, gloo processes on loopback grow and train as one process on the joined batch does."""

import itertools

import processes
import pytest
import torch
from ddp_worker import WORLDS

pytestmark = [processes.together, pytest.mark.slow]


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory) -> tuple[int, dict]:
    """Run ddp_worker.py in 2 and in 4 processes; return their number and the saved results of each rank."""
    folder, n = tmp_path_factory.mktemp("ddp"), request.param
    log = folder / "log"
    started = [processes.start("ddp_worker", folder, rank, n, log=log) for rank in range(n)]
    processes.end(started, log)
    return n, {rank: torch.load(folder / f"{rank}.pt") for rank in range(n)}


def test_processes_stay_equal_and_equal_to_one_process_on_the_joined_batch(world):
    n, found = world

    for case, rank in itertools.product(WORLDS[n], range(n)):
        expected = found[0]["alone", case]
        for name, p in found[rank][case].items():
            torch.testing.assert_close(
                p,
                expected[name],
                rtol=0,
                atol=1e-6,
                msg=f"{case} {rank} {name} {(p - expected[name]).abs().max()}",
            )
            assert torch.equal(p, found[0][case][name]), (case, rank, name)


def test_the_grown_processes_are_the_source_in_one_process_that_never_grows(world):
    n, found = world
    source = found[0]["source"]

    for rank in range(n):
        exact = found[rank]["exact"]
        apart = (found[rank]["without dynamics"]["logits"] - source["logits"]).abs().max()

        assert exact["wte.weight"].shape[1] == 2 * source["wte.weight"].shape[1]
        torch.testing.assert_close(exact["logits"], source["logits"], rtol=0, atol=1e-9)
        assert apart > 1e-4  # unscaled learning rates move the target away from the source


def test_without_a_new_reducer_processes_would_not_stay_equal(world):
    n, found = world

    apart = max(
        float((found[0]["not rebuilt"][name] - p).abs().max())
        for rank in range(1, n)
        for name, p in found[rank]["not rebuilt"].items()
    )

    assert apart > 1e-6


def test_a_growth_that_fails_in_one_process_fails_in_all_and_changes_none(world):
    n, found = world

    for rank in range(n):
        what, error, same, after = found[rank]["failed"]
        assert what == "CommitError" and same and after == found[0]["failed"][3]
        assert ("boom" if rank == n - 1 else "in another process") in error


def test_processes_that_want_different_plans_are_refused(world):
    n, found = world

    for rank in range(n):
        assert "do not agree on the plan" in found[rank]["disagree"]


def test_what_one_process_refuses_no_process_waits_for(world):
    n, found = world

    for rank in range(n):
        match = "pass the average as ema=" if rank == 0 else "another process refused"
        assert match in found[rank]["refused"]


def test_the_numbers_that_train_are_the_numbers_that_are_reduced(world):
    n, found = world
    expected, weights = found[0]["alone", "trains"]
    assert len({*expected[::2]}) == 3  # the top, what is new, all

    for rank in range(n):
        reduced, own = found[rank]["trains"]
        assert reduced == expected
        for name, p in own.items():
            torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-6, msg=name)
            assert torch.equal(p, found[0]["trains"][1][name])


def test_processes_that_choose_apart_are_told_and_nothing_is_frozen(world):
    n, found = world

    for rank in range(n):
        error, unchanged = found[rank]["chosen apart"]
        assert "do not agree on who trains" in error and unchanged
