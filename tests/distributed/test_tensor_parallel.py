"""Under ``parallelize_module``, alone and below ``fully_shard``, gloo processes grow and train as one process does."""

from itertools import product

import processes
import pytest
import torch
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


def test_new_blocks_are_drawn_bit_for_bit_as_one_process_draws_them(found_in):
    found = found_in(4)
    alone = found[0]["alone", "fresh"]

    new = [name for name in alone["grown"] if name.startswith("model.layers.2.")]
    assert alone["new"] == ("model.layers.2",) and len(new) == 9
    for rank, name in product(range(4), new):
        assert torch.equal(found[rank]["fresh"]["grown"][name][0], alone["grown"][name][0]), name


def test_the_report_tells_that_parallelize_module_has_untied_parameters(found_in):
    found, said = found_in(2), "lm_head.weight and model.embed_tokens.weight are one parameter by"

    for rank in range(2):
        assert [note for note in found[rank]["untied"]["notes"] if note.startswith(said)]
        for case in ("tied again", "both"):
            assert said not in str(found[rank][case]["notes"])
        assert len(found[rank]["tied again"]["grown"]) == len(found[rank]["untied"]["grown"]) - 1


def test_first_blocks_of_a_parallel_model_are_refused(found_in):
    found = found_in(2)

    for rank in range(2):
        assert "grow the model before parallelize_module" in found[rank]["first"]


@pytest.mark.parametrize(
    ("case", "n_managed"), [("sharded", 4), ("sharded stack", 5), ("fresh", 4)]
)
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
