"""Optimizers, schedulers and training loops continue after a growth."""

import copy

import pytest
import torch
from models import batch, grow, logits, loss_of, make, train
from torch.optim import lr_scheduler as schedules

import growkern
from growkern import depth, width
from growkern.errors import PlanError

# the law divides learning rates of copies, and keeps the rate where nothing is copied
COPIES = width.Lossless(noise=1)

VARIANTS = {
    "plain": dict(foreach=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "amsgrad": dict(amsgrad=True),
    "tensor-lr": dict(lr=torch.tensor(1e-3), foreach=False),
    "amsgrad-fused": dict(amsgrad=True, fused=True),
    "maximize": dict(maximize=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_the_loop_goes_on_in_every_adam_with_the_old_loss_alive(kind, options):
    model = make("llama", tied=True)
    optim = kind(model.parameters(), **({"lr": 1e-3} | options))
    losses = train(model, optim, 3)
    loss = loss_of(model, batch(seed=3))
    loss.backward()
    identities = [id(p) for p in model.parameters()]

    report = grow(model, optim, to={"hidden": 48})
    after = loss_of(model, batch(seed=3))

    assert [id(p) for p in model.parameters()] == identities
    assert after.item() == pytest.approx(loss.item(), abs=1e-5)
    assert report.function_preserving and losses
    for p in model.parameters():
        assert p.grad.shape == p.shape
        assert all(s.shape == p.shape for key, s in optim.state[p].items() if key != "step")
    optim.step()
    assert all(torch.isfinite(torch.tensor(train(model, optim, 3, first=4))))


@pytest.mark.parametrize(
    "options", [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True, fused=True)], ids=str
)
@pytest.mark.parametrize("to", ["2x", {"layers": 4}, {"hidden": 48, "layers": 3}], ids=str)
def test_the_loop_goes_on_in_sgd(to, options):
    model = make("gpt2", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=1e-2, **options)
    train(model, optim, 2)
    expected = loss_of(model, batch()).item()

    grow(model, optim, to=to)
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, optim, 3)

    assert losses[0] == pytest.approx(expected, abs=1e-5)
    for (name, p), q in zip(model.named_parameters(), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, q), name


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Muon])
def test_an_optimizer_of_some_parameters_gains_those_of_new_blocks(kind):
    model = make("llama", tied=True)
    held = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    optim = kind(held, lr=1e-3, momentum=0.9)
    train(model, optim, 2)

    grow(model, optim, to={"hidden": 48, "layers": 4})

    assert len(optim.param_groups[0]["params"]) + sum(
        len(group["params"]) for group in optim.param_groups[1:]
    ) == 2 * len(held)
    train(model, optim, 2)


def test_growth_before_the_first_step_leaves_state_to_the_optimizer():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), fused=True)

    grow(model, optim, to={"hidden": 48, "layers": 3})

    assert not optim.state
    train(model, optim, 2)
    assert len(optim.state) == len(list(model.parameters()))


def test_growing_in_the_middle_of_an_accumulation_is_exact():
    """A step with the growth between its two micro-batches equals a step with the growth before both."""

    def step(between: bool):
        model = make("llama", tied=False).double()
        optim = torch.optim.SGD(model.parameters(), lr=0.1)
        quiet = dict(to="2x", width=width.Lossless(noise=0), dynamics=None)
        if not between:
            grow(model, optim, **quiet)
        loss_of(model, batch(seed=0)).backward()
        if between:
            grow(model, optim, **quiet)
        loss_of(model, batch(seed=1)).backward()
        optim.step()
        return logits(model, batch(seed=2))

    assert (
        step(True) - step(False)
    ).abs().max() < 1e-6  # the norms of transformers round to float32


def test_dropped_state_is_gone_and_said():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    train(model, optim, 2)

    report = grow(model, optim, to="2x", state="drop")

    assert not optim.state and "warm" in str(report)
    train(model, optim, 2)


MOMENTS = ("exp_avg_sq",), ("exp_avg",)
SIZES = {  # optimizer -> its options, its state that bounds a step, and its state that moves a step
    "AdamW": ({}, *MOMENTS),
    "Adam": (dict(amsgrad=True), ("exp_avg_sq", "max_exp_avg_sq"), ("exp_avg",)),
    "NAdam": ({}, *MOMENTS),
    "RAdam": ({}, *MOMENTS),
    "Adamax": ({}, ("exp_inf",), ("exp_avg",)),
    "Adadelta": ({}, ("square_avg", "acc_delta"), ()),
    "Adagrad": ({}, ("sum",), ()),
    "RMSprop": (dict(momentum=0.9, centered=True), ("square_avg",), ("momentum_buffer", "grad_avg")),
    "Rprop": ({}, ("step_size",), ("prev",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_elements_without_an_ancestor_take_steps_of_mean_size(name):
    options, sizes, moves = SIZES[name]
    model = make("gpt2", tied=False)
    optim = getattr(torch.optim, name)(model.parameters(), **options)
    train(model, optim, 3)

    grow(model, optim, to={"hidden": 30})

    state = optim.state[model.transformer.wte.weight]
    assert {key for key, t in state.items() if t.dim()} == {*sizes, *moves}
    for size in sizes:
        old, new = state[size][:, :24], state[size][:, 24:]
        assert torch.allclose(new, old.mean().expand_as(new), rtol=1e-5) and (new > 0).all()
    for move in moves:
        assert (state[move][:, 24:] == 0).all() and (state[move][:, :24] != 0).any()
    assert state["step"] == 3


def test_identity_blocks_start_with_a_step_count_of_their_own_and_stacked_blocks_bring_state():
    fresh, stacked = make("llama", tied=True), make("llama", tied=True)
    optims = [torch.optim.AdamW(m.parameters()) for m in (fresh, stacked)]
    for model, optim in zip((fresh, stacked), optims, strict=True):
        train(model, optim, 3)

    grow(fresh, optims[0], to={"layers": 4})
    grow(stacked, optims[1], to={"layers": 4}, depth=depth.Stack())

    new = fresh.model.layers[1].mlp.up_proj.weight
    assert not optims[0].state.get(new)
    train(fresh, optims[0], 1)
    assert (
        optims[0].state[new]["step"] == 1
        and optims[0].state[fresh.model.layers[0].mlp.up_proj.weight]["step"] == 4
    )
    one, two = (stacked.model.layers[i].mlp.up_proj.weight for i in (0, 2))
    assert torch.equal(optims[1].state[one]["exp_avg"], optims[1].state[two]["exp_avg"])
    assert (
        optims[1].state[two]["step"] == 3
        and optims[1].state[two]["step"] is not optims[1].state[one]["step"]
    )


def test_new_blocks_join_the_group_of_their_block_in_model_order():
    model = make("llama", tied=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optim = torch.optim.AdamW(
        [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    )
    train(model, optim, 1)

    grow(model, optim, to={"layers": 4})

    for group, of in zip(
        optim.param_groups, (lambda p: p.dim() > 1, lambda p: p.dim() == 1), strict=True
    ):
        assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if of(p)]


def test_frozen_and_unregistered_parameters_grow_and_are_named():
    model = make("llama", tied=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    held = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n]
    optim = torch.optim.AdamW(held)
    train(model, optim, 2)

    report = grow(model, optim, to={"hidden": 48, "layers": 3})

    assert "model.embed_tokens.weight, lm_head.weight" in str(report)
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.shape == (
        66,
        48,
    )
    train(model, optim, 2)


def test_optimizer_state_dict_round_trip_gives_an_equal_next_step():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    grow(model, optim, to={"hidden": 48, "layers": 3})
    train(model, optim, 1, first=3)
    other = copy.deepcopy(model)
    names = {id(p): n for n, p in model.named_parameters()}

    again = torch.optim.AdamW(
        [
            dict(params=[other.get_parameter(names[id(p)]) for p in g["params"]])
            for g in optim.param_groups
        ]
    )
    again.load_state_dict(copy.deepcopy(optim.state_dict()))  # load_state_dict shares tensors
    train(model, optim, 2, first=4)
    train(other, again, 2, first=4)

    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_depth_alone_keeps_one_group_so_a_fresh_optimizer_loads_its_state():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    grow(model, optim, to={"layers": 4})
    train(model, optim, 1, first=3)
    other = copy.deepcopy(model)

    again = torch.optim.AdamW(other.parameters())
    again.load_state_dict(copy.deepcopy(optim.state_dict()))  # load_state_dict shares tensors
    train(model, optim, 2, first=4)
    train(other, again, 2, first=4)

    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def constant(optim):
    """Return a scheduler that changes nothing: growths that get it split param groups."""
    return schedules.ConstantLR(optim, factor=1.0)


def test_learning_rates_follow_the_law_for_good():
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    scheduler = constant(optim)

    report = grow(model, optim, to="2x", width=COPIES, scheduler=scheduler)

    rates = {id(p): g["lr"] for g in optim.param_groups for p in g["params"]}
    assert rates[id(model.model.layers[0].mlp.up_proj.weight)] == pytest.approx(5e-4)
    assert rates[id(model.lm_head.weight)] == pytest.approx(5e-4)
    assert rates[id(model.model.embed_tokens.weight)] == rates[id(model.model.norm.weight)] == 1e-3
    assert report.lr_applied and report.lr_factors == {1.0: 6, 0.5: 15}
    grow(model, optim, to="2x", width=COPIES, scheduler=scheduler)
    assert {round(g["lr"], 9) for g in optim.param_groups} == {1e-3, 2.5e-4}


def test_without_dynamics_groups_stay_and_factors_are_reported():
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    report = grow(model, optim, to="2x", width=COPIES, dynamics=None)

    assert len(optim.param_groups) == 1 and optim.param_groups[0]["lr"] == 1e-3
    assert report.lr_factors == {1.0: 6, 0.5: 15} and "not applied" in str(report)


def test_a_shared_tensor_learning_rate_is_not_multiplied_in_place():
    lr = torch.tensor(1e-3)
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)

    grow(model, optim, to="2x", width=COPIES, scheduler=constant(optim))

    assert lr == torch.tensor(1e-3) and sorted(
        float(g["lr"]) for g in optim.param_groups
    ) == pytest.approx([5e-4, 1e-3])


SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 6], 0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 8),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 12, 2.0),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 1e-2, 20),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-4, 1e-3, 3, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 4), schedules.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 4), schedules.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 5e-3, 6),
    "SWA-per-group": lambda o: schedules.LambdaLR(o, [lambda t: 0.5**t] * len(o.param_groups)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_go_on_and_keep_the_factor(make_scheduler):
    def run(grown: bool) -> list[list[float]]:
        model = make("llama", tied=False)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = make_scheduler(optim)
        rates = []
        for t in range(10):
            if t == 3 and grown:
                to = {"hidden": 48, "layers": 3}
                grow(model, optim, to=to, width=COPIES, scheduler=scheduler)
            train(model, optim, 1, first=t) if grown else optim.step()
            scheduler.step()
            rates.append([float(g["lr"]) for g in optim.param_groups])
        return rates

    plain, grown = run(False), run(True)

    for t in range(3, 10):
        (base,), (kept, half) = plain[t], grown[t]
        assert kept == pytest.approx(base, rel=1e-9) and half == pytest.approx(
            base / 2, rel=1e-9
        ), t


def test_a_plateau_scheduler_keeps_the_factor():
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = schedules.ReduceLROnPlateau(optim, patience=0, factor=0.1, min_lr=[1e-5])

    grow(model, optim, to="2x", width=COPIES, scheduler=scheduler)
    for _ in range(8):
        train(model, optim, 1)
        scheduler.step(1.0)

    assert [g["lr"] for g in optim.param_groups] == pytest.approx([1e-5, 5e-6])


class Decay:
    """A scheduler class that the user wrote."""

    def __init__(self, optim):
        self.optimizer = optim

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.9 * group["lr"]


FOREIGN = {
    "not handed over": (lambda o: schedules.StepLR(o, 2), False),
    "with a floor of its own": (lambda o: schedules.CosineAnnealingLR(o, 10, eta_min=5e-4), True),
    "of the user's own": (Decay, True),
}


@pytest.mark.parametrize(("make_scheduler", "handed"), FOREIGN.values(), ids=FOREIGN)
def test_hooks_carry_the_factor_where_a_scheduler_cannot_follow_split_groups(
    make_scheduler, handed
):
    """The source's scheduler sets one rate; every update equals the update of split param groups at the same rate."""

    def run(hooks: bool):
        model = make("llama", tied=False).double()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optim, 2)
        scheduler = make_scheduler(optim) if hooks else constant(optim)
        passed = scheduler if handed or not hooks else None
        report = grow(model, optim, to="2x", scheduler=passed)
        factors = [g["lr"] / optim.param_groups[0]["lr"] for g in optim.param_groups]
        assert len(factors) == (1 if hooks else 2) and ("UpdateScale" in str(report)) == hooks
        for t in range(6):
            train(model, optim, 1, first=t)
            if hooks:
                scheduler.step()
                rates.append(optim.param_groups[0]["lr"])
            else:
                for group, factor in zip(optim.param_groups, factors, strict=True):
                    group["lr"] = rates[t] * factor
                    group["weight_decay"] = 0.01 / factor
        return list(model.parameters())

    rates: list[float] = []

    for p, q in zip(run(hooks=True), run(hooks=False), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_the_gradient_norm_factor_is_the_one_that_clipping_sees():
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    optim.zero_grad()
    loss_of(model, batch()).backward()
    before = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)

    report = grow(model, optim, to="2x", width=width.Lossless(noise=0))
    optim.zero_grad()
    loss_of(model, batch()).backward()
    after = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)

    assert report.grad_norm_factor == pytest.approx((after / before).item(), rel=1e-4)


@pytest.mark.parametrize("dynamics", [None, "exact"])
def test_the_gradient_norm_factor_is_that_of_what_the_source_had(dynamics):
    """New elements copy nothing, so that their second moments, which are means, do not count; scaled gains of norms do."""
    model = make("llama", tied=False).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    optim.zero_grad()

    squares = {name: optim.state[p]["exp_avg_sq"].sum() for name, p in model.named_parameters()}

    report = grow(model, optim, to="2x", dynamics=dynamics)

    gains = {name: 2 if "norm" in name else 1 for name in squares}  # gains are divided by sqrt(2)
    expected = sum(gains[name] * s for name, s in squares.items()) / sum(squares.values())
    assert report.grad_norm_factor == pytest.approx(expected.sqrt().item(), rel=1e-9)
    assert "what is new adds to it: measure" in str(report)


@pytest.mark.parametrize(
    "options",
    [
        dict(width=width.Lossless(noise=0), to="2x"),
        dict(width=width.Lossless(), to={"hidden": 33, "ffn": 50}),
        dict(width=width.AKI(), to={"hidden": 36, "layers": 3}),
        dict(width=width.AKIPro(), to={"hidden": 48, "kv_heads": 2}),
        dict(width=width.FPI(), to={"ffn": 60, "layers": 3}),
        dict(width=width.Net2Wider(maps="cyclic"), to={"hidden": 36}),
    ],
    ids=str,
)
def test_the_gradient_norm_factor_is_that_of_the_gradients_in_flight(options):
    model = make("llama", tied=False).double()
    loss_of(model, batch()).backward()
    before = sum(p.grad.square().sum() for p in model.parameters())
    plan = growkern.plan(model, **options)

    report = growkern.expand_inplace(model, plan=plan, width=options["width"])

    after, params = 0.0, dict(model.named_parameters())
    for row in plan.tensors:
        if not row.new and row.constant is None:
            grad = params[row.name].grad.square()
            for at, axis in enumerate(plan.axis_maps(row)):  # pads left out
                copied = [i for i, j in enumerate(axis.index_map.indices) if j >= 0]
                grad = grad.index_select(at, torch.tensor(copied))
            after += grad.sum()
    assert report.grad_norm_factor == pytest.approx((after / before).sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("to", ["2x", {"ffn": 60, "hidden": 48}], ids=["whole", "uneven"])
def test_the_gradient_norm_factor_of_second_moments_is_the_same_under_hooks_that_keep_their_units(
    to,
):
    def factors(dynamics) -> list[float]:
        model = make("llama", tied=False).double()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optim, 2)
        optim.zero_grad()
        options = dict(width=width.Lossless(noise=0), dynamics=dynamics)
        several = [grow(model, optim, to=to, **options), grow(model, optim, to="2x", **options)]
        return [report.grad_norm_factor for report in several]

    assert factors("exact") == pytest.approx(factors(None), rel=1e-9)


@pytest.mark.slow
def test_a_compiled_model_grows_through_its_wrapper():
    model = make("plain", tied=True)
    compiled = torch.compile(model, backend="eager")
    before = compiled(batch()).detach()

    growkern.expand_inplace(compiled, to={"hidden": 48, "layers": 3}, spec=model.spec())

    assert (compiled(batch()) - before).abs().max() < 1e-4


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad], ids=["inference", "no-grad"]
)
def test_growth_inside_a_context_without_gradients_leaves_a_trainable_model(context):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    train(model, optim, 1)

    with context():
        grow(model, optim, to={"hidden": 48, "layers": 3})

    before = [p.detach().clone() for p in model.parameters()]
    train(model, optim, 2)
    for (name, p), q in zip(model.named_parameters(), before, strict=True):
        assert p.requires_grad and not p.is_inference() and not torch.equal(p, q), name


def test_growth_inside_autocast_forgets_cached_casts():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model, batch()).detach().float()
        grow(model, optim, to="2x")
        after = logits(model, batch()).float()

    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_growing_again_and_again():
    model = make("llama", tied=True).double()
    optim = torch.optim.AdamW(model.parameters())
    for i, to in enumerate(
        ["1.5x", "2x", {"layers": 3}, {"hidden": 80, "ffn": 131}, {"layers": 5}]
    ):
        train(model, optim, 2, first=2 * i)
        before = logits(model, batch()).detach()
        grow(model, optim, to=to, seed=i)
        assert (logits(model, batch()) - before).abs().max() < 1e-5


@pytest.mark.parametrize("split", [False, True], ids=["hooks", "groups"])
def test_weight_decay_per_step_stays_so_the_grown_run_is_the_source_run(split):
    for kind, options in [
        (torch.optim.AdamW, dict(eps=1e-12)),
        (torch.optim.SGD, dict(momentum=0.9)),
    ]:
        model = make("plain", tied=False).double()
        optim = kind(model.parameters(), lr=1e-2, weight_decay=0.3, **options)
        train(model, optim, 5)
        source, source_optim = copy.deepcopy((model, optim))

        scheduler = constant(optim) if split else None
        report = grow(model, optim, to="2x", width=width.Lossless(noise=0), scheduler=scheduler)

        assert ("weight decay was divided" in str(report)) == split
        expected = train(source, source_optim, 20, first=5)
        assert train(model, optim, 20, first=5) == pytest.approx(expected, abs=1e-7), kind


def test_names_in_param_groups_follow():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.named_parameters())
    train(model, optim, 1)

    grow(model, optim, to={"hidden": 48, "layers": 3})

    for group in optim.param_groups:
        assert all(
            model.get_parameter(n) is p
            for n, p in zip(group["param_names"], group["params"], strict=True)
        )
    held = [id(p) for group in optim.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_a_list_of_schedulers_is_followed_and_half_a_list_is_not():
    model = make("llama", tied=False)
    optim = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    one, two = schedules.CyclicLR(optim, 1e-3, 1e-2, 4), schedules.ExponentialLR(optim, 0.9)
    other = make("llama", tied=False)
    other_optim = torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9)
    half = [
        f(other_optim) for f in (lambda o: schedules.StepLR(o, 1), lambda o: schedules.StepLR(o, 2))
    ]

    grow(model, optim, to="2x", scheduler=[one, two])
    grow(other, other_optim, to="2x", scheduler=half[:1])

    for _ in range(3):
        train(model, optim, 1)
        one.step()
        two.step()
    rates = {round(g["lr"], 12) for g in optim.param_groups}
    assert len(rates) == len(optim.param_groups) > 1
    assert len(other_optim.param_groups) == 1 and len(half) == 2


@pytest.mark.parametrize(
    "declared",
    [{"head.weight": "wte.weight"}, {"wte.weight": "head.weight"}],
    ids=["head", "table"],
)
def test_a_tie_may_be_declared_either_way(declared):
    import dataclasses

    model = make("plain", tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    before = logits(model, batch()).detach()

    growkern.expand_inplace(
        model,
        optim,
        spec=dataclasses.replace(model.spec(), ties=declared),
        to="2x",
        width=COPIES,
        scheduler=constant(optim),
    )

    assert (logits(model, batch()) - before).abs().max() < 1e-12
    rates = {id(p): g["lr"] for g in optim.param_groups for p in g["params"]}
    assert rates[id(model.wte.weight)] == 1e-3 and rates[id(model.blocks[0].up.weight)] == 5e-4


def test_a_model_that_shares_its_config_is_left_whole():
    config = make("llama", tied=True).config
    one, other = type(make("llama", tied=True))(config), type(make("llama", tied=True))(config)

    grow(one, to={"hidden": 48, "layers": 3})

    assert (one.config.hidden_size, other.config.hidden_size, config.num_hidden_layers) == (
        48,
        24,
        2,
    )
    assert all(m.config is one.config for m in one.modules() if hasattr(m, "config"))


def test_hooks_of_the_users_objects_see_new_blocks_too():
    class Recorder:
        n = 0

        def hook(self, *_):
            self.n += 1

    model, recorder = make("llama", tied=True), Recorder()
    for layer in model.model.layers:
        layer.register_forward_hook(recorder.hook)

    grow(model, to={"layers": 4})
    model(batch())

    assert recorder.n == 4


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_per_growth_and_never_runs_out():
    """Three growths are more than ``recompile_limit`` allows, and ``fullgraph=True`` makes the limit an error."""
    torch._dynamo.reset()
    model = make("plain", tied=True, n_layer=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    limit = torch._dynamo.config.recompile_limit
    try:
        torch._dynamo.config.recompile_limit = 2
        ffn = 96
        for growth in range(3):
            counters = torch._dynamo.utils.counters["stats"]
            train(compiled, optim, 2, first=growth)
            n_graphs = counters["unique_graphs"]
            ffn += 32

            growkern.expand_inplace(
                compiled, optim, to={"ffn": ffn}, spec=model.spec(), seed=growth
            )

            loss = loss_of(compiled, batch())
            assert loss.item() == pytest.approx(loss_of(model, batch()).item(), abs=1e-5)
            train(compiled, optim, 1)
            assert counters["unique_graphs"] == n_graphs + 1
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()


def test_one_learning_rate_set_by_hand_for_all_groups_is_refused_before_the_step():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    train(model, optim, 2)
    grow(model, optim, to="2x", scheduler=constant(optim))
    train(model, optim, 1)
    before = [p.detach().clone() for p in model.parameters()]

    for group in optim.param_groups:
        group["lr"] = 5e-4
    with pytest.raises(PlanError, match="undoes the factors"):
        train(model, optim, 1)

    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for group in optim.param_groups:
        group["lr"] = 5e-4 * group["lr_factor"]
    train(model, optim, 1)
