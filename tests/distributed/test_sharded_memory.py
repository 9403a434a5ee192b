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
def test_a_process_receives_the_rows_that_it_reads_and_does_not_hold(n, mode, found_in):
    found = found_in(n)

    for rank in range(n):
        run = found[rank][mode]
        assert run["reported"] == run["received"] <= run["source"] * (n - 1) // n
        assert run["received"] - run["whole"] <= 1.1 * run["needed"]
        assert (
            run["whole"] < 0.01 * run["source"]
        )  # gains, and numbers that measure noise and means
        assert run["alive"] == 0  # one source at a time
    assert max(run[mode]["needed"] for run in found.values()) > 0.1 * run["source"]


@pytest.mark.parametrize("n", [2, 4])
def test_new_blocks_copy_what_their_process_holds(n, found_in):
    run = found_in(n)[0]["deeper"]

    assert run["received"] == run["expected"] == 0


@pytest.mark.parametrize("n", [2, 4])
def test_columns_are_received_once_and_constant_tensors_of_new_blocks_are_not(n, found_in):
    run = found_in(n)[0]["columns"]

    assert 0 < run["received"] == run["expected"]


@pytest.mark.parametrize("mode", ["stage", "lean"])
@pytest.mark.parametrize("n", [2, 4])
def test_the_prediction_from_the_configuration_is_the_growths_own(n, mode, found_in):
    found = found_in(n)
    first = found[0][mode]  # the process whose shards are largest
    most = max(run[mode]["received"] for run in found.values())

    assert first["expected peak"] == first["promised"]
    assert (
        0 <= most - first["expected"] < 0.001 * first["source"]
    )  # the numbers that measure noise and means
