"""Several optimizers of one model, each of other parameters: Muon for matrices and AdamW for the rest is the pair of today."""

import copy
from collections.abc import Sequence

import pytest
import torch
from laws import gathered, grad_scale
from models import batch, exact_norms, grow, loss_of, make
from pairwise import pairwise
from scheduled import halves, pair
from states import fail_at, same, state_of
from test_lr_scaling import newton_schulz
from torch import nn
from torch.optim import SGD, AdamW, _muon
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

import growkern
from growkern import At, GrowthSchedule, width
from growkern.commit import optimizer as optim_target
from growkern.errors import PlanError, UnsupportedOptimizerError

BOTH = {"hidden": 48, "layers": 3}
QUIET = width.Lossless(noise=0)


def two(model: nn.Module) -> list[Optimizer]:
    return [AdamW(half, lr=1e-2, weight_decay=0.1) for half in halves(model)]


def steps(
    model: nn.Module, optims: Sequence[Optimizer], n: int, first: int = 0, schedulers=()
) -> list[float]:
    losses = []
    for i in range(first, first + n):
        loss = loss_of(model, batch(seed=i))
        for optim in optims:
            optim.zero_grad()
        loss.backward()
        for one in (*optims, *schedulers):
            one.step()
        losses.append(loss.item())
    return losses


def fading(optims: Sequence[Optimizer]) -> list[LambdaLR]:
    return [LambdaLR(optim, lambda i: 1 - i / 40) for optim in optims]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_muon_with_adamw_keeps_the_trajectory_over_two_growths(family, monkeypatch):
    exact_norms(monkeypatch)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", newton_schulz)
    model = make(family, tied=True).double()
    optims = pair(model)
    steps(model, optims, 4)
    source, source_optims = copy.deepcopy((model, optims))
    expected = steps(source, source_optims, 9, 4)

    losses = []
    for i, to in enumerate(({"ffn": "2x"}, {"hidden": "2x"})):
        report = grow(model, optims, to=to, width=QUIET, dynamics="exact")
        losses += steps(model, optims, 4 + i, 4 + 4 * i)

    assert report.preserves == "trajectory"
    assert abs(expected[0] - expected[-1]) > 1e-3
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-9


CASES = [
    (state, dynamics, to, scheduled, memory)
    for state in ("exact", "copy", "asymmetric", "zero_pad", "drop")
    for dynamics in ("mup", "exact", None)
    for to in ("2x", "1.5x", {"layers": 4})
    for scheduled in (False, True)
    for memory in ("stage", "lean")
]


@pytest.mark.parametrize(
    ("state", "dynamics", "to", "scheduled", "memory"), pairwise(CASES), ids=str
)
def test_two_adamw_are_one_bit_for_bit(state, dynamics, to, scheduled, memory):
    """An AdamW of all parameters and two of half the parameters each take the same steps, before and after a growth."""
    weights, rates = [], []
    for make_optims in (lambda m: [AdamW(m.parameters(), lr=1e-2, weight_decay=0.1)], two):
        model = make("llama", tied=True)
        optims = make_optims(model)
        schedulers = fading(optims) if scheduled else []
        steps(model, optims, 2, 0, schedulers)
        own = optims if len(optims) > 1 else optims[0]

        report = grow(
            model,
            own,
            to=to,
            state=state,
            dynamics=dynamics,
            scheduler=schedulers or None,
            memory=memory,
        )
        steps(model, optims, 3, 2, schedulers)

        weights.append(model.state_dict())
        rates.append((report.lr_factors, report.lr_applied, report.grad_norm_factor))
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())
    assert rates[0][:2] == rates[1][:2]
    assert rates[0][2] == pytest.approx(rates[1][2])


class Squares(Optimizer):
    """Its ``exp_avg`` is a mean of squares, unlike AdamW's."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            square = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            square.lerp_(p.grad.square(), 0.1)
            p.sub_(p.grad / (square.sqrt() + 1e-8), alpha=self.param_groups[0]["lr"])


def test_one_key_follows_another_rule_in_each_optimizer():
    model = make("llama", tied=False)
    matrices, rest = halves(model)
    optims = [Squares(matrices), AdamW(rest, lr=1e-2)]
    steps(model, optims, 2)
    plan = growkern.plan(model, optims, width=QUIET, dynamics=None, state_rules={"exp_avg": 2})
    squares = {id(p) for p in matrices}
    before = {
        name: optims[id(p) not in squares].state[p]["exp_avg"].double()
        for name, p in model.named_parameters()
    }

    grow(model, optims, plan=plan, dynamics=None, state_rules={"exp_avg": 2})

    for row in plan.tensors:
        p = model.get_parameter(row.name)
        order, optim = (2, optims[0]) if id(p) in squares else (1, optims[1])
        expected = gathered(plan, row, before[row.source]) * grad_scale(plan, row) ** order
        torch.testing.assert_close(optim.state[p]["exp_avg"], expected.float())


def test_what_is_refused_before_anything_changes():
    model = make("llama", tied=True)
    optims = pair(model)
    steps(model, optims, 1)
    matrices, rest = halves(model)
    stray = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    strange = [*fading(optims), *fading([stray])]
    before = [state_of(model, optim) for optim in optims]
    for given, error, match in (
        ([*optims, optims[0]], UnsupportedOptimizerError, "an optimizer occurs twice"),
        (
            [optims[0], SGD([*rest, matrices[0]], lr=0.1)],
            UnsupportedOptimizerError,
            r"in two optimizers",
        ),
        (
            [*optims, stray],
            UnsupportedOptimizerError,
            "SGD: the optimizer has no parameter of this",
        ),
        (
            [optims[0], "adamw"],
            UnsupportedOptimizerError,
            "expected a torch.optim.Optimizer, got str",
        ),
        (
            [optims[0], None],
            UnsupportedOptimizerError,
            "expected a torch.optim.Optimizer, got NoneType",
        ),
        ([optims[0]], UnsupportedOptimizerError, "another live optimizer has state.*AdamW"),
    ):
        with pytest.raises(error, match=match):
            grow(model, given)
    with pytest.raises(PlanError, match="drives another optimizer"):
        grow(model, optims, scheduler=strange)
    assert all(same(state_of(model, optim), b) for optim, b in zip(optims, before, strict=True))


@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_in_either_optimizer_leaves_both_bitwise_unchanged(call, monkeypatch):
    model = make("gpt2", tied=True)
    optims = pair(model)
    schedulers = fading(optims)
    steps(model, optims, 2, 0, schedulers)
    before = [state_of(model, *both) for both in zip(optims, schedulers, strict=True)]
    failures = fail_at(monkeypatch, optim_target, "check_state", RuntimeError("boom"), call)

    with pytest.raises(growkern.errors.CommitError, match="boom"):
        grow(model, optims, to=BOTH, scheduler=schedulers)

    after = [state_of(model, *both) for both in zip(optims, schedulers, strict=True)]
    assert failures and all(map(same, after, before))


def test_a_schedule_grows_when_the_last_optimizer_has_stepped():
    weights = []
    for scheduled in (False, True):
        model = make("llama", tied=True)
        optims = pair(model)
        schedulers = fading(optims)
        schedule = GrowthSchedule([At(step=2, to=BOTH), At(step=4, to={"ffn": "2x"})])
        if scheduled:
            schedule.attach(model, optims, schedulers)
        for i in range(6):
            steps(model, optims, 1, i)
            if not scheduled and i in (1, 3):
                event = schedule.events[i == 3]
                grow(model, optims, to=event.to, scheduler=schedulers)
            for scheduler in schedulers:
                scheduler.step()
        weights.append(model.state_dict())
        assert schedule.counts.n_steps == 6 * scheduled
        assert schedule.fired == [2, 4] * scheduled
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())


@pytest.mark.slow
def test_a_schedule_refuses_an_optimizer_of_another_schedule():
    model = make("llama", tied=True)
    optims = pair(model)
    attachment = GrowthSchedule([At(step=2)]).attach(model, optims)

    for own in (optims, optims[0]):
        with pytest.raises(PlanError, match="drives this Muon already"):
            GrowthSchedule([At(step=2)]).attach(model, own)
    attachment.remove()
    GrowthSchedule([At(step=2)]).attach(model, optims)


@pytest.mark.parametrize("dynamics", ["mup", "exact"])
def test_a_resumed_run_goes_on_bit_for_bit(dynamics, tmp_path):
    model = make("llama", tied=True)
    optims = pair(model)
    schedulers = fading(optims)
    steps(model, optims, 2, 0, schedulers)
    grow(model, optims, to=BOTH, scheduler=schedulers, dynamics=dynamics)
    steps(model, optims, 2, 2, schedulers)
    things = [model, *optims, *schedulers]
    torch.save([one.state_dict() for one in things], tmp_path / "run.pt")
    expected = steps(model, optims, 3, 4, schedulers)

    other = make("llama", tied=True)
    again = pair(other)
    following = fading(again)
    growkern.resume(other, again, model.config.growkern_history, scheduler=following)
    for one, state in zip(
        [other, *again, *following], torch.load(tmp_path / "run.pt"), strict=True
    ):
        one.load_state_dict(state)

    assert steps(other, again, 3, 4, following) == expected


def test_master_weights_are_divided_among_optimizers():
    runs = []
    for several in (False, True):
        model = make("llama", tied=True).bfloat16()
        masters = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
        matrices, rest = ([masters[p] for p in half] for half in halves(model))
        optims = [
            AdamW(h, lr=1e-2) for h in ([matrices, rest] if several else [[*masters.values()]])
        ]
        for i in range(4):
            if i == 2:
                grow(model, optims, to=BOTH, master_weights=masters)
            loss_of(model, batch(seed=i)).backward()
            for p, master in masters.items():
                master.grad, p.grad = p.grad.float(), None
            for optim in optims:
                optim.step()
            for p, master in masters.items():
                p.data.copy_(master)
        runs.append(model.state_dict())
        assert len(masters) == len([*model.parameters()])
    assert all(torch.equal(a, runs[1][name]) for name, a in runs[0].items())


def by_layer(model: nn.Module) -> list[AdamW]:
    """Return two optimizers: of the first layer, and of everything else."""
    first = [*model.model.layers[0].parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in first)]
    return [AdamW(part, lr=1e-2, weight_decay=0.1) for part in (first, rest)]


@pytest.mark.slow
@pytest.mark.parametrize("split", [by_layer, two])
def test_compare_and_verify_see_two_optimizers_as_one(split):
    models = [make("llama", tied=True).double() for _ in range(2)]
    optims = [split(models[0]), [AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.1)]]
    for model, several in zip(models, optims, strict=True):
        steps(model, several, 2)
    before = copy.deepcopy([optim.state_dict() for optim in optims[0]])

    found, expected = (
        growkern.compare(model, several, methods=[width.AKI()], batch=batch(), to=BOTH, steps=3).outcomes
        for model, several in zip(models, optims, strict=True)
    )  # fmt: skip

    assert found[1].refused is None and before[0]["state"]
    assert [o.loss_after for o in found] == [o.loss_after for o in expected]
    assert same([optim.state_dict() for optim in optims[0]], before)
    source = copy.deepcopy(models[0])
    grow(models[0], optims[0], to=BOTH)
    assert growkern.verify(source, models[0], batch(n=16), optims[0]).ok
    name, _ = next(iter(models[0].named_parameters()))
    assert name in growkern.verify(source, models[0], batch(n=16), optims[0][:1]).unheld
    p = optims[0][1].param_groups[0]["params"][0]
    optims[0][1].state[p]["exp_avg"] = torch.zeros(3, 3)
    assert growkern.verify(source, models[0], batch(n=16), optims[0]).state


def test_experts_go_to_the_optimizer_of_their_mlp():
    models = [make("llama", tied=True) for _ in range(2)]
    optims = [by_layer(models[0]), [AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.1)]]
    for model, several in zip(models, optims, strict=True):
        steps(model, several, 2)

    mixtures = [
        growkern.upcycle(*pair, experts=4, seed=3) for pair in zip(models, optims, strict=True)
    ]

    assert steps(mixtures[0], optims[0], 5) == steps(mixtures[1], optims[1], 5)
    for layer, optim in zip(mixtures[0].model.layers, optims[0], strict=True):
        held = [p for group in optim.param_groups for p in group["params"]]
        for p in layer.mlp.parameters():
            assert sum(p is q for q in held) == 1 and p in optim.state


def test_upcycling_refuses_muon_for_experts_and_takes_it_beside_them(monkeypatch):
    model = make("llama", tied=True)
    mlps = [p for name, p in model.named_parameters() if ".mlp." in name]
    rest = [p for p in model.parameters() if p.dim() == 2 and all(p is not q for q in mlps)]
    muon = torch.optim.Muon(mlps, lr=1e-2)
    before = copy.deepcopy(muon.param_groups)

    with pytest.raises(UnsupportedOptimizerError, match="trains matrices.*move the MLPs"):
        growkern.upcycle(model, muon, experts=2)

    assert same(muon.param_groups, before)
    optims = [torch.optim.Muon(rest, lr=1e-2), AdamW(mlps, lr=1e-2)]
    steps(model, optims, 1)
    mixture = growkern.upcycle(model, optims, experts=2)
    assert steps(mixture, optims, 3)[-1] > 0 and mixture.model.layers[0].mlp.gate.weight in optims[1].state  # fmt: skip
