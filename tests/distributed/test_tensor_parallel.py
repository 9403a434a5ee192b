"""Under ``parallelize_module``, alone and below ``fully_shard``, gloo processes grow and train as one process does."""

import processes
import pytest
from tensor_parallel_worker import REFUSED, WORLDS

pytestmark = [processes.together, pytest.mark.slow]
WORKER = "tensor_parallel_worker"


@pytest.mark.parametrize(
    ("n", "case"), [(n, case) for n, cases in WORLDS.items() for case in cases]
)
def test_a_parallel_model_grows_and_trains_as_one_process_does(case, n, found_in, assert_as_alone):
    found = found_in(n)

    for rank in range(n):
        assert_as_alone(found[rank][case], found[0]["alone", case])


@pytest.mark.parametrize(("case", "n_managed"), [("sharded", 4), ("sharded stack", 5)])
def test_new_blocks_are_fully_sharded_as_their_sources_are(case, n_managed, found_in):
    found = found_in(4)

    assert [found[rank][case]["managed"] for rank in range(4)] == [n_managed] * 4


@pytest.mark.parametrize("what", REFUSED)
def test_sizes_that_do_not_divide_over_the_processes_are_refused_before_anything_changes(what, found_in):  # fmt: skip
    found = found_in(2)

    for rank in range(2):
        by_hand, ahead = found[rank]["refused", what]["errors"]
        assert REFUSED[what][1] in by_hand and REFUSED[what][1] in ahead and "at step 2" in ahead
        assert found[rank]["refused", what]["same"]
