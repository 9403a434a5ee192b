"""The events of a schedule fire in order, each once, at real steps; a plain loop that grows by hand ends with the same bits."""

import copy
import logging
import math

import pytest
import torch
from models import Plain, batch, loss_of, make
from scheduled import DEEPER, WIDER, optimizer, run, same_weights, schedule_at

import growkern
from growkern.errors import PlanError
from growkern.planning.growth_record import read
from growkern.training.schedule import GrowthSchedule
from growkern.training.slope import WhenSlope
from growkern.training.triggers import At, WhenPlateau

OPTIMIZERS = {
    "adamw-fused": ("adamw", {"fused": True}),
    "adamw-foreach": ("adamw", {"foreach": True}),
    "sgd-momentum": ("sgd", {"momentum": 0.9}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_schedule_ends_with_the_weights_of_a_loop_that_grows_by_hand(kind, options):
    def parts():
        model = make("llama", tied=True)
        optim = optimizer(model, kind, **options)
        return model, optim, torch.optim.lr_scheduler.CosineAnnealingLR(optim, 20)

    model, optim, scheduler = parts()
    schedule = GrowthSchedule([At(step=3, to=WIDER), At(step=5, to=DEEPER)])
    schedule.attach(model, optim, scheduler)
    run(model, optim, 8, scheduler=scheduler)

    by_hand, optim, scheduler = parts()
    for i in range(8):
        loss = loss_of(by_hand, batch(seed=i))
        optim.zero_grad()
        loss.backward()
        optim.step()
        if i == 2:
            growkern.expand_inplace(by_hand, optim, to=WIDER, seed=0, scheduler=scheduler)
        if i == 4:
            growkern.expand_inplace(by_hand, optim, to=DEEPER, seed=1, scheduler=scheduler)
        scheduler.step()

    assert schedule.fired == [3, 5]
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (48, 3)
    same_weights(model, by_hand)


def test_growths_under_exact_dynamics_find_weights_in_the_models_own_units():
    model, by_hand = make("llama", tied=True), make("llama", tied=True)
    optim, other = optimizer(model), optimizer(by_hand)
    events = [At(step=2, to=WIDER, dynamics="exact"), At(step=4, to={"hidden": 72}, dynamics="exact")]  # fmt: skip

    GrowthSchedule(events).attach(model, optim)
    run(model, optim, 5)

    run(by_hand, other, 2)
    growkern.expand_inplace(by_hand, other, to=WIDER, dynamics="exact", seed=0)
    run(by_hand, other, 2, first=2)
    growkern.expand_inplace(by_hand, other, to={"hidden": 72}, dynamics="exact", seed=1)
    run(by_hand, other, 1, first=4)
    same_weights(model, by_hand)


def test_closure_style_steps_grow_after_backward():
    model, by_hand = make("gpt2", tied=True), make("gpt2", tied=True)
    optim, other = optimizer(model), optimizer(by_hand)
    schedule_at(1, to=WIDER).attach(model, optim)

    def closure():
        optim.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        return loss

    optim.step(closure)
    optim.step(closure)
    run(by_hand, other, 1)
    growkern.expand_inplace(by_hand, other, to=WIDER)
    run(by_hand, other, 1)

    same_weights(model, by_hand)


def test_a_model_of_your_own_is_described_anew_for_each_growth():
    model = Plain()
    optim = optimizer(model)
    schedule = GrowthSchedule([At(step=1, to=WIDER), At(step=2, to={"hidden": 72})])

    schedule.attach(model, optim, spec=Plain.spec)
    run(model, optim, 3)

    assert model.wte.embedding_dim == 72


def test_averages_grow_along():
    optim = optimizer(model := make("llama", tied=True))
    average = torch.optim.swa_utils.AveragedModel(model)

    schedule_at(1, to=WIDER).attach(model, optim, ema=average)
    run(model, optim, 2, each=lambda i, loss: average.update_parameters(model))

    assert average.module.config.hidden_size == 48


def test_master_weights_grow_along():
    weights = []
    for scheduled in (True, False):
        model = make("llama", tied=True).bfloat16()
        masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
        optim = torch.optim.AdamW(masters.values(), lr=1e-2)
        schedule = GrowthSchedule([At(step=2, to=WIDER), At(step=3, to=DEEPER)])
        if scheduled:
            schedule.attach(model, optim, master_weights=masters)
        for i in range(5):
            loss_of(model, batch(seed=i)).backward()
            for p, master in masters.items():
                master.grad, p.grad = p.grad.float(), None
            optim.step()
            if not scheduled and i in (1, 2):
                to = schedule.events[i - 1].to
                growkern.expand_inplace(model, optim, to=to, master_weights=masters)
            for p, master in masters.items():
                p.data.copy_(master)
        weights.append(model.state_dict())
        assert len(masters) == len([*model.parameters()])
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())


@pytest.mark.slow
def test_backend_and_memory_of_the_attachment_are_those_of_every_growth():
    model, reports = make("llama", tied=True), []
    optim = optimizer(model)
    events = [At(step=1, to=WIDER), At(step=2, to=DEEPER)]
    schedule = GrowthSchedule(events, on_growth=[lambda event, report: reports.append(report)])

    schedule.attach(model, optim, memory="lean")
    run(model, optim, 2)
    schedule.attachment.remove()
    GrowthSchedule([At(step=1, to={"hidden": 72})]).attach(model, optim, backend="nan")
    run(model, optim, 1)

    assert [report.memory for report in reports] == ["lean", "lean"]
    assert model.model.norm.weight.isnan().all()


def test_state_rules_of_the_attachment_are_those_of_every_growth():
    class Mine(torch.optim.AdamW):
        pass

    model = make("llama", tied=True)
    optim, rules = Mine(model.parameters()), {"step": None, "exp_avg": 1, "exp_avg_sq": 2}
    events = [At(step=1, to=WIDER, dynamics=None), At(step=3, to=DEEPER, dynamics=None)]
    schedule = GrowthSchedule(events)

    schedule.attach(model, optim, state_rules=rules)
    run(model, optim, 4)

    assert schedule.fired == [1, 3]
    assert all(optim.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_tokens_from_before_the_attachment_are_compute_of_the_model():
    model = make("llama", tied=True)
    optim, schedule = optimizer(model), GrowthSchedule([WhenSlope(tau=0.1, to=WIDER)])

    schedule.observe(tokens=10)
    schedule.attach(model, optim)
    schedule.observe(tokens=10, loss=3.0)

    assert schedule.counts.n_flops == 6 * 20 * sum(p.numel() for p in model.parameters())


def test_events_of_one_step_fire_in_order_with_seeds_and_methods_of_their_own():
    model = make("llama", tied=True)
    optim = optimizer(model)
    events = [
        At(step=2, to=WIDER, width=growkern.width.Lossless(noise=0.5)),
        At(step=2, to=DEEPER, depth=growkern.depth.Stack(), dynamics=None, seed=77),
        At(step=2, to={"hidden": 72}),
    ]
    schedule = GrowthSchedule(events)

    schedule.attach(model, optim)
    run(model, optim, 2)

    plans = [read(text) for text in schedule.history]
    assert [p.seed for p in plans] == [0, 77, 2]
    assert "0.5" in plans[0].width and "Stack" in plans[1].depth
    assert schedule.fired == [2, 2, 2] and schedule.next_event is None


def test_an_event_waits_for_those_before_it():
    schedule = GrowthSchedule([At(tokens=1000, to=WIDER), At(step=1, to=DEEPER)])
    model = make("llama", tied=True)
    optim = optimizer(model)

    schedule.attach(model, optim)
    run(model, optim, 4, each=lambda i, loss: schedule.observe(tokens=350))

    assert schedule.fired == [4, 4]  # 1,050 tokens are known when step 4 is done


# The count of steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("adamw", {"fused": True}), ("adamw", {"foreach": True}), ("sgd", {"fused": True}), ("sgd", {})],
    ids=["adamw-fused", "adamw-foreach", "sgd-fused", "sgd"],
)  # fmt: skip
def test_steps_that_a_grad_scaler_skips_do_not_count(kind, options):
    model = make("llama", tied=True)
    optim = optimizer(model, kind, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedule = schedule_at(3, to=WIDER)
    schedule.attach(model, optim)
    sizes = []

    for i in range(5):
        optim.zero_grad()
        loss = loss_of(model, batch(seed=i)) * (math.inf if i in (0, 2) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optim)
        scaler.update()
        sizes.append(model.config.hidden_size)

    assert schedule.counts.n_steps == 3 and schedule.fired == [3]
    assert sizes == [24, 24, 24, 24, 48]  # steps 0 and 2 overflow


def test_the_count_is_the_optimizers_own_through_growth_in_depth_and_dropped_state():
    model = make("llama", tied=True)
    optim = optimizer(model, fused=True)
    schedule = GrowthSchedule([At(step=2, to=DEEPER), At(step=4, to=WIDER, state="drop")])
    schedule.attach(model, optim)

    run(model, optim, 3)
    oldest = max(int(s["step"]) for s in optim.state.values())
    youngest = min(int(s["step"]) for s in optim.state.values())
    run(model, optim, 3, first=3)

    assert (oldest, youngest) == (3, 1)  # new blocks have step counts of their own
    assert max(int(s["step"]) for s in optim.state.values()) == 2
    assert schedule.counts.n_steps == 6


def test_nothing_grows_while_a_cuda_graph_is_captured(monkeypatch):
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = schedule_at(1, to=WIDER)
    schedule.attach(model, optim)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        schedule.attachment._after_step(optim, (), {})

    assert schedule.fired == [] and schedule.counts.n_steps == 0
    run(model, optim, 1)
    assert schedule.fired == [1]


# Observations


def test_compute_is_six_times_tokens_times_parameters_of_the_model_as_it_is():
    model = make("llama", tied=True)
    optim = optimizer(model)
    n_params = sum(p.numel() for p in model.parameters())
    schedule = GrowthSchedule([At(tokens=20, to=WIDER, rewind=4.0), WhenSlope(tau=0.1)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0)
    schedule.attach(model, optim, scheduler)

    schedule.observe(tokens=10, loss=3.0)
    schedule.observe(tokens=10, loss=3.0)
    assert schedule.counts.n_flops == 6 * 20 * n_params
    run(model, optim, 1)
    assert schedule.fired == [1] and schedule.counts.points == []
    schedule.observe(tokens=10, loss=3.0)

    grown = sum(p.numel() for p in model.parameters())
    assert schedule.counts.n_flops == 6 * (20 * n_params + 10 * grown)
    # of a run of the grown size: it would be at 20 / 4 tokens, and 10 more
    assert schedule.counts.n_flops_of_size == pytest.approx(6 * 15 * grown, abs=0)


def test_each_plateau_counts_from_the_growth_before():
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = GrowthSchedule([WhenPlateau(patience=2, to=WIDER), WhenPlateau(patience=2, to=DEEPER)])  # fmt: skip
    schedule.attach(model, optim)

    run(model, optim, 8, each=lambda i, loss: schedule.observe(loss=1.0))

    # an event is due after three observations and fires at the next step
    assert schedule.fired == [4, 7]


def test_a_metric_that_no_event_looks_at_is_not_read():
    class Unread(torch.Tensor):
        def __float__(self):
            raise AssertionError("read: a device would have been waited for")

    schedule = GrowthSchedule([At(step=1), WhenPlateau()])

    for _ in range(100):
        schedule.observe(tokens=3, loss=torch.tensor(1.0).as_subclass(Unread))

    assert schedule.counts.n_tokens == 300
    with pytest.raises(AssertionError, match="waited for"):
        schedule.counts.curve.read()


# Callbacks, log and table


def test_callbacks_and_the_log_tell_of_a_growth(caplog):
    model = make("llama", tied=True)
    optim = optimizer(model)
    told = []
    schedule = GrowthSchedule([At(step=2, to=WIDER)], on_growth=[lambda *args: told.append(args)])
    schedule.attach(model, optim)

    with caplog.at_level(logging.INFO, logger="growkern"):
        run(model, optim, 3)

    ((event, report),) = told
    assert event is schedule.events[0] and report.target_sizes["hidden"] == 48
    (record,) = [r for r in caplog.records if r.levelno == logging.INFO]
    n = sum(p.numel() for p in model.parameters())
    assert record.getMessage().startswith("step 2: grew llama: hidden 24 -> 48, ")
    assert f"-> {n:,}; " in record.getMessage()


def test_the_table_shows_what_fired_and_what_is_waited_for():
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = GrowthSchedule([At(step=2, to=WIDER), WhenPlateau(patience=5), At(tokens=2e9)])
    schedule.attach(model, optim)
    run(model, optim, 2, each=lambda i, loss: schedule.observe(tokens=8))
    schedule.observe(loss=3.25)
    schedule.observe(loss=3.25)

    text = str(schedule)

    assert text.splitlines()[2:] == [
        "    0  hidden=48  step 2                       fired at step 2",
        "    1  2x         loss (min) not better for 5  waiting: best 3.25, 1 of 5 since",
        "    2  2x         2,000,000,000 tokens         after event 1",
    ]


# Restarts


@pytest.mark.slow
def test_a_schedule_goes_on_after_a_restart_and_does_not_fire_twice():
    def events():
        return [At(step=2, to=WIDER), WhenPlateau(patience=3, to=DEEPER)]

    def each(schedule):
        return lambda i, loss: schedule.observe(tokens=7, loss=1.0)

    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule = GrowthSchedule(events())
    schedule.attach(model, optim)
    run(model, optim, 4, each=each(schedule))
    saved = copy.deepcopy(schedule.state_dict())
    twin, twin_optim = copy.deepcopy((model, optim))
    twin_optim.load_state_dict(copy.deepcopy(optim.state_dict()))  # with its factors
    run(model, optim, 4, first=4, each=each(schedule))

    resumed = GrowthSchedule(events())
    resumed.attach(twin, twin_optim)
    resumed.load_state_dict(saved)
    run(twin, twin_optim, 4, first=4, each=each(resumed))

    assert schedule.fired == resumed.fired == [2, 6]
    assert resumed.state_dict() == schedule.state_dict()
    assert [read(t).target_sizes["layers"] for t in resumed.history] == [2, 3]
    same_weights(model, twin)


def test_the_state_is_plain_json():
    import json

    schedule = GrowthSchedule([WhenSlope(tau=0.1), At(step=3)])
    schedule.observe(
        tokens=torch.tensor(3), flops=2.0, eval_loss=torch.tensor(3.0, requires_grad=True)
    )

    other = GrowthSchedule([WhenSlope(tau=0.1), At(step=3)])
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))

    assert other.counts == schedule.counts and other.counts.points == [(2.0, 3.0)]


def test_events_ahead_may_change_at_a_restart_and_those_that_fired_may_not():
    schedule = GrowthSchedule([At(step=1, to=WIDER), WhenPlateau(patience=3)])
    model = make("llama", tied=True)
    optim = optimizer(model)
    schedule.attach(model, optim)
    run(model, optim, 1)
    schedule.observe(loss=1.0)
    saved = schedule.state_dict()

    changed = GrowthSchedule([At(step=1, to=WIDER), WhenPlateau(patience=9)])
    changed.load_state_dict(saved)

    assert changed.fired == [1] and changed.counts.points == []  # another trigger's history
    with pytest.raises(PlanError, match="the events that fired were .*hidden=48 at step 1"):
        GrowthSchedule([At(step=1, to=DEEPER)]).load_state_dict(saved)
    with pytest.raises(PlanError, match="cannot read the schedule's state"):
        changed.load_state_dict({"steps": 3})
    assert changed.fired == [1]
