"""Do copies part? ``python -m bench.savings.symmetry`` measures it on a grown model that trains on, under AdamW and Muon.

A byte-level Llama of 32 x 4 trains as in the campaign's setup ``width``, grows to 64 x 4 by several recipes, and trains on. At the growth
and after every hundred steps a row is printed, and written to ``bench/results/symmetry-<device>.csv``:

- *cosine*: mean cosine similarity of the two halves of a weight matrix, which read or write the two copies of each coordinate, over the
  matrices of all blocks. 1: the copies are equal; 0: the copies have diverged.
- *residual*: effective rank of the residual stream before the final norm, on 64 held-out windows; at most the width.
- *update*: mean effective rank of the change of each matrix since the growth, over the matrices of all blocks; at most the smaller side.

The effective rank is the exponential of the entropy of the singular values' shares (Roy and Vetterli, EUSIPCO 2007).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.harness import RESULTS, machine, record, slug
from bench.savings.campaign import RECIPES, SETUPS
from bench.savings.jobs import corpus
from growkern.cli.demo_run import Corpus, Run, Training

ADAMW = (
    "noise 0",
    "noise 1, one rate",
    "HyperClone",
    "default, one rate",
    "FreshFeatures",
    "Sparkling fresh",
)
MUON = "noise 0", "noise 1, dropped", "FreshFeatures, dropped", "Sparkling fresh"
SETUP, SEED, LR, WINDOWS = SETUPS["width"], 0, 8e-3, 64
COLUMNS: tuple[str, ...] = (
    "optimizer",
    "recipe",
    "steps",
    "loss",
    "cosine",
    "residual",
    "update",
    "commit",
    "date",
    "device",
    "torch",
)


def effective_rank(x: Tensor) -> float:
    """Return the exponential of the entropy of the singular values' shares: from 1 to the smaller side of ``x [m, n]``."""
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def cosine_of_halves(x: Tensor) -> float:
    """Return the mean cosine similarity of the two halves of ``x [m, n]``, over both dimensions."""
    similarities = [
        torch.cosine_similarity(a, b, dim=d) for d in (0, 1) for a, b in (x.chunk(2, 1 - d),)
    ]
    return mean(float(each.mean()) for each in similarities)


def matrices(run: Run) -> list[Tensor]:
    """Return the weight matrices of all blocks."""
    return [
        p.detach() for name, p in run.model.named_parameters() if p.ndim == 2 and "layers." in name
    ]


@torch.no_grad()
def residual(run: Run, text: Corpus) -> Tensor:
    """Return the input of the final norm, ``[tokens, width]``, on held-out windows."""
    seen: list[Tensor] = []
    norm: Any = run.model.model.norm
    handle = norm.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    try:
        run.evaluate(WINDOWS)
    finally:
        handle.remove()
    return torch.cat(seen)


def measure(
    optimizer: str, names: tuple[str, ...], steps: int, text: Corpus
) -> Iterator[dict[str, Any]]:
    """Train the source once; from its snapshot, grow by every recipe and train on. Yield the rows."""
    training = Training(**SETUP.training)
    source = Run(SETUP.source, LR, SEED, text, training, optimizer=optimizer)
    target = Run(SETUP.target, LR, SEED, text, training)
    source.train_until(SETUP.grow_at[0] * target.cost)
    here = source.snapshot()
    for name in names:
        recipe = RECIPES[name]
        run = Run(SETUP.source, LR, SEED, text, training, optimizer=optimizer)
        run.restore(here)
        run.grow(to=dict(SETUP.target), seed=SEED, rate=0.5, rewarm=recipe.rewarm, **recipe.growth)
        grown = [p.clone() for p in matrices(run)]
        for step in range(0, steps + 1, 100):
            if step:
                run.train_until(run.flops + 100 * run.cost)
            learned = [p - q for p, q in zip(matrices(run), grown, strict=True)]
            yield {
                "optimizer": optimizer, "recipe": name, "steps": step, "loss": run.evaluate(),
                "cosine": mean(map(cosine_of_halves, matrices(run))), "residual": effective_rank(residual(run, text)),
                "update": mean(map(effective_rank, learned)) if step else "",
            } | machine()  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the rows; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="after the growth; in hundreds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = corpus(SETUP.text, SETUP.n_bytes, "cpu")
    path = asked.out / f"symmetry-{slug(machine()['device'])}.csv"
    both = (("adamw", ADAMW), ("muon", MUON))
    rows = (row for kind, names in both for row in measure(kind, names, asked.steps, text))
    record(path, COLUMNS, rows, 7)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
