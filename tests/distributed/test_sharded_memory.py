"""A process that grows its shards keeps the promised peak of memory, and receives every source shard of the others once."""

import processes
import pytest

pytestmark = [processes.together, pytest.mark.slow]
WORKER = "sharded_peak_worker"


@pytest.mark.parametrize("mode", ["stage", "lean"])
@pytest.mark.parametrize("n", [2, 4])
def test_the_peak_of_memory_is_as_promised(n, mode, found_in):
    found = found_in(n)

    for rank in range(n):
        run = found[rank][mode]
        assert 0.7 * run["promised"] < run["peak"] < 1.1 * run["promised"]


@pytest.mark.parametrize("mode", ["stage", "lean"])
@pytest.mark.parametrize("n", [2, 4])
def test_a_process_receives_what_it_has_not_of_the_source_once(n, mode, found_in):
    found = found_in(n)

    for rank in range(n):
        run = found[rank][mode]
        assert run["reported"] == run["received"] == run["source"] * (n - 1) // n
        assert run["alive"] == 0  # one gathered tensor at a time


@pytest.mark.parametrize("n", [2, 4])
def test_constant_tensors_of_new_blocks_are_not_received(n, found_in):
    run = found_in(n)[0]["deeper"]

    assert 0 < run["received"] == run["expected"]


@pytest.mark.parametrize("mode", ["stage", "lean"])
@pytest.mark.parametrize("n", [2, 4])
def test_the_prediction_from_the_configuration_is_the_growths_own(n, mode, found_in):
    run = found_in(n)[0][mode]  # of the first process, whose shards are largest

    assert run["expected peak"] == run["promised"]
    assert run["expected"] == run["received"]
