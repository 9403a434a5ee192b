"""The savings campaign runs end to end at tiny sizes, continues after a kill, and computes the savings of hand-made rows."""

import csv
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from math import exp, isfinite, log
from pathlib import Path

import pytest
import torch
from benches import ROOT, importable, rows_of
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

with importable():
    from bench.harness import RESULTS
    from bench.savings import __main__ as savings
    from bench.savings import analysis, campaign, jobs, layer_norm, report, symmetry
    from growkern.cli.demo_run import (
        Corpus,
        Run,
        Training,
        build,
        flops_needed,
        flops_per_step,
        loss_at,
        read_corpus,
    )

SMOKE = campaign.SETUPS["smoke"]
STEP = jobs.unit(SMOKE)
pytestmark = pytest.mark.xdist_group("savings")  # one xdist worker trains, once


def run_campaign(*arguments: str) -> int:
    """Run a campaign with the repository root on ``sys.path``, from which its processes import bench/."""
    with importable():
        return savings.main([*arguments])


@pytest.fixture(scope="module")
def text() -> Corpus:
    """The corpus of all runs that are no jobs: to find its files takes a second."""
    return read_corpus(300_000)


@pytest.fixture(scope="module")
def one_pool() -> Iterator[None]:
    """Let every campaign use the processes that the first one starts: to import takes a process seconds."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        started = cache(lambda *options: stack.enter_context(ProcessPoolExecutor(*options)))
        patch.setattr(savings, "ProcessPoolExecutor", lambda *options: nullcontext(started(*options)))  # fmt: skip
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, one_pool: None) -> Path:
    folder = tmp_path_factory.mktemp("savings")
    arguments = ["--setup", "smoke", "--seeds", "1", "--workers", "1"]

    assert run_campaign(*arguments, "--out", str(folder), "--work", str(folder / "work")) == 0

    return folder


def row(sizes: tuple[int, int], lr: float, seed: int, budget: float, loss: float, **grown: object):
    empty = dict.fromkeys(jobs.COLUMNS, "")
    values = {
        "text": "python", "optimizer": "adamw", "protocol": jobs.protocol(SMOKE), "hidden": sizes[0], "layers": sizes[1],
        "lr": lr, "rate": 1, "seed": seed,
        "budget": budget * STEP, "loss": loss,
    }  # fmt: skip
    return {k: str(v) for k, v in (empty | values | grown).items()}


def hand_made(grown_loss: float, never: float = 3.0) -> list[dict[str, str]]:
    """Make rows of three seeds: the target from scratch ends at 3.0 after 8 steps and at 2.0 after 16, at the better of two learning rates;
    the source grows after 2 steps, and the grown run ends after 16."""
    source, target = SMOKE.source_sizes, SMOKE.target_sizes
    found = []
    for seed in (0, 1, 2):
        found += [row(target, 4e-3, seed, 8, 3.0), row(target, 4e-3, seed, 16, 2.0)]
        found += [row(target, 8e-3, seed, 8, 3.5), row(target, 8e-3, seed, 16, 2.5)]
        found += [row(source, 8e-3, seed, 8, never), row(source, 8e-3, seed, 16, never - 0.5)]
        grown = {"recipe": "default", "source_hidden": 32, "source_layers": 1, "grow_at": 2 * STEP}
        found.append(row(target, 8e-3, seed, 16, grown_loss, **grown))
    return found


@pytest.mark.parametrize(
    ("curve", "loss", "flops", "beyond"),
    [
        ([(8, 3.0), (16, 2.0)], 2.5, 8 * 2**0.5, False),
        ([(8, 3.0), (16, 2.0)], 1.5, 16 * 2**0.5, True),
        (
            [(8, 1.61), (16, 1.6099)],
            1.2,
            160,
            True,
        ),  # nearly flat: by a factor of 10, not of e^4000
        ([(8, 2.0), (16, 3.0)], 1.9, 8, True),  # a rising curve: 8 FLOPs at least
        ([(8, 3.0), (16, 3.5), (32, 2.0)], 2.5, 16, False),
    ],
    ids=["between", "beyond", "flat", "rising", "bump"],
)
def test_flops_that_a_curve_needs_for_a_loss(curve, loss, flops, beyond):
    assert flops_needed(curve, loss) == (pytest.approx(flops), beyond)


def test_savings_are_those_of_hand_made_numbers_under_both_accountings():
    found = analysis.Campaign(SMOKE, hand_made(1.5))

    (saving,) = found.savings(1)

    # from scratch, the loss falls by a nat per doubling: a loss of 1.5 takes 8 x 2^1.5 steps
    need = exp(log(8) + 1.5 * log(2))
    assert saving.charged == pytest.approx((1 - 16 / need,) * 3)
    assert saving.sunk == pytest.approx((1 - 14 / need,) * 3)
    assert saving.beyond  # no run from scratch reaches 1.5
    assert saving.difference == pytest.approx((0, 0))


def test_grown_run_that_ends_lower_is_compared_with_longer_runs_from_scratch():
    setup = replace(SMOKE, beyond=(32,))
    longer = [row(SMOKE.target_sizes, 4e-3, seed, 32, 1.0) for seed in (0, 1, 2)]

    (prolonged,) = analysis.Campaign(setup, hand_made(1.5)).savings(1)
    (saving,) = analysis.Campaign(setup, [*hand_made(1.5), *longer]).savings(1)

    assert prolonged.beyond and not saving.beyond
    assert saving.charged == pytest.approx((1 - 16 / (16 * 2**0.5),) * 3)
    scratch = jobs.Job(setup, setup.target_sizes, 4e-3, 0)
    assert [round(end / STEP) for end in scratch.budgets] == [8, 16, 32]
    assert len(replace(scratch, recipe="default", grow_at=2 * STEP).budgets) == 2
    assert len(replace(scratch, sizes=setup.source_sizes).budgets) == 2


def test_headroom_is_that_of_a_target_which_starts_where_the_source_stands():
    found = analysis.Campaign(SMOKE, hand_made(1.9, never=2.5))

    source = 2.5 + 0.5 * 2  # at 2 steps: the loss falls by half a nat per doubling
    worth = 8 * 2 ** (3.0 - source)  # steps from scratch to the source's loss
    assert found.headroom(1, 2 * STEP) == pytest.approx(1 - 16 / (16 - 2 + worth))


def test_headroom_takes_the_loss_at_the_growth_from_a_branch_that_ended_there():
    setup = replace(SMOKE, early=(2,))
    rows = [
        *hand_made(1.9, never=2.5),
        *(row(SMOKE.source_sizes, 8e-3, s, 2, 4.0) for s in (0, 1, 2)),
    ]

    found = analysis.Campaign(setup, rows)

    worth = 8 * 2 ** (3.0 - 4.0)
    assert found.headroom(1, 2 * STEP) == pytest.approx(1 - 16 / (16 - 2 + worth))


def test_tuning_takes_the_better_rate_of_seed_0_and_leaves_that_seed_out():
    rows = hand_made(1.9)
    rows += [
        row(SMOKE.target_sizes, 8e-3, 3, 16, 0.1)
    ]  # seed 3 is low at a learning rate that seed 0 does not choose
    found = analysis.Campaign(SMOKE, rows)

    assert found.best_lr(SMOKE.target_sizes, 1) == 4e-3
    assert found.seeds == [1, 2]
    assert dict(found.tuned(SMOKE.target_sizes, 1)) == {1: 2.0, 2: 2.0}


@pytest.mark.parametrize(
    ("grown_loss", "never", "said"),
    [
        (1.9, 3.0, "Growing saves 7% of the compute (90 % interval +7% to +7%)"),
        (2.1, 3.0, "Growing does not save: -7%"),
        (1.9, 2.0, "The source that never grows ends lower (1.500, grown 1.900, from scratch 2.000)"),
    ],
)  # fmt: skip
def test_verdict_says_what_the_numbers_say(grown_loss, never, said):
    found = analysis.Campaign(SMOKE, hand_made(grown_loss, never))

    text = report.verdict(found, 1)

    assert said in text
    assert ("never grows ends lower" in text) == (never == 2.0)


def test_a_saving_whose_interval_holds_zero_is_not_called_a_saving():
    rows = hand_made(1.9)
    rows[-1]["loss"] = "2.15"  # the grown run of seed 2 ends above the run from scratch
    found = analysis.Campaign(SMOKE, [*rows, row(SMOKE.target_sizes, 4e-3, 3, 16, 2.0)])

    assert "Growing does not save" in report.verdict(found, 1)


def test_runs_from_scratch_take_the_rate_that_is_best_on_the_compared_seeds():
    rows = hand_made(1.9)
    for r in rows:
        if r["lr"] == "0.008" and r["hidden"] == "64" and not r["recipe"] and r["seed"] != "0":
            r["loss"] = str(float(r["loss"]) - 0.75)  # seed 0 chooses 0.004
    found = analysis.Campaign(SMOKE, rows)

    assert found.best_lr(SMOKE.target_sizes, 1) == 4e-3
    assert found.rate(SMOKE.target_sizes, 1, [1, 2]) == 8e-3
    assert dict(found.on(SMOKE.target_sizes, 1, [1, 2])) == {1: 1.75, 2: 1.75}
    assert found.savings(1)[0].charged[0] == pytest.approx(1 - 16 / (8 * 2**0.85))  # 2.75 to 1.75


def test_a_saving_has_the_seeds_that_both_runs_have():
    rows = [r for r in hand_made(1.9) if r["recipe"] or r["seed"] != "2"]
    rows[-1]["loss"] = "0.5"  # grown, on seed 2, which has no run from scratch

    (saving,) = analysis.Campaign(SMOKE, rows).savings(1)

    assert dict(saving.losses) == {1: 1.9}


def test_rows_of_another_experiment_are_other_rows(tmp_path):
    ledger = jobs.Ledger(tmp_path)
    rows = [row(SMOKE.target_sizes, 4e-3, 0, budget, 3.125) for budget in (8, 16)]
    ledger.append(jobs.Done([one | {"budget": float(one["budget"])} for one in rows]))
    same = replace(SMOKE, grow_at=(1,), lrs=(4e-3,))
    others = [
        replace(SMOKE, n_bytes=2_000_000),
        replace(SMOKE, training={**SMOKE.training, "warmup": 1}),
        replace(SMOKE, training={**SMOKE.training, "n_eval": 64}),
    ]

    def finished(setup):
        return ledger.finished(jobs.Job(setup, setup.target_sizes, 4e-3, 0))

    assert finished(SMOKE) and finished(same) and not any(map(finished, others))
    assert not analysis.Campaign(others[0], ledger.rows()).plain


def test_rows_of_an_older_version_are_refused(tmp_path):
    ledger = jobs.Ledger(tmp_path)
    ledger.rows_path.write_text("text,optimizer,loss\npython,adamw,3.0\n")

    with pytest.raises(SystemExit, match=r"savings-.*\.csv: the rows have no column 'protocol'"):
        ledger.rows()


def test_variants_of_fewer_seeds_do_not_lead_and_every_line_compares_equal_seeds():
    rows = hand_made(1.9)
    lucky = {"recipe": "noise 1", "source_hidden": 32, "source_layers": 1, "grow_at": 2 * STEP}
    rows += [row(SMOKE.target_sizes, 8e-3, seed, 16, 1.0, **lucky) for seed in (0, 1)]
    rows[rows.index(next(r for r in rows if r["seed"] == "2" and not r["recipe"]))]["loss"] = "3.25"
    found = analysis.Campaign(SMOKE, rows)

    assert found.best(1).variant.recipe == "default"
    assert [s.variant.recipe for s in found.savings(1)] == ["default", "noise 1"]
    assert dict(found.on(SMOKE.target_sizes, 0, [1])) == {1: 3.0}
    assert dict(found.on(SMOKE.target_sizes, 0, [1, 2])) == {1: 3.0, 2: 3.25}


def test_best_rate_at_the_edge_of_the_grid_is_marked():
    rows = hand_made(1.9)
    edge = analysis.Campaign(SMOKE, rows)
    inner = [row(SMOKE.target_sizes, 2e-3, 0, budget, 4.0) for budget in (8, 16)]
    tuned = analysis.Campaign(SMOKE, [*rows, *inner])

    assert edge.at_edge(SMOKE.target_sizes, 1, [1, 2])
    assert not tuned.at_edge(SMOKE.target_sizes, 1, [1, 2])
    assert "at the edge" in report.verdict(edge, 1)
    assert "at the edge" not in report.verdict(tuned, 1)


def test_what_only_the_tuning_seed_ran_is_held_against_that_seed_and_comes_last():
    rows = hand_made(1.9)
    rows = [r for r in rows if not (r["recipe"] and r["seed"] != "0")]  # only seed 0 grows
    for r in rows:
        if r["seed"] != "0" and not r["recipe"]:
            r["loss"] = str(float(r["loss"]) + 0.5)  # the other seeds end higher
    found = analysis.Campaign(SMOKE, rows)

    (saving,) = found.savings(1)

    assert saving.chose
    assert saving.charged[0] == pytest.approx(1 - 16 / (16 * 2**0.1))
    assert "(the seed that chose)" in report.verdict(found, 1)


@pytest.mark.slow
def test_campaign_runs_end_to_end(smoke):
    rows, curves = rows_of(smoke), rows_of(smoke, curves=True)

    grown = [r for r in rows if r["recipe"]]
    plain = [r for r in rows if not r["recipe"]]
    assert {r["recipe"] for r in grown} == {"default", "default, one rate"}
    assert {r["seed"] for r in grown} == {r["seed"] for r in plain} == {"0", "1"}
    assert all(float(r["loss"]) < log(256) for r in rows)
    budgets = {round(float(r["budget"]) / STEP) for r in rows}
    assert budgets == {8, 16}
    assert len({(r["hidden"], r["lr"], r["seed"], r["flops"]) for r in curves}) == len(curves) > 20
    (picture,) = smoke.glob("*.png")
    assert picture.stat().st_size > 20_000


@pytest.mark.slow
def test_growth_of_the_campaign_keeps_the_loss_and_charges_the_source(smoke):
    grown = [r for r in rows_of(smoke) if r["recipe"] == "default"]

    assert grown
    for r in grown:
        assert float(r["loss_after"]) == pytest.approx(float(r["loss_before"]), abs=1e-3)
        assert log(256) > float(r["loss_landed"]) != float(r["loss_after"])
        assert float(r["grow_at"]) == pytest.approx(2 * STEP, rel=1e-3)
        assert float(r["flops"]) <= 0.75 * float(r["budget"]) + STEP  # of trunk and source


def test_damaged_snapshot_is_named(tmp_path):
    grown = jobs.Job(SMOKE, SMOKE.target_sizes, 8e-3, 0, "default", 1.0, 2 * STEP)
    grown.snapshot(tmp_path, grown.grow_at).write_bytes(b"")

    with pytest.raises(SystemExit, match=r"\.pt: the snapshot cannot be read .* Delete the file"):
        jobs.run(grown, tmp_path, "cpu")


@pytest.mark.slow
def test_killed_campaign_goes_on_and_finds_the_same(smoke, tmp_path):
    (path,) = [p for p in smoke.glob("*.csv") if not p.stem.endswith("-curves")]
    lines = path.read_text().splitlines(keepends=True)
    kept = lines[:-2]  # a kill during the last run loses its two rows
    (tmp_path / path.name).write_text("".join(kept))
    arguments = ["--setup", "smoke", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]

    run_campaign(*arguments, "--work", str(smoke / "work"))

    found = (tmp_path / path.name).read_text().splitlines(keepends=True)
    timed = {"seconds", "date", "commit"}

    def bare(rows: list[str]) -> list[tuple[str, ...]]:
        return sorted(
            tuple(v for k, v in r.items() if k not in timed) for r in csv.DictReader(rows)
        )

    assert bare(found) == bare(lines)


def test_report_of_nothing_says_what_to_do(tmp_path, capsys):
    assert savings.main(["--setup", "depth", "--report", "--out", str(tmp_path)]) == 1

    assert "has no whole setup 'depth' yet: run it without --report" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--workers", "0"], ["--out", __file__]])
def test_options_that_cannot_be_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        savings.main(["--setup", "smoke", *options])

    assert "--workers is 1 or more" in capsys.readouterr().err


def test_line_that_a_kill_cut_short_runs_again_and_gives_way(tmp_path):
    ledger, job = jobs.Ledger(tmp_path), jobs.Job(SMOKE, SMOKE.target_sizes, 4e-3, 0)
    rows = [row(SMOKE.target_sizes, 4e-3, 0, budget, 3.125) for budget in (8, 16)]
    for one in rows:
        one["budget"] = float(one["budget"])
    ledger.append(jobs.Done(rows))
    whole = ledger.rows_path.read_text()
    ledger.rows_path.write_text(whole[: whole.rindex("3.125") + 1])

    assert not ledger.finished(job) and len(ledger.rows()) == 1
    ledger.append(jobs.Done(rows))

    assert ledger.finished(job) and ledger.rows_path.read_text() == whole


@pytest.mark.parametrize("broken", ["nan", "", "3.5"])
def test_rows_that_are_no_measurement_are_refused_by_file_and_line(tmp_path, broken):
    ledger = jobs.Ledger(tmp_path)
    one = row(SMOKE.target_sizes, 4e-3, 0, 8, 3.125)
    one["budget"] = float(one["budget"])
    ledger.append(jobs.Done([one]))
    lines = ledger.rows_path.read_text().splitlines(keepends=True)
    ledger.rows_path.write_text("".join([*lines, lines[-1].replace("3.125", broken)]))

    with pytest.raises(SystemExit, match=r"savings-.*\.csv, line 3"):
        ledger.rows()


@pytest.mark.slow
def test_the_guides_hold_the_tables_of_the_committed_rows():
    (path,) = [p for p in RESULTS.glob("savings-*.csv") if not p.stem.endswith("-curves")]
    guides = ROOT / "growkern" / "guides"
    text = "".join((guides / name).read_text("utf-8") for name in ("savings.md", "methods.md"))
    readme = (ROOT / "README.md").read_text("utf-8")

    found = [*report.readme(jobs.read_rows(path))]

    assert len(found) >= 2
    for table in found:
        assert table in text, (
            f"run: python -m bench.savings --markdown, and put into the guides:\n{table}"
        )
    short = re.findall(r"^\| (?:width|depth|wider|both)\b.*$", readme, re.MULTILINE)
    assert len(short) >= 4 and all(line in found[0] for line in short)


def test_unknown_recipe_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        savings.main(["--setup", "smoke", "--recipes", "nothing"])

    assert "unknown recipes: nothing; known: default; " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipes"),
    [
        ("width", campaign.WIDTHS),
        ("depth", campaign.SETUPS["depth"].recipes),
        ("depth, twice", ("Middle",)),
        ("both", campaign.SETUPS["both"].recipes),
    ],
)
def test_every_recipe_grows_its_source_into_the_target(name, recipes, text):
    setup = campaign.SETUPS[name]
    training = Training(**{**setup.training, "n_eval": 2, "n_trunk": 2})
    cost = flops_per_step(build(setup.target, 0), training)
    for recipe in map(campaign.RECIPES.__getitem__, recipes):
        run = Run(setup.source, 1e-3, 0, text, training)
        run.step()
        for sizes in [*(sizes for sizes, _ in recipe.via), setup.target]:
            run.grow(to=dict(sizes), seed=0, rewarm=recipe.rewarm, **recipe.growth)

        assert run.cost == cost
        assert isfinite(run.step())


@pytest.mark.parametrize("sizes", [{"hidden": 32, "layers": 2}, {"hidden": 64, "layers": 4}])
def test_flops_are_those_that_torch_counts(sizes):
    model, training = build(sizes, 0), Training()
    model.set_attn_implementation("eager")
    text = torch.randint(0, 256, (1000,), dtype=torch.uint8)

    with FlopCounterMode(display=False) as counter:
        loss_at(model, text, torch.zeros(training.batch, dtype=torch.long), training).backward()

    assert flops_per_step(model, training) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_run_that_grows_in_two_steps_serves_only_budgets_behind_the_last(tmp_path):
    sizes, small = {"hidden": 32, "layers": 2}, {"n_eval": 2, "n_trunk": 2, "warmup": 2}
    setup = campaign.Setup(
        sizes, {"hidden": 32, "layers": 8}, (8, 16), (4,), (4e-3,), (4e-3,), (), n_bytes=1_000_000, training=small,
    )  # fmt: skip
    # the run has 4 layers until 8 steps, when the trunk of the first budget has ended
    at = 4 * jobs.unit(setup)
    source = jobs.Job(setup, setup.source_sizes, 4e-3, 0, saves=(at,))
    grown = jobs.Job(setup, setup.target_sizes, 4e-3, 0, "Stack by twos", 1.0, at)
    jobs.run(source, tmp_path, "cpu")

    rows = jobs.run(grown, tmp_path, "cpu").rows

    target = sum(p.numel() for p in build(setup.target, 0).parameters())
    assert [(r["budget"], r["n_params"]) for r in rows] == [(16 * jobs.unit(setup), target)]


def test_a_job_is_finished_when_all_of_its_budgets_have_rows_and_no_row_is_written_twice(tmp_path):
    ledger, job = jobs.Ledger(tmp_path), jobs.Job(SMOKE, SMOKE.target_sizes, 4e-3, 0)
    first, second = (row(SMOKE.target_sizes, 4e-3, 0, budget, 3.0) for budget in (8, 16))
    for one in (first, second):
        one["budget"] = float(one["budget"])  # a job writes budgets as floats

    ledger.append(jobs.Done([first]))
    assert not ledger.finished(job)
    ledger.append(jobs.Done([first, second]))

    assert ledger.finished(job)
    assert len(ledger.rows()) == 2


@pytest.mark.slow
def test_annealed_branch_of_a_grown_run_leaves_the_trunk_where_it_was(text):
    training = Training(n_eval=2, n_trunk=2, warmup=2)
    alone, branched = (Run({"hidden": 32, "layers": 1}, 1e-3, 0, text, training) for _ in range(2))
    for run in (alone, branched):
        run.train_until(3 * run.cost)
        run.grow(to={"hidden": 64, "layers": 2}, seed=0, rate=0.5, rewarm=4)

    branched.annealed(12 * branched.cost)

    assert alone.train_until(12 * alone.cost) == branched.train_until(12 * branched.cost)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_annealed_branch_leaves_the_trunk_where_it_was(optimizer, text):
    sizes, training = {"hidden": 32, "layers": 1}, Training(n_eval=2, n_trunk=2, warmup=2)
    alone, branched = (Run(sizes, 1e-3, 0, text, training, optimizer=optimizer) for _ in range(2))
    for run in (alone, branched):
        run.train_until(3 * run.cost)

    branched.annealed(8 * branched.cost)

    assert alone.train_until(8 * alone.cost) == branched.train_until(8 * branched.cost)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            alone.model.state_dict().values(), branched.model.state_dict().values(), strict=True
        )
    )


@pytest.mark.slow
def test_branch_anneals_to_zero_over_the_last_quarter(text):
    sizes, training = {"hidden": 32, "layers": 1}, Training(n_eval=2, n_trunk=2, warmup=2)
    run = Run(sizes, 1e-3, 0, text, training)
    run.train_until(12 * run.cost)
    (group,) = run.optims[0].param_groups

    rates = []
    while run.flops < 16 * run.cost:
        run.step(end=16 * run.cost)
        rates.append(group["lr"])

    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_shrunk_and_perturbed_weights_lie_between_the_grown_and_fresh_ones():
    grown, fresh = (build(SMOKE.target, seed) for seed in (0, 1))
    kept = [p.detach().clone() for p in grown.parameters()]

    jobs.shrink_and_perturb(grown, fresh, 0.75)

    for p, old, new in zip(grown.parameters(), kept, fresh.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * old + 0.25 * new)


def test_effective_rank_and_cosine_of_halves_are_those_of_matrices_that_are_known():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    assert symmetry.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert symmetry.effective_rank(x[:, :1] @ x[:1]) == pytest.approx(1)
    assert symmetry.cosine_of_halves(x.tile(2, 2)) == pytest.approx(1)
    assert symmetry.cosine_of_halves(torch.cat([x, -x]).tile(1, 2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_copies_without_noise_stay_equal_under_muon_and_part_with_it(monkeypatch, text):
    setup = replace(campaign.SETUPS["width"], grow_at=(2,), training={"n_trunk": 2, "warmup": 2})
    monkeypatch.setattr(symmetry, "SETUP", setup)
    monkeypatch.setattr(symmetry, "WINDOWS", 2)

    rows = [*symmetry.measure("muon", ("noise 0", "noise 1, dropped"), 0, text)]

    equal, parted = (row["cosine"] for row in rows)
    assert equal == pytest.approx(1) and parted < 0.9
    assert all(1 < row["residual"] <= 64 for row in rows)


@pytest.mark.slow
def test_the_default_is_exact_under_layer_norm_and_trains(monkeypatch, text):
    setup = replace(
        campaign.SETUPS["width"], grow_at=(2,), budgets=(8, 12),
        training={"n_trunk": 2, "n_eval": 2, "warmup": 2},
    )  # fmt: skip
    monkeypatch.setattr(layer_norm, "SETUP", setup)

    rows = [*layer_norm.measure(1, text)]

    assert [row["recipe"] for row in rows] == [name for name in layer_norm.RATES for _ in range(2)]
    for first, last in zip(rows[::2], rows[1::2], strict=True):
        assert first["loss_after"] == pytest.approx(first["loss_before"], abs=1e-5)
        assert last["loss"] < first["loss"] < first["loss_before"]
