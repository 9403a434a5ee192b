"""How often is ``growkern.advise`` right? ``python -m bench.advice`` judges it on the rows of the savings campaign.

For every recipe, growth point and budget of the campaign the adviser gets the data that a user has before the decision: the source's trunk
curve up to the growth point and, in a second pass, the curve of a model of another size (seed 0; never the target's). What growth keeps,
and the pace after it, are calibrated on the other seeds, recipes or setups; never on the figure that is judged. The
truth is the campaign's own figure, ``Campaign.saving``. ``--write`` derives ``growkern/recipes/measured.py`` from the rows.
"""

import argparse
from pathlib import Path

from rich.console import Console

from bench.advice.calibration import CALIBRATION, calibrate, module
from bench.advice.figures import Rows, single_seeds
from bench.advice.judging import judge_all, judge_seeds, summary, table
from bench.harness import RESULTS

CURVES = "the source's curve", "the source's and another size's curve"
PASSES = {  # title -> whether the adviser gets the second curve, and whether the calibration leaves the whole setup out
    "the source's curve; the recipe left out": (False, False),
    "the source's and another size's curve; the recipe left out": (True, False),
    "the source's curve; the setup left out": (False, True),
    "the source's and another size's curve; the setup left out": (True, True),
}


def main(arguments: list[str] | None = None) -> int:
    """Judge the adviser and print the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of savings-*.csv")
    parser.add_argument(
        "--write", action="store_true", help="write growkern/recipes/measured.py from the rows"
    )
    asked = parser.parse_args(arguments)
    console, rows, seeds = Console(width=180), Rows(asked.rows), single_seeds(asked.rows)
    figures, singles = rows.figures, [f for its in seeds.values() for f in its.figures]
    for other in (False, True):
        judged = judge_seeds(seeds, figures, other=other)
        console.print(f"{CURVES[other]}; the seed left out: {summary(judged)}\n", highlight=False)
    for title, (other, across) in PASSES.items():
        judged = judge_all(rows, singles, other=other, across=across)
        if judged:
            console.print(table(judged, title))
        console.print(f"{title}: {summary(judged)}\n", highlight=False)
    recipes = calibrate(figures, singles)
    for recipe in recipes.values():
        console.print(
            f"{recipe.kind:6} {recipe.name:24} keeps {recipe.kept:.0%} +- {recipe.sd:.0%}, at a pace of {recipe.pace[0]:.2f} +- "
            f"{recipe.pace[1]:.2f} ({recipe.n} runs)",
            highlight=False,
        )
    if asked.write:
        CALIBRATION.write_text(module(recipes, figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
