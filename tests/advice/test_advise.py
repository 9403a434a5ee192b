"""``growkern.advise`` recovers known scaling laws, agrees with closed-form savings, and predicts the savings campaign's runs."""

import copy
import json
import random
from math import nan
from pathlib import Path
from statistics import mean

import pytest
import torch
from benches import importable
from models import batch, loss_of, make
from saved import invoke, said

import growkern
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
TO = {"width": "2x", "depth": {"layers": "4x"}}


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
        growkern.advise(curve, **SIZES, others=[(2e5, curve)]) for curve in (CURVE, *arrays)
    )

    assert all(one == plain for one in found) and len(plain.law.curves) == 2


def test_a_law_of_another_model_is_refused():
    law = growkern.advise(CURVE, **SIZES).law

    assert growkern.advise(CURVE, **SIZES, law=law) == growkern.advise(CURVE, **SIZES)
    with pytest.raises(PlanError, match="fitted to a model of 100,000 parameters, not of 200,000"):
        growkern.advise(CURVE, **SIZES | {"source": 2e5}, law=law)


def test_no_recipe_saves_more_than_a_free_and_perfect_growth_at_any_budget():
    for budget in (2.4e12, 2.4e13, 2.4e15):
        found = advise_on(
            law_of(0), budget=budget, recipe=Recipe("most", "width", 1.0, 0.0, 3, worth=(1.2, 0.1))
        )
        assert found.now.charged == found.headroom


@pytest.mark.parametrize("wrong", [{"kept": nan}, {"sd": -0.1}, {"worth": (1.0, nan)}])
def test_a_recipe_of_impossible_numbers_is_refused(wrong):
    with pytest.raises(PlanError, match="pass finite numbers"):
        Recipe(**{"name": "x", "kind": "width", "kept": 1.0, "sd": 0.1, "n": 3, **wrong})


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
        advise_on(loss, others=[(TARGET, curve_of(loss, TARGET, seed=2))], budget=2.4e13)
        for loss in (flat, steep)
    )

    assert never.decision == "never grow" and "Never grow" in str(never)
    assert scratch.options[1].name == "never grow" and scratch.options[1].chance < 0.01
    assert scratch.decision == "from scratch" and scratch.decision_sunk == "grow now"


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
    assert "all curves have 100,000 parameters" in text and "16.7 x the compute" in text
    assert (tmp_path / "advice.png").stat().st_size > 10_000
    assert sum(option.chance for option in found.options if option.name != "grow now") <= 1.001


SIZES = {"source": SOURCE, "target": TARGET, "budget": 2.4e12}
REFUSED = {
    "short": (CURVE[-3:], SIZES, "3 points after its warm-up .* Train longer"),
    "empty": ([], SIZES, "has no points"),
    "rising": ([(d, 5 - y) for d, y in CURVE], SIZES, "does not fall"),
    "nan": ([*CURVE[:-1], (CURVE[-1][0], float("nan"))], SIZES, "point 36: .*loss=nan. Leave such points out"),
    "no-tokens": ([(0.0, 3.0), *CURVE], SIZES, "point 0: tokens=0.0"),
    "unsorted": (CURVE[::-1], SIZES, "do not rise. Sort"),
    "smaller-target": (CURVE, SIZES | {"target": 5e4}, "target=50,000 .* not larger than source=100,000"),
    "spent": (CURVE, SIZES | {"budget": 5e11}, "is spent: the curve ends at 6e\\+11 FLOPs"),
    "spent-nothing": (CURVE, SIZES | {"spent": 0.0}, "spent=0.0: pass the FLOPs"),
    "flops": (CURVE, SIZES | {"flops_per_token": (0.0, 1.0)}, "flops_per_token=\\(0.0, 1.0\\): pass"),
    "no-sizes": (CURVE, {"budget": 1e12}, "advise\\(source=None, target=None\\): pass the numbers"),
    "recipe": (CURVE, SIZES | {"recipe": "Magic"}, "no recipe 'Magic' of kind 'width' was measured. Known: .*default, one rate; "),
    "recipe-of-another-kind": (CURVE, SIZES | {"recipe": "default", "kind": "depth"}, "'default' of kind 'depth' was measured"),
    "flat": ([(1e4 * 1000 ** (i / 59), 2.0) for i in range(60)], SIZES, "does not fall"),
    "perplexity": ([(d, 500 * y) for d, y in CURVE], SIZES, "convert perplexities to their logarithms"),
    "dictionary": (dict(CURVE), SIZES, "curve: expected pairs of"),
    "text-budget": (CURVE, SIZES | {"budget": "much"}, "budget: expected a number: could not convert"),
    "one-flops": (CURVE, SIZES | {"flops_per_token": 6.0}, "flops_per_token: "),
    "cheaper-target": (CURVE, SIZES | {"flops_per_token": (2.0, 1.0)}, "the target must cost more than the source"),
    "kind": (CURVE, SIZES | {"kind": "length"}, "kind='length'"),
    "other": (CURVE, SIZES | {"others": [(-1, CURVE)]}, "n_params=-1"),
}  # fmt: skip


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


def test_a_kind_that_was_not_measured_is_said_to_be_so():
    schedule, _model, _optim = observed(
        At(step=9, to={"hidden": 48, "layers": 3}, width=growkern.width.HyperClone(noise_db=33))
    )

    found = growkern.advise(schedule, budget=4 * schedule.counts.n_flops)

    assert found.recipe.n == 0 and "HyperClone does: it was not measured" in str(found)
    assert "width and depth, grown at once" in str(found)


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


def test_a_recipe_says_how_it_grows_and_what_it_saved():
    saved = Saved("width", 1e11, 4e11, (0.1, 0.2, 0.3), (nan, 0.4, nan), 0.5, 3)
    recipe = Recipe("mine", "width", 0.9, 0.1, 2, {"state": "drop"}, 0.5, 60, (saved,))

    said = str(recipe)

    assert "state='drop', learning rate x 0.5, 60 steps of warm-up" in said
    assert "20 % [10, 30]" in said and "40 % " in said and "50%" in said
    assert growkern.expand_inplace(make("llama", tied=True), to="2x", **recipe.growth)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "most"), [(False, 0.4), (True, 0.3)], ids=["own-curve", "two-curves"]
)
def test_intervals_hold_what_held_out_seeds_of_the_campaign_measured_in_eight_of_ten_runs(
    other, most
):
    judged = judging.judge_seeds(other=other)

    held = [j.holds for j in judged]
    assert len(held) >= 10, "the rows of bench/results/savings-*.csv have too few grown runs"
    assert sum(held) >= 0.8 * len(held), judging.summary(judged)
    assert mean(j.width for j in judged) < most, judging.summary(judged)


def test_the_calibration_is_that_of_the_committed_rows(rows):
    text = calibration.module(calibration.calibrate(rows.figures), rows.figures)

    assert calibration.CALIBRATION.read_text() == text, "run: python -m bench.advice --write"


@pytest.mark.slow
def test_no_seed_is_judged_by_a_calibration_that_holds_it(monkeypatch):
    asked, judged = [], []

    class Watched(figures.Rows):
        def __init__(self, folder=judging.RESULTS, keep=lambda seed: True):
            super().__init__(folder, keep)
            asked.append({seed for seed in range(4) if keep(seed)})

    def judge(rows, figure, recipe, *, other):
        judged.append((asked[-2], set(figure.saving.losses)))

    monkeypatch.setattr(judging, "Rows", Watched)
    monkeypatch.setattr(judging, "judge", judge)

    judging.judge_seeds(other=False)

    assert len(judged) >= 10 and all(not known & own for known, own in judged)


@pytest.mark.slow
def test_no_figure_is_judged_by_a_calibration_that_holds_it(rows, monkeypatch):
    seen = []
    monkeypatch.setattr(judging, "pooled", lambda recipes, *_: seen.append(set(recipes)) or PERFECT)
    monkeypatch.setattr(judging, "judge", lambda *_, **__: None)

    judging.judge_all(rows, other=False, across=False)

    assert len(seen) == len(rows.figures) and all(
        figure.variant.recipe not in known for figure, known in zip(rows.figures, seen, strict=True)
    )
