"""Procedures of the papers are schedules: equal to events that are written by hand, run to their end, with the FLOPs that they print."""

import copy
import json
import re

import pytest
import torch
from models import LENGTH, batch, loss_of, make
from scheduled import optimizer, run, same_weights
from torch.utils.flop_counter import FlopCounterMode

import growkern
from growkern import depth, procedures, trains, width
from growkern.errors import PlanError
from growkern.training.schedule import GrowthSchedule
from growkern.training.trains import flops_per_token
from growkern.training.triggers import At

TOKENS = 2.0 * LENGTH
TOP = dict(depth=depth.TopCopies(), trains=trains.Top())
FRESH = dict(state="drop")
PLAIN = FRESH | dict(dynamics=None)  # the papers have one learning rate for all
MADE = {  # the call, the events by hand, and who trains at the end
    "mslt": (
        lambda m: procedures.mslt(m, layers=(2, 3, 4), steps=(3, 3, 3), joint=2, tokens_per_step=TOKENS),
        [At(step=3, to={"layers": 3}, **TOP), At(step=6, to={"layers": 4}, **TOP), At(step=9, to=None)],
    ),
    "stack_bert": (
        lambda m: procedures.stack_bert(m, layers=(2, 4, 8), steps=(3, 3), total_steps=9, tokens_per_step=TOKENS),
        [At(step=at, to={"layers": n}, depth=depth.Stack(), **FRESH) for at, n in ((3, 4), (6, 8))],
    ),
    "bert2bert": (
        lambda m: procedures.bert2bert(
            m, {"hidden": 48, "layers": 4}, at=2, stage1_steps=4, total_steps=9, tokens_per_step=TOKENS, size=2),
        [
            At(step=2, to={"hidden": 48, "layers": 4}, width=width.AKI(), depth=depth.Stack(), trains=trains.SubModels(2), **PLAIN),
            At(step=6, to=None),
        ],
    ),
    "compound_grow": (
        lambda m: procedures.compound_grow(
            m, [{"ffn": "2x"}, {"layers": "2x"}], steps=(3, 3), total_steps=9, tokens_per_step=TOKENS),
        [
            At(step=3, to={"ffn": "2x"}, width=width.HyperClone(), depth=depth.Stack(), **PLAIN),
            At(step=6, to={"layers": "2x"}, width=width.HyperClone(), depth=depth.Stack(), **PLAIN),
        ],
    ),
    "llama_pro": (
        lambda m: procedures.llama_pro(m, layers=4, at=3, total_steps=9, tokens_per_step=TOKENS),
        [At(step=3, to={"layers": 4}, depth=depth.IdentityBlocks(), trains=trains.New())],
    ),
    "cgls": (
        lambda m: procedures.cgls(m, layers=(2, 3, 4), steps=(3, 3), warm_steps=1, total_steps=9, tokens_per_step=TOKENS),
        [
            At(step=3, to={"layers": 3}, **TOP), At(step=4, to=None),
            At(step=6, to={"layers": 4}, **TOP), At(step=7, to=None),
        ],
    ),
    "midas": (
        lambda m: procedures.midas(m, layers=(2, 4, 6), steps=(3, 3), total_steps=9, tokens_per_step=TOKENS),
        [At(step=3, to={"layers": 4}, depth=depth.Middle()), At(step=6, to={"layers": 6}, depth=depth.Middle())],
    ),
    "late_depth": (
        lambda m: procedures.late_depth(m, layers=6, total_steps=10, tokens_per_step=TOKENS),
        [At(step=8, to={"layers": 6}, depth=depth.Fresh())],
    ),
}  # fmt: skip


def train(model, optim, schedule, n: int, *, first: int = 0) -> None:
    for i in range(first, first + n):
        optim.zero_grad()
        loss_of(model, batch(seed=i)).backward()
        schedule.observe(tokens=TOKENS)
        optim.step()


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", MADE)
def test_a_procedure_runs_to_its_end_as_events_by_hand_and_costs_what_it_prints(family, name):
    call, events = MADE[name]
    model = make(family, tied=True).train()
    schedule = call(model)
    assert schedule.events == tuple(events)
    start = copy.deepcopy(model)
    optim = optimizer(model)
    schedule.attach(model, optim)
    losses = []
    model.register_forward_hook(lambda *_: losses.append(1))

    train(model, optim, schedule, schedule.total_steps)

    assert len(schedule.fired) == len(events) and len(losses) == schedule.total_steps
    sizes = growkern.describe(model).sizes
    assert sum(p.numel() for p in model.parameters()) == schedule.stages[-1].n_params
    varies = any(
        event.trains.varies for event in events
    )  # the draws of a few steps are not their mean
    assert schedule.counts.n_flops == pytest.approx(schedule.flops, rel=0.2 if varies else 1e-12, abs=0)  # fmt: skip

    by_hand = GrowthSchedule(events)
    optim = optimizer(start)
    by_hand.attach(start, optim)
    train(start, optim, by_hand, schedule.total_steps)
    same_weights(model, start)
    assert growkern.describe(start).sizes == sizes


SPECIAL = {  # a procedure, and the growths that it amounts to
    "one stage": (
        lambda m: procedures.mslt(m, layers=(2,), steps=(4,), joint=5, tokens_per_step=TOKENS),
        [],
    ),
    "a stage without steps": (
        lambda m: procedures.cgls(m, layers=(2, 4), steps=(3,), warm_steps=0, total_steps=9, tokens_per_step=TOKENS),
        [At(step=3, to={"layers": 4}, depth=depth.TopCopies())],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("case", SPECIAL)
def test_one_stage_is_ordinary_training_and_a_stage_without_steps_is_its_growth_alone(family, case):
    call, events = SPECIAL[case]
    model, plain = make(family, tied=True).train(), make(family, tied=True).train()
    optim, other = optimizer(model), optimizer(plain)
    schedule = call(model)
    schedule.attach(model, optim)
    if events:
        GrowthSchedule(events).attach(plain, other)

    train(model, optim, schedule, 9)
    run(plain, other, 9)

    same_weights(model, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mslt", "bert2bert", "llama_pro"])
@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_procedure_that_is_saved_and_resumed_ends_as_the_unbroken_one(name, stop):
    def built(seed: int):
        model = make("llama", tied=True, seed=seed).train()
        return model, optimizer(model), MADE[name][0](model)

    whole, optim, schedule = built(0)
    schedule.attach(whole, optim)
    train(whole, optim, schedule, 9)

    first, optim, schedule = built(0)
    schedule.attach(first, optim)
    train(first, optim, schedule, stop)
    saved = copy.deepcopy((first.state_dict(), optim.state_dict()))
    state = json.loads(json.dumps(schedule.state_dict()))

    model, optim, schedule = built(1)
    schedule.load_state_dict(state)
    growkern.resume(model, optim, state["history"])
    model.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])
    schedule.attach(model, optim)
    train(model, optim, schedule, 9 - stop, first=stop)

    same_weights(model, whole)


@pytest.mark.parametrize("who", [trains.All(), trains.Top(1), trains.Top(3), trains.New()], ids=str)
def test_flops_are_those_of_the_matrix_products_that_torch_counts(who):
    """With a head of its own and short sequences, the matrices of the blocks and the head do nearly all of the work."""
    model = make("llama", tied=False, num_hidden_layers=4, hidden_size=96, intermediate_size=256).train()  # fmt: skip
    new = [f"model.layers.{i}" for i in (1, 3)]
    spec = growkern.describe(model)
    frozen = who.frozen(spec, new)
    growkern.engine.freezing.choose(model, frozen)
    ids = torch.zeros(8, 2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids).backward()

    table = model.model.embed_tokens.weight.numel()  # is looked up
    n_embedded = 2 * table * (3 if not frozen.names else 1)
    expected = (flops_per_token(model, spec, frozen) - n_embedded) * ids.numel()

    # in the lowest block that trains, three matrices need no gradient of their input
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.08)


def test_a_procedure_prints_its_stages_before_and_during_the_run():
    model = make("llama", tied=True).train()
    schedule = MADE["mslt"][0](model)

    text = str(schedule)

    rows = [line for line in text.splitlines() if re.match(r"\d", line)]
    assert [row.split()[:2] for row in rows[:4]] == [["0", "3"], ["3", "3"], ["6", "3"], ["9", "2"]]
    assert "layers=3, trains Top" in rows[1] and "trains All()" in rows[3] and rows[0].endswith("now")  # fmt: skip
    assert f"{schedule.flops / schedule.scratch:.0%} of the" in text
    optim = optimizer(model)
    schedule.attach(model, optim)
    train(model, optim, schedule, 4)
    rows = [line for line in str(schedule).splitlines() if re.match(r"\d", line)]
    assert rows[1].endswith("now") and not rows[0].endswith("now")


def test_the_rule_of_g_stack_gives_the_examples_of_the_paper():
    """Llama 3 8B at 15T tokens, Llama 2 7B at 2T tokens, 70B at 2T tokens."""
    for n, tokens, expected in ((8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (70e9, 2e12, 42.48e9)):
        found = procedures.g_stack_tokens(n, 6 * n * tokens)
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_g_stack_runs_to_its_end(family):
    """With so many tokens in a step, the rule says 2.6 steps of 9."""
    model = make(family, tied=True).train()
    schedule = procedures.g_stack(model, total_steps=9, tokens_per_step=2.0**29, rewarm=3)
    optim = optimizer(model)
    schedule.attach(model, optim)

    train(model, optim, schedule, 9)

    assert schedule.fired == [3] and growkern.describe(model).sizes["layers"] == 8
    assert {float(optim.state[p]["step"]) for p in model.parameters()} == {6.0}  # a new optimizer


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_staged_training_runs_to_its_end_as_the_losses_say(family):
    """Losses fall steeply and then level off, twice; the scheduler goes back each time, and rates rise from 0."""
    model = make(family, tied=True).train()
    schedule = procedures.staged_training(
        model, ["depth", "width"], total_steps=60, tokens_per_step=TOKENS, rewarm=2
    )
    optim = optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step))
    schedule.attach(model, optim, scheduler)
    at = [3.0]
    for i in range(60):
        n = len(schedule.fired)
        optim.zero_grad()
        loss_of(model, batch(seed=i)).backward()
        optim.step()
        scheduler.step()
        at = [3.0] if len(schedule.fired) > n else at
        at.append(at[-1] * (0.9 if len(at) < 9 else 0.9999))
        schedule.observe(tokens=TOKENS, eval_loss=at[-1])

    sizes = growkern.describe(model).sizes
    assert (sizes["layers"], sizes["hidden"]) == (4, 48) and not schedule.ahead
    rewinds, position = dict(zip(schedule.fired, (1.412, 1.776, 1.0), strict=True)), 0
    for step in range(1, 61):
        position = round(position / rewinds.get(step, 1)) + 1
    assert scheduler.last_epoch == position < 60


def test_g_stack_grows_after_the_tokens_of_the_rule():
    model = make("llama", tied=True)
    schedule = procedures.g_stack(model, total_steps=100_000, tokens_per_step=2**21)

    (event,) = schedule.events
    n = schedule.stages[-1].n_params
    rule = procedures.g_stack_tokens(n, 6.0 * n * 100_000 * 2**21)
    assert event.step == round(rule / 2**21) and event.rewarm == 3000
    assert event.to == {"layers": "4x"} and event.depth == depth.Stack() and event.state == "drop"
    with pytest.raises(PlanError, match="the rule grows a target of .* and the run has 5"):
        procedures.g_stack(model, total_steps=5, tokens_per_step=32)


def test_staged_training_has_the_published_thresholds_and_rewinds():
    model = make("gpt2", tied=True)

    schedule = procedures.staged_training(
        model, ["depth", "width", "both"], total_steps=100, tokens_per_step=TOKENS
    )

    assert [(e.tau, e.rewind, e.rewarm) for e in schedule.events] == [
        (0.0575, 1.412, 200), (0.0475, 1.776, 200), (0.03, 2.455, 200), (0.052, None, 0)
    ]  # fmt: skip
    assert schedule.flops is None and "when it is due" in str(schedule)
    assert schedule.stages[-1].n_params > 8 * schedule.stages[0].n_params


REFUSED = {
    "a depth that the model has not": (
        lambda m: procedures.mslt(m, layers=(3, 6), steps=(1, 1), joint=1, tokens_per_step=1),
        "the first stage has 3 blocks, and the model 2; pass layers=\\(2, ...\\)",
    ),
    "steps that do not add up": (
        lambda m: procedures.mslt(m, layers=(2, 4), steps=(1,), joint=1, tokens_per_step=1),
        "2 stages need 2 numbers of steps, and 1 were passed",
    ),
    "steps of nothing": (
        lambda m: procedures.mslt(m, layers=(2, 4), steps=(1, 0), joint=1, tokens_per_step=1),
        "numbers of steps of 1 or more",
    ),
    "no joint stage": (
        lambda m: procedures.mslt(m, layers=(2, 4), steps=(1, 1), joint=0, tokens_per_step=1),
        "mslt: joint=0; pass a number from 1",
    ),
    "a depth that falls": (
        lambda m: procedures.cgls(m, layers=(2, 2), steps=(1,), warm_steps=1, total_steps=9, tokens_per_step=1),
        "do not rise",
    ),
    "a size that does not divide": (
        lambda m: procedures.bert2bert(m, {"layers": 4}, at=1, stage1_steps=1, total_steps=9, tokens_per_step=1),
        "4 blocks do not divide into sub-models of 3",
    ),
    "a share": (
        lambda m: procedures.late_depth(m, layers=6, share=1.0, total_steps=9, tokens_per_step=1),
        "between 0 and 1",
    ),
    "no tokens": (
        lambda m: procedures.late_depth(m, layers=6, total_steps=9, tokens_per_step=0),
        "a number above 0",
    ),
    "numbers of stages": (
        lambda m: procedures.compound_grow(m, [{"ffn": "2x"}], steps=(1, 2), total_steps=9, tokens_per_step=1),
        "2 stages need 1 numbers of steps, and 2 were passed",
    ),
    "a strange model": (
        lambda m: procedures.llama_pro("model", layers=4, at=1, total_steps=9, tokens_per_step=1),
        "model: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_when_it_is_planned(call, match):
    model = make("llama", tied=True)
    with pytest.raises(growkern.errors.GrowthError, match=match):
        call(model)


CALLS = {
    "stack_bert": dict(layers=(2, 4), steps=(1,)),
    "mslt": dict(layers=(2, 4), steps=(1, 1), joint=1),
    "bert2bert": dict(to={"layers": 6}, at=1, stage1_steps=1),
    "compound_grow": dict(stages=[{"ffn": "2x"}], steps=(1,)),
    "g_stack": {},
    "staged_training": dict(growths=["depth"]),
    "llama_pro": dict(layers=4, at=1),
    "cgls": dict(layers=(2, 4), steps=(1,), warm_steps=1),
    "midas": dict(layers=(2, 4), steps=(1,)),
    "late_depth": dict(layers=4),
}
RUN = dict(total_steps=9, tokens_per_step=1)
WRONG = {
    "total_steps": (-5, 0, 10**400),
    "tokens_per_step": (-1, 0, float("inf"), float("nan"), 1e308, 10**400),
}
WRONG |= {"joint": (-3, 0), "at": (-1, 0), "stage1_steps": (-1,), "warm_steps": (-1,)}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_no_run_has_are_refused_by_name(name):
    model = make("llama", tied=True)
    options = RUN | CALLS[name]
    if name == "mslt":  # its length is the sum of its stages
        del options["total_steps"]

    for key in {*WRONG} & {*options}:
        for value in WRONG[key]:
            with pytest.raises(PlanError, match=f"{key}=.*; pass a number (from|above) [01]"):
                getattr(procedures, name)(model, **options | {key: value})


def test_the_procedures_of_the_test_are_all_that_there_are():
    functions = {name for name in procedures.__all__ if name.islower()}
    assert functions == {*CALLS, "g_stack_tokens"}


@pytest.mark.parametrize(
    ("n_params", "flops", "name"),
    [
        (0, 1e9, "n_params=0"), (-1, 1e9, "n_params=-1"), (1, 1e9, "n_params=1"), (float("nan"), 1e9, "n_params=nan"),
        (float("inf"), 1e9, "n_params=inf"), ("1", 1e9, "n_params: expected"), (1e9, 1, "flops=1"), (1e9, 1.5, "flops=1.5"),
        (2, 1.5, "flops=1.5"), (1e9, -1, "flops=-1"), (1e9, float("nan"), "flops=nan"), (1e9, float("inf"), "flops=inf"),
    ],
)  # fmt: skip
def test_the_rule_of_g_stack_refuses_numbers_that_no_run_has(n_params, flops, name):
    with pytest.raises(PlanError, match=name):
        procedures.g_stack_tokens(n_params, flops)


def test_a_run_of_less_than_a_token_does_not_stack():
    with pytest.raises(PlanError, match="tokens_per_step=1e-09; the run has less than one token"):
        procedures.g_stack(make("llama", tied=True), total_steps=10, tokens_per_step=1e-9)
