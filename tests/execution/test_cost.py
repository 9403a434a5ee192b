"""The predicted cost of a sharded growth, against sums by hand; tests/distributed/test_sharded_memory.py compares it with growths."""

import pytest
from models import make

import growkern
from growkern.execution.cost import HOST, LATENCY, MEMORY_BANDWIDTH, N_COLLECTIVES, cost_of

FFN = dict(to={"ffn": 80})  # 40 to 80 in both blocks: three matrices each
KEYS = 3  # weight, and two moments


@pytest.fixture
def plan():
    return growkern.plan(make("llama", tied=False), **FFN)


def test_a_process_receives_the_rows_that_it_reads_and_does_not_hold(plan):
    cost = cost_of(plan, 4, bandwidth=1e9)

    # of 40 rows of gate and up, the second process has 10 to 19 and reads 20 to 39; what writes to the residual has equal rows
    assert cost.total.n_bytes_received == 4 * KEYS * 2 * 2 * 20 * 24
    assert cost.total.n_bytes_target == 4 * KEYS * 2 * (2 * 3 * 24 * 40) // 4
    assert [*cost.classes] == ["feed-forward"]
    assert cost.total.n_tensors == 2 * 3 * KEYS


def test_the_time_is_that_of_the_link_the_collectives_the_memory_and_the_host(plan):
    cost = cost_of(plan, 4, bandwidth=1e6).total

    expected = cost.n_bytes_received / 1e6 + cost.n_bytes_target / MEMORY_BANDWIDTH
    n_moved = 2 * 2 * KEYS  # gate and up
    expected += n_moved * N_COLLECTIVES * LATENCY + 18 * HOST
    assert cost.seconds == pytest.approx(expected, rel=1e-12, abs=0)


def test_lean_frees_a_source_while_the_set_after_the_next_is_made(plan):
    cost = cost_of(plan, 4, bandwidth=1e9)

    own, whole = 4 * 24 * 40 // 4, 4 * 24 * 40
    # down is last, and moves no rows; gate and up also hold 10 rows that are received
    assert cost.peak_bytes["stage"] == 6 * KEYS * 2 * own + whole
    assert cost.peak_bytes["lean"] == 6 * KEYS * 2 * own - 4 * KEYS * own + whole


def test_new_blocks_copy_rows_that_every_process_holds():
    plan = growkern.plan(make("llama", tied=False), to={"layers": 4})

    cost = cost_of(plan, 2, bandwidth=1e9)

    assert cost.total.n_bytes_received == 0
    assert (
        cost.total.n_tensors == 2 * 7
    )  # per block: norms, queries, keys, values, gate and up; what writes to the residual is 0


def test_a_print_shows_the_classes_and_both_peaks(plan):
    text = str(cost_of(plan, 4, bandwidth=1e9))

    assert "every one of 4 processes" in text and "feed-forward" in text
    assert "memory='stage'" in text and "memory='lean'" in text
