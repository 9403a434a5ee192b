"""A schedule refuses models, optimizers and options that cannot work; a growth that fails leaves its event waiting."""

import gc
import weakref

import pytest
import torch
from models import batch, loss_of, make
from scheduled import DEEPER, WIDER, optimizer, run, same_weights, schedule_at

import growkern
from growkern.errors import CommitError, GrowthError, PlanError, UnsupportedModelError
from growkern.training.schedule import GrowthSchedule
from growkern.training.slope import WhenSlope
from growkern.training.triggers import At


@pytest.mark.slow
def test_two_schedules_on_one_optimizer_are_refused_until_one_is_removed():
    model = make("llama", tied=True)
    optim = optimizer(model)
    first, second = schedule_at(1, to=WIDER), schedule_at(1, to=DEEPER)
    handle = first.attach(model, optim)

    with pytest.raises(PlanError, match="a schedule of 1 events drives this AdamW already"):
        second.attach(model, optim)
    with pytest.raises(PlanError, match="already attached to an optimizer"):
        first.attach(model, optimizer(model))
    handle.remove()
    handle.remove()
    second.attach(model, optim)
    run(model, optim, 1)

    assert first.fired == [] and second.fired == [1]


def test_a_schedule_goes_with_its_optimizer_and_holds_nothing_alive():
    model = make("llama", tied=True)
    schedule = schedule_at(2, to=WIDER)
    gc.disable()  # reference counts alone must free the optimizer: in a cycle it would still hold state of the model

    def epoch():
        optim = optimizer(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optim, 10)
        schedule.attach(model, optim, scheduler)
        run(model, optim, 1)
        return weakref.ref(optim)

    try:
        assert epoch()() is None and schedule.attachment is None
        epoch()
    finally:
        gc.enable()
    assert schedule.fired == [2] and model.config.hidden_size == 48


def test_what_cannot_grow_is_refused_when_it_is_attached():
    uncalled = torch.nn.Linear(2, 2)
    optim = optimizer(uncalled)
    schedule_at(1).attach(uncalled, optim)
    for p in uncalled.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(UnsupportedModelError, match="no call of it was seen"):
        optim.step()
    with pytest.raises(
        PlanError,
        match="unknown options to. Known: spec, backend, ema, master_weights, state_rules, memory, on_progress, check",
    ):
        schedule_at(1).attach(make("llama", tied=True), None, to="3x")
    with pytest.raises(
        PlanError, match="cannot attach .* cannot grow this ZeroRedundancyOptimizer"
    ):
        zero = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})
        schedule_at(1).attach(model := make("llama", tied=True), zero(model.parameters(), lr=1e-3))
    with pytest.raises(PlanError, match="optim: expected a torch.optim.Optimizer, got str"):
        schedule_at(1).attach(make("llama", tied=True), "adamw")


def test_tokens_that_nobody_reports_are_an_error_at_the_second_step():
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = GrowthSchedule([At(tokens=100)])
    schedule.attach(model, optim)

    run(model, optim, 1)
    with pytest.raises(PlanError, match=r"\(100 tokens\): 2 steps have reported no tokens"):
        run(model, optim, 1)
    with pytest.raises(PlanError, match="no compute was reported"):
        GrowthSchedule([WhenSlope(tau=1)]).observe(eval_loss=1.0)
    with pytest.raises(PlanError, match="0 or more"):
        schedule.observe(tokens=-1)
    with pytest.raises(PlanError, match="flops=inf"):
        schedule.observe(flops=float("inf"))


def test_a_growth_that_fails_leaves_the_step_with_its_error_and_the_event_waiting(monkeypatch):
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = schedule_at(2, to=WIDER)
    schedule.attach(model, optim)
    run(model, optim, 1)
    with monkeypatch.context() as patch:
        patch.setattr("growkern.commit.commit._attributes", lambda *a: 1 / 0)
        with pytest.raises(CommitError, match="rolled back"):
            run(model, optim, 1)

    assert model.config.hidden_size == 24 and schedule.fired == [] and schedule.history == []
    assert schedule.counts.n_steps == 2  # the step itself was taken
    run(model, optim, 1)
    assert model.config.hidden_size == 48 and schedule.fired == [3]


def test_a_growth_that_fails_under_a_grad_scaler_leaves_the_scale_as_it_was(monkeypatch):
    model, twin = make("llama", tied=True), make("llama", tied=True)
    optim, other = optimizer(model, fused=True), optimizer(twin, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedule_at(1, to=WIDER).attach(model, optim)
    patch = monkeypatch.context()
    with patch as patched:
        patched.setattr("growkern.commit.commit._attributes", lambda *a: 1 / 0)
        for i in range(3):
            optim.zero_grad()
            scaler.scale(loss_of(model, batch(seed=i))).backward()
            with pytest.raises(CommitError):
                scaler.step(optim)
            scaler.update()

    run(twin, other, 3)
    same_weights(model, twin)


def test_a_control_c_with_the_last_write_leaves_a_growth_that_is_done_and_recorded(monkeypatch):
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = schedule_at(1, to=WIDER)
    schedule.attach(model, optim)

    def interrupted(*args, **options):
        growkern.expand_inplace(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("growkern.training.attachment.expand_inplace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, optim, 1)
    run(model, optim, 1)

    assert model.config.hidden_size == 48
    assert schedule.fired == [1] and len(schedule.history) == 1


def test_an_impossible_size_is_a_plan_error_out_of_the_step():
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule_at(1, to={"hidden": 12}).attach(model, optim)

    with pytest.raises(
        GrowthError, match="hidden=12 at step 1: the model has these sizes already, or larger"
    ):
        run(model, optim, 1)


def test_a_size_that_is_none_is_refused_when_it_is_attached():
    model = make("llama", tied=True)
    optim = optimizer(model)

    with pytest.raises(GrowthError, match="hiden"):
        schedule_at(9, to={"hiden": 3}).attach(model, optim)
    with pytest.raises(GrowthError, match="foo"):
        schedule_at(9, to="foo").attach(model, optim)
    for wrong in (dict(state="foo"), dict(dynamics="foo")):
        with pytest.raises(GrowthError, match="unknown (state|dynamics)='foo'"):
            GrowthSchedule([At(step=1, **wrong)])
    assert not optim._optimizer_step_post_hooks
