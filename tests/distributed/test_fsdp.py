"""Under ``fully_shard``, gloo processes on loopback grow and train as one process on the joined batch does."""

import re
from itertools import product

import processes
import pytest
import torch
from fsdp_worker import ALONE, FAILURES, REFUSED, SPLIT, WORLDS

pytestmark = [processes.together, pytest.mark.slow]
WORKER = "fsdp_worker"
STEPS_OF = {"twice": [2, 5], "top": [2, 4, 6]}  # of the growths of a schedule


@pytest.mark.parametrize(
    ("n", "case"), [(n, case) for n, cases in WORLDS.items() for case in cases]
)
def test_a_sharded_model_grows_and_trains_as_one_process_on_the_joined_batch(
    case, n, found_in, assert_as_alone
):
    found = found_in(n)

    for rank in range(n):
        assert_as_alone(found[rank][case], found[0]["alone", case])


@pytest.mark.parametrize("n", WORLDS)
def test_new_blocks_are_sharded_as_their_sources_are(n, found_in):
    found = found_in(n)

    for rank in range(n):
        assert found[rank]["both"]["managed"] == 4  # three blocks and the model
        assert found[rank]["both"]["resharded"] == [True] * 3
        assert found[rank]["both"]["roots"] == 1
        if "nested" in WORLDS[n]:
            assert found[rank]["nested"]["managed"] == 7


@pytest.mark.parametrize("case", ["fresh", "first"])
def test_new_blocks_are_drawn_bit_for_bit_as_one_process_draws_them(case, found_in):
    found = found_in(2)
    alone = found[0]["alone", case]

    new = [name for name in alone["grown"] if name.startswith(tuple(f"{b}." for b in alone["new"]))]
    assert len(new) == 9 * len(alone["new"]) > 0
    for rank, name in product(range(2), new):
        assert torch.equal(found[rank][case]["grown"][name][0], alone["grown"][name][0]), name


def test_first_blocks_that_fail_in_one_process_leave_the_model_as_it_was(found_in):
    found = found_in(2)

    at_once, at_commit = found[0]["first"]["errors"]
    assert "block: expected a torch.nn.Module, got int" in at_once and "boom" in at_commit
    heard, voted = found[1]["first"]["errors"]
    assert "another process refused the growth" in heard and "failed in another process" in voted


def test_a_growth_between_accumulated_gradients_is_refused(found_in):
    found = found_in(2)

    for rank in range(2):
        waiting = {error for key, error in found[rank]["accumulated"].items() if "waiting" in key}
        assert waiting == {
            "",
            "gradients wait to be reduced (set_requires_gradient_sync(False)): grow at an optimizer's step.",
        }


@pytest.mark.parametrize("n", WORLDS)
def test_master_weights_of_shards_grow_bit_for_bit_as_those_of_the_whole(n, found_in):
    found = found_in(n)
    alone = found[0]["of masters", "alone"]

    assert {t.dtype for t, _ in alone.values()} == {torch.bfloat16}
    for rank, (name, (p, master)) in product(range(n), alone.items()):
        own, copy = found[rank]["of masters"][name]
        assert torch.equal(own, p) and torch.equal(copy, master), name
        assert copy.dtype == torch.float32


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="shows that the targets of pinned shards ask for pinned memory",
)
def test_the_targets_of_pinned_shards_are_pinned(found_in):
    found = found_in(2)

    for rank in range(2):
        assert re.search("pin_memory=True requires|no NVIDIA driver", found[rank]["pinned"])


@pytest.mark.parametrize("n", WORLDS)
def test_the_loop_of_the_readme_grows(n, found_in):
    found = found_in(n)

    assert [found[rank]["README"] for rank in range(n)] == [(48, 3)] * n


@pytest.mark.parametrize("which", STEPS_OF)
@pytest.mark.parametrize("n", WORLDS)
def test_a_schedule_grows_where_gradients_are_in_flight(n, which, found_in, assert_as_alone):
    found = found_in(n)

    for rank in range(n):
        assert found[rank][which]["fired"] == STEPS_OF[which]
        assert_as_alone(found[rank][which], found[0]["alone", which])


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize("n", WORLDS)
def test_the_grown_model_is_a_freshly_sharded_model_with_its_shards_bit_for_bit(
    policy, n, found_in
):
    found = found_in(n)

    for rank in range(n):
        assert all(a == b for a, b in found[rank]["refilled", policy])


@pytest.mark.parametrize(("n", "case"), [(n, case) for n, cases in FAILURES.items() for case in cases])  # fmt: skip
def test_a_failure_in_one_process_takes_all_back_and_training_goes_on(n, case, found_in):
    found = found_in(n)
    _, _, kind, failing = case

    for rank in range(n):
        run = found[rank]["failed"][case]
        own = "KeyboardInterrupt" if kind == "Ctrl-C" else "boom"
        assert (own if rank == failing else "another process") in run["error"]
        assert run["same"] and run["equal"]


@pytest.mark.parametrize("what", SPLIT)
@pytest.mark.parametrize("n", WORLDS)
def test_other_arguments_in_another_process_are_an_error_in_every_process(what, n, found_in):
    found = found_in(n)

    for rank in range(n):
        assert SPLIT[what][1] in found[rank]["apart"][what]


@pytest.mark.parametrize("what", ALONE)
@pytest.mark.parametrize("n", WORLDS)
def test_functions_that_need_the_whole_model_refuse_a_sharded_one(what, n, found_in):
    found = found_in(n)

    for rank in range(n):
        assert re.search("sharded", found[rank]["apart"][what])


@pytest.mark.parametrize("where", ["describe", "execute", "commit"])
def test_a_process_that_ends_is_an_error_in_the_others(where, tmp_path):
    log = tmp_path / "log"

    started = [processes.start(WORKER, tmp_path, rank, 2, where, log=log) for rank in range(2)]

    processes.end(started, log)
    left = torch.load(tmp_path / "0.pt")
    assert "another process has ended" in left["error"] and left["same"]


@pytest.mark.parametrize("n", WORLDS)
def test_a_run_that_torch_has_saved_goes_on_as_the_unbroken_one(n, found_in):
    found = found_in(n)

    for rank in range(n):
        assert all(a == b for a, b in found[rank]["resumed"])


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("n", WORLDS)
def test_what_cannot_grow_is_refused_in_every_process(what, n, found_in):
    found = found_in(n)

    for rank in range(n):
        assert re.search(REFUSED[what], found[rank]["refused", what], re.DOTALL)
