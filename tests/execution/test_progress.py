"""A growth tells how far it is: to a callback, in the log when it takes long, and by a bar in the loops of frameworks."""

import io
import itertools
import logging

import pytest
import torch
from models import grow, make, train
from states import same, state_of

from growkern import At, GrowthSchedule
from growkern.errors import CommitError
from growkern.support import progress

bar = pytest.importorskip("growkern.integrations.bar")
MEMORY = ["stage", "lean"]


def trained():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optim, 2)
    return model, optim


@pytest.mark.parametrize("memory", MEMORY)
def test_a_callback_sees_every_byte_of_the_target(memory):
    model, optim = trained()
    seen = []

    grow(model, optim, to="2x", memory=memory, on_progress=lambda *at: seen.append(at))

    written = [t for p in model.parameters() for t in (p, optim.state[p]["exp_avg"], optim.state[p]["exp_avg_sq"])]  # fmt: skip
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total = sum(t.numel() * t.element_size() for t in [*written, *grads])
    assert {n for _, n in seen} == {total}
    done = [n for n, _ in seen]
    assert done == sorted(done) and done[-1] == total and len({*done}) > 5


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("at", [0, 5], ids=["first", "sixth"])
def test_a_callback_that_raises_takes_the_growth_back(memory, at):
    model, optim = trained()
    before = state_of(model, optim)
    calls = itertools.count()

    def stop(done, total):
        if next(calls) == at:
            raise RuntimeError("no longer")

    with pytest.raises(CommitError, match="no longer"):
        grow(model, optim, to="2x", memory=memory, on_progress=stop)

    assert same(state_of(model, optim), before)


def test_only_long_growths_are_in_the_log(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "growkern")
    model, optim = trained()
    grow(model, optim, to={"ffn": "2x"})
    assert "GB written" not in caplog.text

    clock = itertools.count()
    monkeypatch.setattr(progress, "perf_counter", lambda: next(clock))  # a second per piece
    grow(model, optim, to="2x")

    lines = [r.message for r in caplog.records if "GB written" in r.message]
    assert len(lines) > 2 and lines[-1].startswith("growing: ")


def test_a_schedule_passes_the_callback_on():
    model, optim = trained()
    seen = []
    schedule = GrowthSchedule([At(step=1, to={"ffn": "2x"})])
    schedule.attach(model, optim, on_progress=lambda *at: seen.append(at))

    train(model, optim, 1)

    assert schedule.fired and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_drawn_and_begins_again_after_a_growth_that_failed(monkeypatch, shown):
    drawn = io.StringIO()
    monkeypatch.setattr(bar, "DELAY", 0.0)
    plain = bar.tqdm
    monkeypatch.setattr(bar, "tqdm", lambda **options: plain(file=drawn, mininterval=0, **options))
    told = bar.Bar(shown)

    for done, total in ((10, 100), (60, 100), (5, 40), (40, 40)):  # the first growth fails
        told(done, total)

    assert told.bar is None
    assert ("growing:  60%" in drawn.getvalue()) == shown
    assert ("40.0/40.0" in drawn.getvalue()) == shown


def test_a_short_growth_draws_no_bar(monkeypatch):
    drawn = io.StringIO()
    plain = bar.tqdm
    monkeypatch.setattr(bar, "tqdm", lambda **options: plain(file=drawn, **options))
    told = bar.Bar()

    for done in (10, 50, 100):
        told(done, 100)

    assert not drawn.getvalue().strip()
