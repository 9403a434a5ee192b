"""A process receives the rows that it reads and does not hold, once, and the same numbers as from the whole."""

import processes
import pytest
import torch

pytestmark = [processes.together, pytest.mark.slow]
WORKER = "gather_worker"
CASES = ["doubled", "uneven", "few", "drawn", "kept", "bools"]


@pytest.mark.parametrize(
    "case", [*((n, case) for n in (2, 4) for case in CASES), (4, "hybrid")], ids=str
)
def test_the_rows_that_a_process_reads_arrive_once(case, found_in):
    n, name = case

    for run in (found_in(n)[rank][name] for rank in range(n)):
        assert torch.equal(run["made"], run["expected"])
        assert run["received"] == run["read"]
        assert run["votes"] == run["moves"]  # one vote before the collective, and none without


@pytest.mark.parametrize("n", [2, 4])
def test_other_placements_are_gathered_whole(n, found_in):
    found = found_in(n)[0]["others"]

    assert found == dict.fromkeys(("columns", "replicas", "processes in another order"))


@pytest.mark.parametrize("n", [2, 4])
def test_a_moment_that_is_not_finite_grows_as_in_one_process(n, found_in):
    sharded, alone = found_in(n)[0]["moment"]

    assert sum(int(t.isnan().sum()) for t in alone.values()) > 0
    assert sharded.keys() == alone.keys()
    for name, t in alone.items():
        torch.testing.assert_close(sharded[name], t, rtol=1e-5, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("n", [2, 4])
def test_a_weight_that_is_not_finite_is_refused_in_every_process(n, found_in):
    alone = found_in(n)[0]["weight"][1]

    assert "up_proj.weight: 1 of 960 elements is not finite" in alone["error"]
    for rank in range(n):
        assert "up_proj.weight" in found_in(n)[rank]["weight"][0]["error"]


@pytest.mark.parametrize("n", [2, 4])
def test_weights_that_are_not_loaded_yet_grow_as_in_one_process(n, found_in):
    sharded, alone = found_in(n)[0]["weight that is not loaded"]

    assert "error" not in alone and sharded.keys() == alone.keys()


@pytest.mark.parametrize("n", [2, 4])
def test_processes_without_rows_of_a_tensor_grow(n, found_in):
    sharded, alone = found_in(n)[0]["few rows"]

    assert sharded == pytest.approx(alone, rel=1e-6, abs=0)
