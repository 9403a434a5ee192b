"""``growkern.advise`` recovers known scaling laws, agrees with closed-form savings, and predicts the savings campaign's runs."""

import copy
import json
import pickle
import random
from math import inf, nan
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from benches import importable
from models import batch, loss_of, make
from saved import invoke, said

import growkern
from growkern.advice import choice
from growkern.advice.scaling import fit, interval
from growkern.errors import PlanError
from growkern.recipes import RECIPES
from growkern.recipes.recipe import Recipe, Saved
from growkern.training.loss_curve import LossCurve, read_curve
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At

with importable():
    judging = pytest.importorskip("bench.advice.judging", exc_type=ImportError)
    from bench.advice import calibration, figures

PERFECT = Recipe("perfect", "width", 1.0, 0.0, 1)
SOURCE, TARGET = 1e5, 4e5
TO = {"width": "2x", "depth": {"layers": "4x"}, "both": {"hidden": 48, "layers": 4}}


def law_of(seed: int):
    """Return the formula L(N, D) of a random scaling law, as the oracle."""
    rng = random.Random(seed)
    a, b = rng.uniform(0.25, 0.45), rng.uniform(0.25, 0.45)
    e, at_n, at_d = rng.uniform(0.5, 1.5), rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.9)

    def loss(n: float, d: float) -> float:
        return e + at_n * (n / SOURCE) ** -a + at_d * (d / 1e6) ** -b

    return loss


def curve_of(
    loss, n: float, *, last: float = 1e6, points: int = 30, noise: float = 0.003, seed: int = 0
):
    rng = random.Random(seed)
    tokens = [last * 10 ** (i / points - 1.2) for i in range(int(1.2 * points) + 1)]
    return [(d, loss(n, d) + rng.gauss(0, noise)) for d in tokens]


CURVE = curve_of(law_of(0), SOURCE)
SIZES = {"source": SOURCE, "target": TARGET, "budget": 2.4e12}


def advise_on(loss, *, budget: float = 2.4e12, recipe: Recipe = PERFECT, others=()):
    return growkern.advise(
        curve_of(loss, SOURCE),
        source=SOURCE,
        target=TARGET,
        budget=budget,
        recipe=recipe,
        others=others,
    )


# The law


def test_intervals_hold_what_known_laws_predict():
    held = []
    for seed in range(10):
        loss = law_of(seed)
        law = fit(
            [(SOURCE, curve_of(loss, SOURCE)), (TARGET / 8, curve_of(loss, TARGET / 8, seed=1))]
        )
        for n, d in ((SOURCE, 1e6), (SOURCE, 4e6), (TARGET, 1e6), (TARGET, 4e6)):
            low, _, high = interval(law.loss(n, d))
            held.append(low <= loss(n, d) <= high)

    assert sum(held) >= 0.85 * len(held)


def test_tokens_are_the_inverse_of_the_loss():
    law = fit([(SOURCE, CURVE)])

    found = law.tokens(SOURCE, law.loss(SOURCE, 3e6))

    torch.testing.assert_close(found, torch.full_like(found, 3e6))
    assert law.tokens(SOURCE, law.loss(SOURCE, 1e6) * 0).isinf().all()


@pytest.mark.parametrize("seed", range(3))
def test_one_curve_gives_wider_intervals_for_another_size_than_two(seed):
    loss = law_of(seed)
    own = SOURCE, curve_of(loss, SOURCE)

    one, two = fit([own]), fit([own, (TARGET / 8, curve_of(loss, TARGET / 8, seed=1))])

    width = [high - low for low, _, high in (interval(law.loss(TARGET, 1e6)) for law in (one, two))]
    assert width[0] > 1.5 * width[1]
    low, _, high = interval(one.loss(TARGET, 1e6))
    assert low <= loss(TARGET, 1e6) <= high


def test_a_curve_may_be_an_array_and_others_too():
    arrays = (
        torch.tensor(CURVE, dtype=torch.float64),
        torch.tensor(CURVE, dtype=torch.float64).numpy(),
    )

    plain, *found = (
        growkern.advise(curve, **SIZES, others=[(2e5, curve[1:])]) for curve in (CURVE, *arrays)
    )

    assert all(one == plain for one in found) and len(plain.law.curves) == 2


OTHER = curve_of(law_of(0), 3e4, seed=1)


def test_a_law_of_the_same_run_is_used_without_a_new_fit(monkeypatch):
    fresh = growkern.advise(CURVE, **SIZES)
    two = growkern.advise(CURVE, **SIZES, others=[(3e4, OTHER)])
    earlier = growkern.advise(CURVE[:-6], **SIZES).law
    monkeypatch.setattr("growkern.advice.adviser.fit", lambda *_, **__: pytest.fail("a new fit"))

    assert growkern.advise(CURVE, **SIZES, law=fresh.law) == fresh
    assert growkern.advise(CURVE, **SIZES, law=two.law) == two
    assert growkern.advise(CURVE, **SIZES, law=two.law, others=[(3e4, OTHER)]) == two
    assert growkern.advise(CURVE, **SIZES, law=earlier).law is earlier


@pytest.mark.parametrize("points", [6, 30, 600])
def test_a_law_of_an_earlier_moment_of_a_noisy_run_is_used(points):
    def run(seed: int):
        return curve_of(law_of(seed), SOURCE, points=points, noise=0.05, seed=seed)

    for seed in range(5):
        law = fit([(SOURCE, run(seed)[: int(points * 0.9)])])
        assert growkern.advise(run(seed), **SIZES, law=law).law is law


STALE = {
    "size": (CURVE, {"source": 2e5}, "fitted to a model of 100,000 parameters, not of 200,000"),
    "tokens": ([(100 * d, y) for d, y in CURVE], {"budget": 2.4e14}, "to 1,000,000 tokens, and the curve has 6,309,573 to"),
    "later": (CURVE[:-6], {}, "fitted to 100,000 to 1,000,000 tokens, and the curve has 63,096 to 630,957"),
    "losses": ([(d, 1.05 * y) for d, y in CURVE], {}, "deviate by 5.0% from the curve's at equal tokens"),
    "another-run": (curve_of(law_of(4), SOURCE), {}, "deviate by"),
    "others": (CURVE, {"others": [(3e4, OTHER)]}, "fitted to 1 curves, not to 2"),
}  # fmt: skip


@pytest.mark.parametrize(
    "curve", [[(0.0, 3.0), *CURVE], CURVE[::-1], CURVE[-3:]], ids=["no-tokens", "unsorted", "short"]
)
def test_a_curve_is_checked_even_if_a_law_is_given(curve):
    with pytest.raises(PlanError, match="cannot fit a law to these loss curves"):
        growkern.advise(curve, **SIZES, law=fit([(SOURCE, CURVE)]))


@pytest.mark.parametrize(("curve", "options", "match"), STALE.values(), ids=STALE)
def test_a_law_of_another_curve_is_refused(curve, options, match):
    with pytest.raises(PlanError, match=f"leave law= out, and a law is fitted to them:\n.*{match}"):
        growkern.advise(curve, **SIZES | options, law=fit([(SOURCE, CURVE)]))


@pytest.mark.slow
def test_a_schedule_may_reuse_a_law_of_an_earlier_step():
    schedule, *_alive = observed()
    budget = 8 * schedule.counts.n_flops
    law = growkern.advise(schedule, budget=budget).law
    for i in range(61, 121):
        schedule.observe(tokens=100, loss=1.0 + 2.0 * i**-0.37)
        if i in (61, 62, 63, 66, 90, 120):
            assert growkern.advise(schedule, budget=budget, law=law).law is law


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_advice_does_not_depend_on_torchs_defaults(dtype):
    plain = growkern.advise(CURVE, **SIZES, others=[(3e4, OTHER)])
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        found = growkern.advise(CURVE, **SIZES, others=[(3e4, OTHER)])
        text = str(found)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)

    assert found == plain and text == str(plain)
    assert torch.equal(found.law.draws, plain.law.draws) and found.law.draws.device.type == "cpu"


def test_no_recipe_saves_more_than_a_free_and_perfect_growth_at_any_budget():
    for budget in (2.4e12, 2.4e13, 4e14):
        found = advise_on(
            law_of(0), budget=budget, recipe=Recipe("most", "width", 1.0, 0.0, 3, worth=(1.2, 0.1))
        )
        assert found.now.charged == found.headroom


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *(("pace", v, "mean and standard deviation") for v in ((nan, 0.0), (1.0, -0.1), (1.0,), "12", 1.0)),
        *(("kept", v, "a finite number") for v in (nan, "0.9", None, True)),
        ("sd", -0.1, "a finite number of 0 or more"),
        ("worth", (1.0, nan), "mean and standard deviation"),
        *(("n", v, "a whole number of 0 or more") for v in (-1, 1.5, "3")),
        *(("kind", v, "one of width, depth, both") for v in ("widht", None, ["width"])),
        *(("growth", v, "a mapping of arguments") for v in ("x", None)),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_field(name, value, wanted):
    right = {"name": "x", "kind": "width", "kept": 1.0, "sd": 0.1, "n": 3}

    with pytest.raises(PlanError, match=f"recipe 'x':\n  {name}=.*: pass {wanted}"):
        Recipe(**{**right, name: value})


def test_growth_by_an_unmeasured_factor_and_curves_of_one_size_are_said_to_be_unknown():
    near, far = (
        growkern.advise(CURVE, **SIZES | {"target": target}, others=[(1.01 * SOURCE, OTHER)])
        for target in (4 * SOURCE, 1.1 * SOURCE)
    )

    assert not any("x the parameters does" in sentence for sentence in near.unknown)
    assert any(s.startswith("how growth to 1.1 x the parameters does") for s in far.unknown)
    assert any(s.startswith("what a larger model gains") for s in near.unknown)


def test_equal_seeds_give_equal_advice():
    one, again, other = (growkern.advise(CURVE, **SIZES, seed=seed) for seed in (1, 1, 2))

    assert one == again != other
    assert torch.equal(one.law.draws, again.law.draws)
    assert not torch.equal(one.law.draws, other.law.draws)


def test_points_of_the_warm_up_are_left_out():
    loss = law_of(0)
    points = [(100.0 * i, 9.0 + i) for i in range(1, 9)] + curve_of(loss, SOURCE)

    law = fit([(SOURCE, points)])

    assert law.curves[0].n_left_out == len(points) - len([p for p in points if p[0] >= 1e5])
    assert "L = E + A / N^a + B / D^b" in str(law)


# The advice


def test_headroom_is_that_of_a_target_which_starts_where_the_source_stands():
    loss = law_of(3)

    found = advise_on(loss, others=[(TARGET, curve_of(loss, TARGET, seed=2))])

    spent, budget = 6 * SOURCE * 1e6, 2.4e12
    # bounds on the tokens after which the target from scratch has the source's loss
    low, high = 1.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(TARGET, middle) > loss(SOURCE, 1e6) else (low, middle)
    whole = budget - spent + 6 * TARGET * low
    assert found.spent == spent
    assert found.headroom[0] <= 1 - budget / whole <= found.headroom[2]
    assert found.headroom[1] == pytest.approx(1 - budget / whole, abs=0.05)
    assert found.now.charged == found.headroom  # the recipe is perfect
    assert found.now.sunk[1] == pytest.approx(1 - (budget - spent) / whole, abs=0.05)


def test_a_recipe_that_loses_all_that_the_source_learned_saves_less_than_nothing():
    poor = Recipe("poor", "width", 0.0, 0.0, 1)

    found = advise_on(law_of(1), recipe=poor)

    assert found.now.charged[2] < 0 and found.now.chance < 0.1


def test_a_target_that_cannot_gain_is_advised_against_and_a_source_at_its_floor_too():
    def flat(n: float, d: float) -> float:  # a larger model learns no more
        return 1.0 + 0.8 * (d / 1e6) ** -0.37

    def steep(n: float, d: float) -> float:  # the source's loss is at its floor
        return 0.3 + 1.2 * (n / SOURCE) ** -0.6 + 0.1 * (d / 1e6) ** -0.5

    never, scratch = (
        advise_on(loss, others=[(TARGET, curve_of(loss, TARGET, seed=2))], budget=3e12)
        for loss in (flat, steep)
    )

    assert never.decision == "never grow" and "Never grow" in str(never)
    assert scratch.options[1].name == "never grow" and scratch.options[1].chance < 0.01
    assert scratch.decision == "from scratch" and scratch.decision_sunk == "grow now"


@pytest.mark.parametrize("budget", [1e14, 3e14, 6e14])
def test_options_within_a_percent_of_the_compute_are_ties_and_no_decision(budget):
    loss = law_of(0)

    found = advise_on(loss, budget=budget, others=[(TARGET, curve_of(loss, TARGET, seed=2))])

    assert found.decision == "cannot tell"
    assert found.tied > 0.8 and found.now.charged[2] < 0.03
    assert sum(one.chance for one in found.options) + found.tied == pytest.approx(1)
    text = str(found)
    assert (
        f"In {found.tied:.0%} of the draws, the best options end within 1% of the compute" in text
    )
    assert (
        f"it is {budget / 6e11:.1f} x the compute of the curve, and the law is an extrapolation"
        in text
    )
    assert f"for a budget of {budget / 6e11:.3g} x the compute until now" in text


def test_a_target_far_beyond_the_curves_is_said_to_be_so():
    text = str(growkern.advise(CURVE, **SIZES | {"target": 5e6}))

    assert "it has 50.0 x the parameters of the largest model with a curve" in text
    assert "within the budget it reads 8e+04 tokens, fewer than any point of the fit" in text


def test_the_text_says_options_intervals_and_what_is_not_known(tmp_path):
    pytest.importorskip("matplotlib")

    found = advise_on(law_of(2), budget=1e13)
    found.draw(tmp_path / "advice.png")

    text = str(found)
    low, middle, high = found.now.charged
    assert f"Growing now would save {100 * middle:.0f} % +- {50 * (high - low):.0f} %" in text
    assert all(
        name in text for name in ("from scratch", "never grow", "grow now", "charged", "sunk")
    )
    assert (
        "all curves are of models of about 100,000 parameters" in text
        and "16.7 x the compute" in text
    )
    assert (tmp_path / "advice.png").stat().st_size > 10_000
    assert sum(option.chance for option in found.options if option.name != "grow now") <= 1.001


REFUSED = {
    "short": (CURVE[-3:], SIZES, "3 points after its warm-up .* Train longer"),
    "empty": ([], SIZES, "has no points"),
    "rising": ([(d, 5 - y) for d, y in CURVE], SIZES, "does not fall"),
    "nan": ([*CURVE[:-1], (CURVE[-1][0], float("nan"))], SIZES, "point 36: .*loss=nan. Leave such points out"),
    "no-tokens": ([(0.0, 3.0), *CURVE], SIZES, "point 0: tokens=0.0"),
    "unsorted": (CURVE[::-1], SIZES, "do not rise. Sort"),
    "smaller-target": (CURVE, SIZES | {"target": 5e4}, "target=50,000 .* not larger than source=100,000"),
    "spent": (CURVE, SIZES | {"budget": 5e11}, "is spent: 6e\\+11 FLOPs are spent until now"),
    "no-sizes": (CURVE, {"budget": 1e12}, "advise\\(source=None, target=None\\): pass the numbers"),
    "recipe": (CURVE, SIZES | {"recipe": "Magic"}, "no recipe 'Magic' was measured. Known: .*default, one rate .width.; .*Stack .depth.; "),
    "recipe-of-another-kind": (CURVE, SIZES | {"recipe": "default", "kind": "depth"}, "'default' of kind 'depth' was measured"),
    "own-recipe-of-another-kind": (CURVE, SIZES | {"recipe": PERFECT, "kind": "depth"}, "'perfect' grows 'width', and kind='depth': leave"),
    "flat": ([(1e4 * 1000 ** (i / 59), 2.0) for i in range(60)], SIZES, "does not fall"),
    "perplexity": ([(d, 500 * y) for d, y in CURVE], SIZES, "convert perplexities to their logarithms"),
    "dictionary": (dict(CURVE), SIZES, "curve: expected pairs of"),
    "text-curve": (["12", "34"], SIZES, "curve: expected pairs of .* '1' is not a number"),
    "cheaper-target": (CURVE, SIZES | {"flops_per_token": (2.0, 1.0)}, "the target must cost more than the source. Pass the"),
    "far-budget": (CURVE, SIZES | {"budget": 1e18}, "1e\\+18 FLOPs is 1.67e\\+06 x the compute of the curve; .* Train the source"),
    "far-target": (CURVE, SIZES | {"target": 1e30}, "target=1e\\+30 parameters is 1e\\+25 x the largest .* Pass a smaller target"),
    "target-of-no-tokens": (CURVE, SIZES | {"flops_per_token": (6e5, 6e9)}, "reads 400 tokens in the whole .* Pass a smaller target"),
    "half-spent": (CURVE, SIZES | {"spent": 2.9e11}, "spent=2.9e\\+11 FLOPs: the curve ends at 6e\\+11 FLOPs, its tokens times"),
    "own-curve-twice": (CURVE, SIZES | {"others": [(2e5, CURVE)]}, "others.0.: the points are those of the source's curve. Pass"),
    "early-spent": (CURVE, SIZES | {"spent": 1.0}, "spent=1 FLOPs: the curve ends at 6e\\+11 FLOPs. .* leave spent= out"),
}  # fmt: skip
OTHERS = "pass a list of pairs of a number of parameters and a curve"
NOT_POSITIVE = ("x", "2", True, None, [1], nan, inf, -1, 0, 1j, 10**400, torch.ones(2))
WRONG = [  # arguments of a wrong type or range, each with the way out
    *((name, value, ": a finite number above 0") for name in ("source", "target", "budget", "spent") for value in NOT_POSITIVE
      if not (value is None and name != "budget")),
    *(("flops_per_token", value, "pass FLOPs of a token") for value in ("12", 5, {1: 2, 3: 4}, {1, 2}, (1,), (1, 2, 3))),
    *(("flops_per_token", value, "pass FLOPs of a token") for value in ((0.0, 1.0), (1, True), ("1", 2))),
    *(("seed", value, "a whole number from 0 to 2\\*\\*64 - 1") for value in ("x", 1.5, None, True, -1, 2**64)),
    *(("recipe", value, "pass the name of a measured recipe") for value in (["Stack"], 5, {}, True)),
    *(("kind", value, "pass 'width', 'depth' or 'both'") for value in (["width"], 5, "", "length", True)),
    *(("others", value, OTHERS) for value in (3e4, (3e4, CURVE), None, {3e4: CURVE}, "x")),
    *(("others", [(value, CURVE)], "pass the number of parameters of the curve") for value in ("x", -1, nan, None)),
    ("others", [(3e4, [])], "has no points"), ("others", [(3e4, "x")], "expected pairs"),
    *(("law", value, "pass Advice.law of an earlier call") for value in (5, "x", True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "match"), WRONG, ids=[f"{n}-{str(v)[:12]}" for n, v, _ in WRONG]
)
def test_a_wrong_argument_is_named_with_its_value_and_the_way_out(name, value, match):
    with pytest.raises(PlanError, match=match) as caught:
        growkern.advise(CURVE, **SIZES | {name: value})

    said = str(caught.value)
    assert said.startswith(name) and len(said) < 300, said
    assert name == "others" or repr(value)[:20] in said or name == "flops_per_token"


@pytest.mark.parametrize("seed", [2**64 - 1, 2**64 - 2])
def test_the_largest_seeds_work(seed):
    assert growkern.advise(CURVE, **SIZES, seed=seed).n_params == (SOURCE, TARGET)


def test_a_recipe_by_name_says_what_grows():
    assert growkern.advise(CURVE, **SIZES, recipe="Stack").recipe is RECIPES["Stack"]


@pytest.mark.parametrize(("curve", "options", "match"), REFUSED.values(), ids=REFUSED)
def test_what_leaves_nothing_to_advise_on_is_refused(curve, options, match):
    with pytest.raises(PlanError, match=match):
        growkern.advise(curve, **options)


# In a running loop


def observed(*events, steps: int = 60):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = GrowthSchedule(events or [At(step=1000, to="2x")])
    schedule.attach(model, optim)
    for i in range(1, steps + 1):
        schedule.observe(tokens=100, loss=torch.tensor(1.0 + 2.0 * i**-0.37))
    return schedule, model, optim


def test_a_schedule_advises_on_what_it_has_observed_and_on_its_next_event():
    schedule, model, _optim = observed()
    before = copy.deepcopy(model.state_dict())

    found = growkern.advise(schedule, budget=4 * schedule.counts.n_flops)

    n = sum(p.numel() for p in model.parameters())
    grown = make("llama", tied=True)
    growkern.expand_inplace(grown, to="2x")
    assert found.n_params == (n, sum(p.numel() for p in grown.parameters()))
    assert found.spent == schedule.counts.n_flops == 6 * n * 6000
    assert found.recipe.name == "default"
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_tokens_observed_before_the_model_is_known_cost_compute_too():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = GrowthSchedule([At(step=1000, to="2x")])
    for i in range(2):
        for _ in range(50):
            schedule.observe(tokens=100, loss=2.0)
        if i == 0:
            schedule.attach(model, optim)

    assert schedule.counts.n_flops == 6 * sum(p.numel() for p in model.parameters()) * 10_000


def test_a_schedule_plans_its_target_itself():
    schedule, _model, _optim = observed()

    with pytest.raises(PlanError, match="leave source= and target= out"):
        growkern.advise(schedule, budget=1e12, target=1e6)


def test_methods_that_were_not_measured_are_said_to_be_so():
    schedule, _model, _optim = observed(
        At(step=9, to=TO["both"], width=growkern.width.HyperClone(noise_db=33))
    )

    found = growkern.advise(schedule, budget=4 * schedule.counts.n_flops)

    assert found.recipe.n == 0 and found.recipe.kind == "both"
    assert "HyperClone and IdentityBlocks does: it was not measured" in str(found)


def test_the_kind_of_an_event_cannot_be_overruled():
    schedule, _model, _optim = observed()
    budget = 4 * schedule.counts.n_flops

    assert growkern.advise(schedule, budget=budget, kind="width").recipe.kind == "width"
    with pytest.raises(
        PlanError, match="kind='depth': the schedule's next event grows 'width'; leave"
    ):
        growkern.advise(schedule, budget=budget, kind="depth")


def saved_in(setup: str, share: float, n_seeds: int = 3, budget: float = 4e11) -> Saved:
    return Saved(setup, 1e11, budget, (0.0, share, 1.0), (0.0, share, 1.0), 0.5, n_seeds)


CHOSEN = {
    "most saved where both ran": (
        {"a": [saved_in("x", 0.3)], "b": [saved_in("x", 0.2), saved_in("y", 0.9)]}, "a",
    ),
    "easy setup of one does not count": (
        {"a": [saved_in("x", 0.3), saved_in("y", -0.1)], "b": [saved_in("x", 0.2)]}, "a",
    ),
    "more measurements do not disqualify": (
        {"a": [saved_in("x", 0.3), saved_in("y", 0.1, n_seeds=1)], "b": [saved_in("x", 0.2)]}, "a",
    ),
    "few seeds do not count": ({"a": [saved_in("x", 0.3)], "b": [saved_in("x", 0.9, n_seeds=2)]}, "a"),
    "few seeds count where there is no more": ({"a": [saved_in("x", 0.3, 1)], "b": [saved_in("x", 0.9, 1)]}, "b"),
    "ties go to more setups": (
        {"b": [saved_in("x", 0.304)], "a": [saved_in("x", 0.3), saved_in("y", 0.1)]}, "a",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("measured", "chosen"), CHOSEN.values(), ids=CHOSEN)
def test_recipes_are_compared_where_both_were_measured(measured, chosen):
    recipes = {
        name: Recipe(name, "width", 1.0, 0.1, 3, saved=tuple(saved))
        for name, saved in measured.items()
    }

    assert choice.best(recipes, "width").name == chosen


def test_the_default_recipes_are_those_that_save_most():
    assert choice.best(RECIPES, "depth").name == "Stack"
    assert choice.best(RECIPES, "width").name.startswith("Sparkling fresh")
    assert choice.best(RECIPES, "both").name == "Sparkling fresh and Stack"


HERE = [
    name
    for name, one in RECIPES.items()
    if one.kind in TO and not isinstance(one.growth.get("depth"), growkern.depth.Layers)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_recipe_is_found_by_the_event_that_grows_by_it(name):
    recipe = RECIPES[name]
    schedule, _model, _optim = observed(At(step=9, to=TO[recipe.kind], **recipe.growth))

    found = growkern.advise(schedule, budget=4 * schedule.counts.n_flops).recipe

    same = {"width": None, "depth": None, "state": "exact", "dynamics": "mup"}
    assert same | dict(found.growth) == same | dict(recipe.growth)
    assert found.kind == recipe.kind


def test_a_recipe_says_how_it_grows_and_what_it_saved():
    saved = Saved("width", 1e11, 4e11, (0.1, 0.2, 0.3), (nan, 0.4, nan), 0.5, 3)
    recipe = Recipe("mine", "width", 0.9, 0.1, 2, {"state": "drop"}, 0.5, 60, (saved,))

    said = str(recipe)

    assert "state='drop', learning rate x 0.5, 60 steps of warm-up" in said
    assert "20 % [10, 30]" in said and "40 % " in said and "50%" in said
    assert growkern.expand_inplace(make("llama", tied=True), to="2x", **recipe.growth)


@pytest.mark.parametrize("name", RECIPES)
def test_a_measured_recipe_cannot_be_changed(name):
    recipe = RECIPES[name]
    before = dict(recipe.growth)

    for change in (
        lambda: recipe.growth.update(state="drop"), lambda: recipe.growth.clear(), lambda: RECIPES.pop(name),
        lambda: exec("one.growth['state'] = 'drop'", {"one": recipe}), lambda: exec("del one.growth['state']", {"one": recipe}),
        lambda: exec("all[''] = None", {"all": RECIPES}), lambda: setattr(recipe, "growth", {}),
    ):  # fmt: skip
        with pytest.raises((AttributeError, TypeError)):
            change()

    assert RECIPES[name] is recipe and recipe.growth == before
    assert {recipe: name}[recipe] == name and hash(recipe) == hash(copy.copy(recipe))
    for twin in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert twin.growth == before and {**twin.growth} == before and twin.kind == recipe.kind
        with pytest.raises(TypeError):
            twin.growth["state"] = "drop"


def test_a_recipe_does_not_follow_the_dictionary_that_it_was_made_of():
    mine = {"state": "drop"}
    recipe = Recipe("mine", "width", 0.9, 0.1, 2, mine)

    mine["state"] = "exact"

    assert recipe.growth == {"state": "drop"} and repr(recipe.growth) == "{'state': 'drop'}"


@pytest.mark.parametrize("kind", ["width", "depth", "both"])
def test_the_examples_of_a_recipe_grow_what_its_kind_says(kind):
    name = {"width": "Sparkling fresh", "depth": "Stack", "both": "Sparkling fresh and Stack"}[kind]
    to = {"width": "2x", "depth": {"layers": "2x"}, "both": {"hidden": "2x", "layers": "2x"}}[kind]
    assert f"to={json.dumps(to)}" in (Recipe.__doc__ or "")
    model = make("llama", tied=True)

    plan = growkern.plan(model, to=to, **RECIPES[name].growth)

    grown = {k for k, size in plan.source_sizes.items() if plan.target_sizes[k] > size}
    assert ("layers" in grown) == (kind != "width") and bool(grown - {"layers"}) == (
        kind != "depth"
    )


def test_the_observed_curve_survives_a_restart_and_starts_anew_after_a_growth():
    schedule, model, optim = observed(At(step=1, to="2x"), At(step=9, to="2x"))
    again = GrowthSchedule(schedule.events)

    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))

    assert again.counts.curve.read() == schedule.counts.curve.read() != []
    old = schedule.state_dict()
    del old["counts"]["curve"]  # an earlier version wrote no curve
    again.load_state_dict(old)
    assert again.counts.curve.read() == []
    loss_of(model, batch()).backward()
    optim.step()
    assert schedule.fired == [1] and schedule.counts.curve.read() == []
    schedule.observe(loss=3.0)  # an evaluation without new tokens is no point of the new curve
    assert schedule.counts.curve.read() == []
    schedule.observe(tokens=8, loss=2.0)
    assert schedule.counts.curve.read() == [(schedule.counts.n_tokens, 2.0)]


def test_a_curve_of_a_long_run_stays_small_and_holds_the_means():
    curve = LossCurve()

    for i in range(1, 20_001):
        curve.add(10.0 * i, torch.tensor(float("nan") if i == 7 else float(i)))
    curve.add(10.0, 5.0)  # a count of tokens that does not rise is ignored

    points = curve.read()
    assert len(points) < 200 and points[-1][0] == 200_000
    (before, _), (tokens, loss) = points[-3:-1]
    assert loss == pytest.approx((before / 10 + 1 + tokens / 10) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("make_schedule", "match"),
    [
        (lambda: (GrowthSchedule([At(step=1)]),), "not attached .*\n.* no tokens"),
        (lambda: observed(steps=0), "observed no tokens: call schedule.observe"),
        (lambda: observed(steps=3), "3 points after its warm-up"),
    ],
)  # fmt: skip
def test_a_schedule_that_has_seen_too_little_is_refused(make_schedule, match):
    schedule, *_alive = make_schedule()

    with pytest.raises(PlanError, match=match):
        growkern.advise(schedule, budget=1e12)


# The command


def write(path: Path, curve, column: str = "tokens", each: float = 1.0) -> Path:
    path.write_text(f"{column},loss\n" + "".join(f"{d / each},{y}\n" for d, y in curve))
    return path


@pytest.mark.slow
def test_the_command_prints_what_the_call_returns(tmp_path):
    pytest.importorskip("matplotlib")
    loss = law_of(0)
    other = curve_of(loss, 3e4, seed=1)
    files = write(tmp_path / "a.csv", CURVE), write(tmp_path / "b.csv", other)
    options = ("--params", SOURCE, "--target-params", TARGET, "--budget", 2.4e12)

    result = invoke(
        "advise",
        files[0],
        *options,
        "--other",
        f"{files[1]}:30000",
        "--picture",
        tmp_path / "a.png",
    )

    expected = growkern.advise(
        CURVE, source=SOURCE, target=TARGET, budget=2.4e12, others=[(3e4, other)]
    )
    assert result.exit_code == 0 and result.output.strip() == str(expected)
    assert (tmp_path / "a.png").exists()
    both = invoke("advise", files[0], *options, "--kind", "both")
    assert both.output.strip() == str(growkern.advise(CURVE, **SIZES, kind="both"))
    assert "Recipe: Sparkling fresh and Stack" in both.output
    named = invoke("advise", files[0], *options, "--recipe", "Stack")  # the recipe says the kind
    assert named.output.strip() == str(
        growkern.advise(CURVE, **SIZES, kind="depth", recipe="Stack")
    )
    wrong_kind = invoke("advise", files[0], *options, "--kind", "length")
    assert wrong_kind.exit_code == 1 and "'width', 'depth' or 'both'" in said(wrong_kind)
    spent = invoke("advise", files[0], *options[:-1], 1e9)
    assert (
        spent.exit_code == 1
        and "growkern advise failed" in said(spent)
        and "is spent" in said(spent)
    )
    wrong = invoke("advise", files[0], *options, "--other", files[1])
    assert wrong.exit_code == 2 and "FILE:PARAMS" in said(wrong)


def test_curves_are_read_from_tables_and_from_the_trainers_state(tmp_path):
    steps = write(tmp_path / "steps.csv", [(500.0, 3.0), (1000.0, 2.0)], "step", 100)
    state = tmp_path / "trainer_state.json"
    log = [{"step": 5, "loss": 3.0}, {"step": 5, "eval_loss": 9.0}, {"step": 10, "loss": 2.0}]
    state.write_text(json.dumps({"log_history": log}))

    for path in (steps, state):
        assert read_curve(path, 100) == [(500.0, 3.0), (1000.0, 2.0)]
        with pytest.raises(
            PlanError, match="counts steps: add a column tokens, or pass tokens_per_step"
        ):
            read_curve(path)
    for text, match in (
        ("a,b\n1,2\n", "has a, b"),
        ("tokens,loss\n1,x\n", "could not convert"),
        ("", "no rows"),
    ):
        steps.write_text(text)
        with pytest.raises(PlanError, match=match):
            read_curve(steps)
    for text in ("[" * 100_000, "[]", '{"log_history": {"loss": 1}}', '{"log_history": ["loss"]}'):
        state.write_text(text)
        with pytest.raises(PlanError, match="cannot read a loss curve from"):
            read_curve(state)
    steps.write_text("tokens,loss\n1," + "9" * 200_000)
    with pytest.raises(PlanError, match="field larger than field limit"):
        read_curve(steps)
    with pytest.raises(PlanError, match="cannot read a loss curve from"):
        read_curve(tmp_path / "none.csv")


def test_files_may_have_a_byte_order_mark_blank_losses_and_a_first_row_without_tokens(tmp_path):
    table, state = tmp_path / "a.csv", tmp_path / "trainer_state.json"
    table.write_bytes(b"\xef\xbb\xbftokens,loss\n100,3.0\n150,\n200,2.5\n")
    log = [{"num_input_tokens_seen": 0, "loss": 4.0}, {"num_input_tokens_seen": 100, "loss": 3.0}]
    state.write_text(json.dumps({"log_history": log}))

    assert read_curve(table) == [(100.0, 3.0), (200.0, 2.5)]
    assert read_curve(state) == [(100.0, 3.0)]
    with pytest.raises(PlanError, match="pass a number above 0"):
        read_curve(table, 0.0)


# The campaign's runs


@pytest.fixture(scope="module")
def rows():
    return figures.Rows()


@pytest.fixture(scope="module")
def seeds():
    return figures.single_seeds()


@pytest.fixture(scope="module")
def singles(seeds):
    return [f for one in seeds.values() for f in one.figures]


ENOUGH = 30  # figures of a kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "most"), [(False, 0.45), (True, 0.35)], ids=["own-curve", "two-curves"]
)
def test_intervals_hold_what_held_out_seeds_of_the_campaign_measured_in_eight_of_ten_runs(
    rows, seeds, other, most
):
    judged = judging.judge_seeds(seeds, rows.figures, other=other)

    kinds = {k: js for k, js in judging.by_kind(judged).items() if len(js) >= ENOUGH}
    assert kinds.keys() >= {"width", "depth"}, "savings-*.csv has too few grown runs"
    for kind, own in kinds.items():
        held = [j.holds for j in own]
        assert sum(held) >= 0.8 * len(held), (kind, judging.summary(judged))
        assert f"{kind} {sum(held)} of {len(held)}" in judging.summary(judged)
    assert mean(j.width for j in judged) < most, judging.summary(judged)


@pytest.mark.slow
def test_the_needs_of_a_run_lie_on_a_line_in_the_budget(singles):
    found = {(f.setup, f.variant.recipe, *f.saving.losses, f.budget): f for f in singles}
    own = [
        f
        for (setup, name, seed, _), f in found.items()
        if (setup, name, seed) == ("depth", "Stack", 3)
    ]

    (run,) = calibration.runs_of(own)

    assert len(own) == 3 and (run.setup, run.seed, run.label, run.kind) == (
        "depth",
        3,
        "Stack",
        "depth",
    )
    for f in own:
        line = run.pace * (f.budget - f.variant.grow_at) + run.kept * f.annealed
        assert line == pytest.approx(f.need, rel=0.03)
    assert run.pace > 1.3  # the target trains slowly from scratch


@pytest.mark.slow
def test_the_spread_of_a_recipe_is_that_of_single_runs(singles):
    def run(seed: int, pace: float, label: str = "a"):
        return calibration.Run("x", seed, label, "width", 0.9, pace, 1.0)

    own, calm = [run(1, 0.7), run(2, 1.0), run(3, 1.3)], [run(s, 1.0, "b") for s in (1, 2, 3)]

    assert calibration._spread(own + calm, own, "pace", 1.0) == round((0.3**2 * 4 / 3) ** 0.5, 3)
    peers = round((0.3**2 / 2 * 4 / 3) ** 0.5, 3)  # the mean variance of both recipes
    assert calibration._spread(own + calm, calm, "pace", 1.0) == peers
    assert calibration._spread(own, own[:1], "kept", 1.5) == round(1.5 * 0.1 * 2**0.5, 3)
    by_seed = {
        r.seed: r.pace
        for r in calibration.runs_of(singles)
        if (r.setup, r.label) == ("depth", "Stack")
    }
    assert by_seed.keys() == {1, 2, 3} and RECIPES["Stack"].pace[1] > stdev(by_seed.values())


def test_a_pace_above_one_saves_at_every_measured_budget_and_less_beyond():
    fast = Recipe("fast", "depth", 1.0, 0.0, 3, pace=(1.3, 0.0))
    loss = law_of(0)
    others = [(TARGET, curve_of(loss, TARGET, seed=2))]

    near, far, perfect = (
        advise_on(loss, budget=budget, recipe=recipe, others=others)
        for budget, recipe in ((6e12, fast), (4e14, fast), (6e12, PERFECT))
    )

    # 1 - B / (1.3 (B - g) + worth): a perfect growth saves 1 - B / (B - g + worth)
    whole = 6e12 / (1 - perfect.now.charged[1])
    assert near.now.charged[1] == pytest.approx(1 - 6e12 / (whole + 0.3 * 5.4e12), abs=1e-3)
    assert near.headroom == perfect.headroom
    assert far.now.charged[1] < 0.02


@pytest.mark.slow
def test_the_calibration_is_that_of_the_committed_rows(rows, singles):
    text = calibration.module(calibration.calibrate(rows.figures, singles), rows.figures)

    assert calibration.CALIBRATION.read_text() == text, "run: python -m bench.advice --write"


@pytest.mark.slow
def test_no_seed_is_judged_by_a_calibration_that_holds_it(rows, seeds, monkeypatch):
    known, judged = [], []

    def calibrate(of, singles):
        known.append({seed for f in singles for seed in f.saving.losses} - {judging.TUNING})
        return dict.fromkeys(map(calibration.label_of, of), PERFECT)

    def judge(rows, figure, recipe, *, other):
        judged.append((known[-1], set(figure.saving.losses)))

    monkeypatch.setattr(judging, "calibrate", calibrate)
    monkeypatch.setattr(judging, "judge", judge)

    judging.judge_seeds(seeds, rows.figures, other=False)

    assert len(known) == len(seeds) and len(judged) >= 10
    assert all(len(kept) == len(seeds) - 1 and not kept & own for kept, own in judged)


def test_no_figure_is_judged_by_a_calibration_that_holds_it(rows, singles, monkeypatch):
    seen = []

    def calibrate(figures, singles):
        seen.append({f.variant.recipe for f in (*figures, *singles)})
        return {"x": PERFECT}

    monkeypatch.setattr(judging, "calibrate", calibrate)
    monkeypatch.setattr(judging, "judge", lambda *_, **__: None)

    judging.judge_all(rows, singles, other=False, across=False)

    assert len(seen) == len(rows.figures) and all(
        known and figure.variant.recipe not in known
        for figure, known in zip(rows.figures, seen, strict=True)
    )


def test_rows_of_several_devices_are_refused(tmp_path):
    for device in ("a", "b"):
        (tmp_path / f"savings-{device}.csv").write_text("text,loss\n")

    with pytest.raises(SystemExit, match=r"rows of several devices: savings-a.csv, savings-b.csv"):
        figures.Rows(tmp_path)
