"""A growth that is interrupted leaves the source or the target, never a mixture: by signals, by other threads, by a fault at any line."""

import gc
import os
import signal
import threading
from contextlib import nullcontext

import pytest
import torch
from models import grow, make, train
from states import same, state_of

import growkern
from growkern.commit import commit, undo
from growkern.engine import claims
from growkern.engine import run as engine
from growkern.engine.ddp import Ranks
from growkern.errors import CommitError, GrowthError
from growkern.support.interrupts import uninterrupted


def live(**options):
    model = make("llama", tied=True, **options)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 100)
    train(model, optim, 2)
    return model, optim, scheduler


class Alarm(Exception):
    pass


def leave(number, frame):
    raise SystemExit(143)


def alarm(number, frame):
    raise Alarm


SIGNALS = {
    "SIGTERM": (signal.SIGTERM, leave, SystemExit),
    "SIGALRM": (signal.SIGALRM, alarm, Alarm),
    "SIGUSR1": (signal.SIGUSR1, alarm, Alarm),
    "SIGINT": (signal.SIGINT, alarm, Alarm),
}


@pytest.fixture
def handled():
    """Install handlers, and see that they are installed again."""
    before: dict[int, object] = {}

    def install(number, handler):
        before[number] = signal.signal(number, handler)
        return handler

    yield install
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_in(monkeypatch, owner, name, number):
    """Send a signal to this process at the start of a function."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a: (os.kill(os.getpid(), number), original(*a))[1])


def fail_at_the_end(monkeypatch):
    def finish(self):
        raise MemoryError("injected")

    monkeypatch.setattr(Ranks, "finish", finish)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_handler_that_raises_during_the_writes_is_called_after_the_last(
    name, handled, monkeypatch
):
    (number, handler, error), (model, optim, scheduler) = SIGNALS[name], live()
    handled(number, handler)
    kill_in(monkeypatch, commit, "_attributes", number)

    with pytest.raises(error):
        grow(model, optim, scheduler=scheduler)

    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert model.config.hidden_size == 48
    train(model, optim, 1)
    grow(model, optim, scheduler=scheduler)


@pytest.mark.parametrize("at", [0, 0.5, 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_handler_that_raises_during_the_rollback_does_not_stop_it(name, at, handled, monkeypatch):
    (number, handler, error), (model, optim, scheduler) = SIGNALS[name], live()
    handled(number, handler)
    before, rollback = state_of(model, optim, scheduler), undo.Undo.rollback
    fail_at_the_end(monkeypatch)

    def interrupted(self):
        steps = self.rollbacks
        i = int(at * (len(steps) - 1))
        step = steps[i]
        steps[i] = lambda: (os.kill(os.getpid(), number), step())
        rollback(self)

    monkeypatch.setattr(undo.Undo, "rollback", interrupted)
    with pytest.raises(error):
        grow(model, optim, scheduler=scheduler)

    assert signal.getsignal(number) is handler
    assert same(state_of(model, optim, scheduler), before)
    monkeypatch.undo()
    grow(model, optim, scheduler=scheduler)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Alarm])
@pytest.mark.parametrize("at", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_a_step_of_the_rollback_that_raises_once_is_run_again(error, at, monkeypatch):
    model, optim, scheduler = live()
    before, rollback, raised = state_of(model, optim, scheduler), undo.Undo.rollback, []
    fail_at_the_end(monkeypatch)

    def interrupted(self):
        i = int(at * (len(self.rollbacks) - 1))
        step = self.rollbacks[i]

        def once():
            if not raised:
                raised.append(i)
                raise error
            step()

        self.rollbacks[i] = once
        rollback(self)

    monkeypatch.setattr(undo.Undo, "rollback", interrupted)
    with pytest.raises(CommitError if error is Alarm else error):
        grow(model, optim, scheduler=scheduler)

    assert raised and same(state_of(model, optim, scheduler), before)


def test_writes_to_one_object_are_undone_in_order_when_the_last_one_is_tried_again():
    log, values, failures = undo.Undo(), [0], []
    log.set_list(values, [1])
    log.set_list(values, [2])
    last = log.rollbacks[-1]

    def fails_once():
        if not failures:
            failures.append(1)
            raise MemoryError
        last()

    log.rollbacks[-1] = fails_once
    log.rollback()

    assert values == [0] and log.rollbacks == []


def test_every_pending_handler_is_called_once_and_all_handlers_are_installed_again(handled):
    calls = []

    def first(number, frame):
        calls.append(number)
        raise Alarm

    handled(signal.SIGTERM, first)
    handled(signal.SIGUSR1, lambda number, _: calls.append(number))
    installed = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]

    with pytest.raises(Alarm), uninterrupted():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert calls == []

    assert calls == [signal.SIGTERM, signal.SIGUSR1]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == installed


def test_signals_are_handled_at_once_after_the_block_and_nested_blocks_wait_for_the_outer_one(
    handled,
):
    calls = []
    handled(signal.SIGTERM, lambda *_: calls.append(1))
    with uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
        assert calls == []
    assert calls == [1]

    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == [1, 1]


# --- threads


class Paused:
    """A growth in another thread that waits in the middle of its commit until ``finish``."""

    def __init__(self, monkeypatch, model, optim, **options):
        self.inside, self.go, self.error = threading.Event(), threading.Event(), None
        original, thread = commit._attributes, []

        def waits(*args):
            if threading.current_thread() in thread:
                self.inside.set()
                assert self.go.wait(30)
            return original(*args)

        def run():
            try:
                grow(model, optim, **options)
            except BaseException as error:
                self.error = error

        monkeypatch.setattr(commit, "_attributes", waits)
        thread.append(threading.Thread(target=run))
        self.thread = thread[0]
        self.thread.start()
        assert self.inside.wait(30)

    def finish(self):
        self.go.set()
        self.thread.join(30)
        assert self.error is None and not self.thread.is_alive()


def test_a_second_growth_of_the_same_model_is_refused_at_once(monkeypatch):
    model, optim, scheduler = live()
    growth = Paused(monkeypatch, model, optim, scheduler=scheduler)

    with pytest.raises(GrowthError, match="a growth that is running .* changes the model"):
        grow(model, optim, to={"layers": 3})
    growth.finish()

    assert model.config.hidden_size == 48 and model.config.num_hidden_layers == 2
    train(model, optim, 1)
    grow(model, optim, to={"layers": 3})


def test_a_growth_of_a_model_with_the_same_optimizer_is_refused(monkeypatch):
    model, other = make("llama", tied=True), make("llama", tied=True, seed=1)
    optim = torch.optim.AdamW([*model.parameters(), *other.parameters()])
    growth = Paused(monkeypatch, model, optim)

    with pytest.raises(GrowthError, match="a growth that is running .* changes its optimizer"):
        grow(other, optim)
    growth.finish()

    assert (model.config.hidden_size, other.config.hidden_size) == (48, 24)
    grow(other, optim)


def test_a_growth_of_a_model_that_shares_a_parameter_and_of_an_average_is_refused():
    model, optim, _ = live()
    other = make("llama", tied=True, seed=1)
    other.model.norm.weight = model.model.norm.weight
    average = torch.optim.swa_utils.AveragedModel(model)
    with claims.claimed(model, [optim], average):
        with pytest.raises(GrowthError, match=r"changes model\.norm\.weight"):
            grow(other)
        with pytest.raises(GrowthError, match=r"also changes model\."):
            grow(average.module)

    assert not len(claims._claims)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_waits_for_the_end_of_a_growth(on, fails, monkeypatch):
    (model, optim, scheduler), during = live(), []

    def commit(*arguments, **options):
        during.append(gc.isenabled())
        if fails:
            raise RuntimeError("boom")
        return original(*arguments, **options)

    original = engine.commit
    monkeypatch.setattr(engine, "commit", commit)
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with nullcontext() if not fails else pytest.raises(RuntimeError):
            grow(model, optim, scheduler=scheduler)
        assert (during, gc.isenabled()) == ([False], on)
    finally:
        (gc.enable if before else gc.disable)()


def test_growths_of_different_models_run_side_by_side(monkeypatch):
    (model, optim, scheduler), (other, other_optim, _) = live(), live(seed=1)
    growth = Paused(monkeypatch, model, optim, scheduler=scheduler)

    grow(other, other_optim, to="1.5x")
    growth.finish()

    assert (model.config.hidden_size, other.config.hidden_size) == (48, 36)
    for grown, its in ((model, optim), (other, other_optim)):
        train(grown, its, 1)


def test_drawn_blocks_of_two_threads_are_those_of_one_after_the_other():
    def grown(models):
        threads = [
            threading.Thread(
                target=grow, args=(m,), kwargs=dict(to={"layers": 6}, depth=growkern.depth.Fresh())
            )
            for m in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [[p.detach().clone() for p in m.parameters()] for m in models]

    alone = grown([make("llama", tied=True)])[0]
    for one in grown([make("llama", tied=True) for _ in range(4)]):
        assert all(map(torch.equal, one, alone))


def test_a_claim_ends_with_its_frame():
    model = make("llama", tied=True)
    claim = claims._Claim({id(model): (model, "the model")})
    claims._claims.add(claim)
    with pytest.raises(GrowthError, match="changes the model"):
        grow(model)

    del claim
    gc.collect()
    grow(model)
