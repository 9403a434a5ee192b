"""After a growth, a schedule of learning rates goes on from an earlier position, and rates rise from 0 again."""

import copy

import pytest
import torch
import transformers
from models import batch, loss_of, make
from scheduled import WIDER, optimizer, run, same_weights

from growkern.errors import PlanError
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At

lr_scheduler = torch.optim.lr_scheduler
SCHEDULERS = {
    "lambda": lambda optim: lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step)),
    "cosine": lambda optim: lr_scheduler.CosineAnnealingLR(optim, 40),
    "step": lambda optim: lr_scheduler.StepLR(optim, 3, gamma=0.7),
    "one cycle": lambda optim: lr_scheduler.OneCycleLR(optim, 0.1, total_steps=40),
}


def rates(kind: str, n: int) -> list[float]:
    """Return the rates of a scheduler of another optimizer at its first positions."""
    optim = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    scheduler, found = SCHEDULERS[kind](optim), []
    for _ in range(n):
        found.append(optim.param_groups[0]["lr"])
        optim.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_rewound_scheduler_has_the_rates_of_its_earlier_position(kind):
    """No width grows, so that no group gets a factor of its own."""
    model = make("llama", tied=True)
    optim = optimizer(model)
    scheduler = SCHEDULERS[kind](optim)
    event = At(step=9, to={"layers": 3}, rewind=2.0, dynamics=None)
    GrowthSchedule([event]).attach(model, optim, scheduler)
    seen = []

    run(model, optim, 14, scheduler=scheduler, each=lambda i, loss: seen.append(optim.param_groups[0]["lr"]))  # fmt: skip

    # the rates after scheduler.step(): the growth comes in step 9, at position 8, which becomes 4
    known = rates(kind, 14)
    assert seen == pytest.approx([*known[1:9], *known[5:11]], rel=1e-12, abs=0)


@pytest.mark.parametrize("tensor", [False, True])
def test_rates_rise_linearly_after_a_growth_and_are_the_schedulers_between_steps(tensor):
    model = make("llama", tied=True)
    optim = optimizer(model, foreach=not tensor)
    if tensor:
        optim.param_groups[0]["lr"] = torch.tensor(0.01)
    schedule = GrowthSchedule([At(step=2, to={"layers": 3}, rewarm=4)])
    schedule.attach(model, optim)
    inside, between = [], []
    optim.register_step_pre_hook(lambda o, *_: inside.append(float(o.param_groups[0]["lr"])))

    run(model, optim, 8, each=lambda *_: between.append(float(optim.param_groups[0]["lr"])))

    factors = [1, 1, 0.25, 0.5, 0.75, 1, 1, 1]
    assert inside == pytest.approx([0.01 * f for f in factors], rel=1e-6, abs=0)
    assert between == pytest.approx([0.01] * 8, rel=1e-6, abs=0)


@pytest.mark.parametrize("where", ["hook", "closure", "step"])
def test_a_step_that_raises_leaves_the_rate_of_the_scheduler(where, monkeypatch):
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = GrowthSchedule([At(step=1, to={"layers": 3}, rewarm=4)]).attach(model, optim)
    run(model, optim, 1)

    def boom(*_, **__):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="boom"):
        if where == "step":
            patch.setattr(optim, "_init_group", boom)
        hook = optim.register_step_pre_hook(boom) if where == "hook" else None
        optim.step(boom if where == "closure" else None)
    if hook is not None:
        hook.remove()

    assert optim.state_dict()["param_groups"][0]["lr"] == 0.01
    seen = []
    optim.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    run(model, optim, 2)
    assert seen == pytest.approx([0.0025, 0.005], rel=1e-12, abs=0)
    attachment.remove()
    assert "step" not in vars(optim)
    run(model, optim, 1)
    assert seen[-1] == 0.01


def test_a_scheduler_that_steps_in_a_hook_of_the_optimizer_decays_during_the_rise():
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optim, 0.9)
    optim.register_step_post_hook(lambda *_: scheduler.step())
    GrowthSchedule([At(step=1, to=None, rewarm=5)]).attach(model, optim, scheduler)

    run(model, optim, 8)

    assert optim.param_groups[0]["lr"] == pytest.approx(0.9**8, rel=1e-12, abs=0)


def test_a_resumed_run_warms_up_from_where_it_was():
    def build(seed):
        model = make("llama", tied=True, seed=seed)
        optim = optimizer(model)
        return model, optim, SCHEDULERS["lambda"](optim)

    def schedule():
        return GrowthSchedule([At(step=3, to=WIDER, rewind=1.5, rewarm=4)])

    whole, optim, scheduler = build(0)
    schedule().attach(whole, optim, scheduler)
    run(whole, optim, 9, scheduler=scheduler)

    first, optim, scheduler = build(0)
    one = schedule()
    one.attach(first, optim, scheduler)
    run(first, optim, 5, scheduler=scheduler)
    saved = copy.deepcopy((first.state_dict(), optim.state_dict(), scheduler.state_dict(), one.state_dict()))  # fmt: skip

    import growkern

    model, optim, scheduler = build(1)
    two = schedule()
    two.load_state_dict(saved[3])
    growkern.resume(model, optim, saved[3]["history"], scheduler=scheduler)
    model.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    two.attach(model, optim, scheduler)
    run(model, optim, 4, first=5, scheduler=scheduler)

    same_weights(model, whole)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda optim: None, "no scheduler was passed"),
        (lambda optim: lr_scheduler.ReduceLROnPlateau(optim), "ReduceLROnPlateau do not follow"),
        (
            lambda optim: lr_scheduler.SequentialLR(
                optim,
                [lr_scheduler.ConstantLR(optim), lr_scheduler.CosineAnnealingLR(optim, 9)],
                [3],
            ),
            "SequentialLR do not follow.*LambdaLR",
        ),
    ],
)
def test_schedulers_that_cannot_be_rewound_are_refused_when_attached(build, match):
    model = make("llama", tied=True)
    optim = optimizer(model)
    with pytest.raises(PlanError, match=match):
        GrowthSchedule([At(step=2, rewind=2.0)]).attach(model, optim, build(optim))


def without_rate(params):
    return transformers.optimization.Adafactor(params, relative_step=True, warmup_init=False)


@pytest.mark.parametrize(
    ("kind", "match"),
    [(without_rate, "no learning rate"), (torch.optim.Rprop, "do not follow"), (torch.optim.ASGD, "do not follow")],
)  # fmt: skip
def test_rates_that_cannot_rise_are_refused_when_attached(kind, match):
    model = make("llama", tied=True)
    optim = kind(model.parameters())
    with pytest.raises(PlanError, match=match):
        GrowthSchedule([At(step=2, rewarm=3)]).attach(model, optim)
    GrowthSchedule([At(step=2)]).attach(model, optim)


def test_accumulated_gradients_are_stepped_once_at_the_lower_rate():
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    GrowthSchedule([At(step=1, to=None, rewarm=2)]).attach(model, optim)
    run(model, optim, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optim.zero_grad()
    loss_of(model, batch()).backward()
    grads = [p.grad.clone() for p in model.parameters()]

    optim.step()

    for p, old, grad in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p, old - 0.05 * grad, rtol=0, atol=1e-7)
