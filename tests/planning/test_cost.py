"""The predicted cost of a sharded growth, against sums by hand; tests/distributed/test_sharded_memory.py compares it with growths."""

import pytest
from models import make

import growkern
from growkern.planning.cost import LATENCY, MEMORY_BANDWIDTH, N_COLLECTIVES, cost_of

FFN = dict(to={"ffn": 80})  # 40 to 80 in both blocks: three matrices each
KEYS = 3  # weight, and two moments


@pytest.fixture
def plan():
    return growkern.plan(make("llama", tied=False), **FFN)


def test_a_process_receives_the_parts_of_the_others_of_what_changes(plan):
    cost = cost_of(plan, 4, bandwidth=1e9)

    n_elements = 2 * 3 * 24 * 40  # blocks, matrices, hidden, ffn
    assert cost.total.n_bytes_received == 4 * KEYS * n_elements * 3 // 4
    assert cost.total.n_bytes_target == 4 * KEYS * 2 * n_elements // 4
    assert [*cost.classes] == ["feed-forward"]
    assert cost.total.n_tensors == 2 * 3 * KEYS


def test_the_time_is_that_of_the_link_the_collectives_and_the_memory(plan):
    cost = cost_of(plan, 4, bandwidth=1e6).total

    expected = cost.n_bytes_received / 1e6 + cost.n_bytes_target / MEMORY_BANDWIDTH
    assert cost.seconds == pytest.approx(expected + 18 * N_COLLECTIVES * LATENCY, abs=0)


def test_lean_frees_a_source_while_the_set_after_the_next_is_made(plan):
    cost = cost_of(plan, 4, bandwidth=1e9)

    own, whole = 4 * 24 * 40 // 4, 4 * 24 * 40
    assert cost.peak_bytes["stage"] == 6 * KEYS * 2 * own + whole
    assert cost.peak_bytes["lean"] == 6 * KEYS * 2 * own - 4 * KEYS * own + whole


def test_depth_alone_receives_the_weights_that_new_blocks_copy_and_no_state():
    plan = growkern.plan(make("llama", tied=False), to={"layers": 4})

    cost = cost_of(plan, 2, bandwidth=1e9)

    # per new block: norms, queries, keys, values, gate and up; what writes to the residual is 0
    copied = 2 * 24 + 24 * 24 + 2 * 12 * 24 + 2 * 24 * 40
    assert cost.total.n_bytes_received == 2 * 4 * copied // 2


def test_a_print_shows_the_classes_and_both_peaks(plan):
    text = str(cost_of(plan, 4, bandwidth=1e9))

    assert "every one of 4 processes" in text and "feed-forward" in text
    assert "memory='stage'" in text and "memory='lean'" in text
