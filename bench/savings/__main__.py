"""What growing saves: ``python -m bench.savings`` runs a campaign and prints a table per budget, with a verdict in words.

Runs of equal FLOPs are compared by their annealed held-out loss. The learning rates of the source, of the target from scratch
and of each recipe are tuned on seed 0; every figure of the tables is from the other seeds. Savings are stated with the FLOPs of both
phases charged, and for an existing source ("sunk"). A killed campaign resumes where it stopped.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from bench.harness import RESULTS, slug
from bench.savings.analysis import Campaign
from bench.savings.campaign import RECIPES, SETUPS, Setup
from bench.savings.jobs import Done, Job, Ledger, run_all, unit
from bench.savings.report import describe, picture, readme, tables


def plain(setup: Setup) -> list[Job]:
    """Return the jobs of source and target at every learning rate, on the tuning seed."""
    return [
        _plain(setup, sizes, lr, 0)
        for sizes, lrs in (
            (setup.target_sizes, setup.lrs),
            (setup.source_sizes, setup.source_lrs),
        )
        for lr in lrs
    ]


def search(setup: Setup, names: list[str], campaign: Campaign) -> list[Job]:
    """Return the jobs of every recipe at every growth point and rate, from the source's best learning rate, on the tuning seed."""
    lr = campaign.best_lr(setup.source_sizes, 0)
    return [
        Job(setup, setup.target_sizes, lr, 0, name, rate, at * campaign.per)
        for at in setup.grow_at
        for name in names
        for rate in RECIPES[name].rates
    ]


def sources(setup: Setup, campaign: Campaign, seeds: int) -> list[Job]:
    """Return the jobs of source and target at their best rates, on the other seeds."""
    chosen = {
        (sizes, campaign.best_lr(sizes, b))
        for sizes in (setup.source_sizes, setup.target_sizes)
        for b in range(len(campaign.reach))
        if campaign.tried(sizes, b)
    }
    chosen.add((setup.source_sizes, campaign.best_lr(setup.source_sizes, 0)))
    return [
        _plain(setup, *sizes_and_lr, seed)
        for seed in range(1, seeds + 1)
        for sizes_and_lr in sorted(chosen)
    ]


def finals(setup: Setup, names: list[str], campaign: Campaign, seeds: int) -> list[Job]:
    """Return the jobs of every recipe at the rates that were best on seed 0, on the other seeds."""
    chosen = {
        v: None
        for b in range(len(campaign.budgets))
        for v in campaign.variants(b)
        if v.recipe in names
        and any(abs(v.grow_at / campaign.per / at - 1) < 0.01 for at in setup.grow_at)
    }
    return [
        Job(setup, setup.target_sizes, v.lr, seed, v.recipe, v.rate, v.grow_at)
        for seed in range(1, seeds + 1)
        for v in chosen
    ]


def _plain(setup: Setup, sizes: tuple[int, int], lr: float, seed: int) -> Job:
    per = unit(setup)
    saves = tuple(at * per for at in setup.grow_at) if sizes == setup.source_sizes else ()
    return Job(setup, sizes, lr, seed, saves=saves)


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign and print its results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--setup", choices=SETUPS, default="width", metavar="NAME", help="; ".join(SETUPS)
    )
    parser.add_argument("--gpu", action="store_true", help="the setup for a GPU, on the GPU")
    parser.add_argument("--seeds", type=int, default=3, help="besides seed 0, which chooses")
    parser.add_argument("--recipes", nargs="+", help="names; all of the setup's by default")
    parser.add_argument(
        "--finalists", nargs="+", help="names of recipes that the other seeds measure; default: all"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("savings-work"),
        help="folder of the snapshots from which runs grow",
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; tables and picture of the rows"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="run nothing; print README's tables"
    )
    asked = parser.parse_args(arguments)
    console = Console(width=160)
    name, device = ("gpu", "cuda") if asked.gpu else (asked.setup, "cpu")
    if asked.workers < 1 or asked.seeds < 0 or asked.out.is_file():
        parser.error("--workers is 1 or more, --seeds 0 or more, and --out a folder")
    try:
        setup, ledger = SETUPS[name], Ledger(asked.out)
    except OSError as error:
        parser.error(f"--out: {error}")
    if asked.markdown:
        console.print(
            *readme(ledger.rows()), sep="\n\n", highlight=False, markup=False, soft_wrap=True
        )
        return 0
    names = asked.recipes or [*setup.recipes]
    finalists = asked.finalists or names
    if unknown := {*names, *finalists} - {*RECIPES}:
        parser.error(f"unknown recipes: {'; '.join(sorted(unknown))}; known: {'; '.join(RECIPES)}")

    def on_done(job: Job, done: Done, at: str) -> None:
        losses = " ".join(f"{row['loss']:.4f}" for row in done.rows)
        console.print(f"{at} {describe(job)}: {losses}", highlight=False, markup=False)

    def campaign() -> Campaign:
        return Campaign(setup, ledger.rows())

    rounds = [
        lambda: plain(setup),
        lambda: search(setup, names, campaign()),
        lambda: sources(setup, campaign(), asked.seeds),
        lambda: finals(setup, finalists, campaign(), asked.seeds),
    ]
    workers = 1 if asked.gpu else asked.workers
    # the pool starts its processes when jobs come
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for jobs in () if asked.report else rounds:
            run_all(jobs(), ledger, asked.work, pool=pool, device=device, on_done=on_done)
    measured = campaign()
    if not measured.complete:
        console.print(
            f"{ledger.rows_path} has no whole setup {name!r} yet: run it without --report.",
            highlight=False,
        )
        return 1
    for part in tables(measured):
        console.print(part, highlight=False)
    path = asked.out / f"{ledger.rows_path.stem}-{slug(name)}.png"
    picture(measured, path)
    console.print(f"\n{ledger.rows_path}\n{path}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
