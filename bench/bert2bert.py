"""bert2BERT, whole: AKI, stage 1 and stage 2, against scratch at equal FLOPs: ``python -m bench.bert2bert``.

A byte-level BERT of 32 x 3 trains on the source text of Python's library, grows to 64 x 6, trains sub-models of 3 blocks (stage 1) and then
the whole (stage 2). Every run spends the same FLOPs, the small model's included, and its learning rate falls linearly to zero at their
end. The learning rate of each recipe is tuned on seed 0, which no figure includes, until the best one is not at the edge of those tried.
Losses are of held-out files, in nats per masked byte. Rows go to ``bench/results/bert2bert-<device>.csv``.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

import growkern
from bench.harness import RESULTS, machine, record, slug
from growkern import depth, trains, width
from growkern.cli.demo_run import Corpus, Training, read_corpus
from growkern.commit.frozen import Frozen, frozen_of
from growkern.training.trains import flops_per_token

SMALL, LARGE = {"hidden": 32, "layers": 3}, {"hidden": 64, "layers": 6}
MASK, SHARE = 256, 0.15  # the byte after the last one; share of the bytes that are predicted
STEPS, SOURCE, STAGE1 = (
    1000,
    0.2,
    0.15,
)  # target steps of a run; shares of its FLOPs in the small model and in stage 1
TEXT = Training(batch=16, seq=64)
COLUMNS = ("recipe", "lr", "seed", "loss", "landed", "source_loss", "flops", "steps", "commit", "date", "device", "torch")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a run gets from the small model to the large one; ``growth`` is None for a run from scratch."""

    growth: dict[str, Any] | None
    stage1: bool = False


AKI = {"width": width.AKI(), "depth": depth.Stack(), "state": "drop", "dynamics": None}
RECIPES = {
    "scratch": Recipe(None),
    "bert2BERT: AKI, stages 1 and 2": Recipe(AKI, stage1=True),
    "AKI, stage 2 alone": Recipe(AKI),
    "growkern's default": Recipe({}),
}
RATES = (1e-3, 2e-3, 4e-3)
SOURCE_LR = 4e-3


def build(sizes: dict[str, int], seed: int) -> Any:
    """Build a byte-level BERT."""
    config = transformers.BertConfig(
        vocab_size=MASK + 1, hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"], num_attention_heads=sizes["hidden"] // 16,
        intermediate_size=4 * sizes["hidden"], max_position_embeddings=TEXT.seq, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=sizes["hidden"] ** -0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.BertForMaskedLM(config)


def masked(text: Tensor, starts: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows of the text with masked bytes, and labels: 80 % of the predicted bytes are masked, 10 % are others, 10 % stay."""
    ids = text[starts[:, None] + torch.arange(TEXT.seq)].long()
    how = torch.rand(ids.shape, generator=draw)
    labels = ids.masked_fill(how >= SHARE, -100)
    other = torch.randint(256, ids.shape, generator=draw)
    given = torch.where(how < 0.8 * SHARE, MASK, torch.where(how < 0.9 * SHARE, other, ids))
    return given, labels


@torch.no_grad()
def evaluate(model: Any, text: Tensor, n_windows: int = 512) -> float:
    """Return the mean loss of held-out windows with fixed masks."""
    model.eval()
    draw, total = torch.Generator().manual_seed(7), 0.0
    starts = torch.arange(n_windows) * ((len(text) - TEXT.seq) // n_windows)
    parts: tuple[Tensor, ...] = torch.split(starts, 32)
    for part in parts:
        given, labels = masked(text, part, draw)
        total += float(model(given, labels=labels).loss) * len(part)
    model.train()
    return total / n_windows


def cost(model: Any) -> float:
    """Return the FLOPs of a step; attention takes 4 x width x window per token and block that runs, and 8 per block passed back."""
    spec, frozen = growkern.describe(model), frozen_of(model) or Frozen()
    n, hidden = spec.sizes["layers"], spec.sizes["hidden"]
    n_run = frozen.n_blocks or n
    n_back = n if not frozen.names else sum(
        any(name.startswith(f"bert.encoder.layer.{i}.") for name in spec.tensors if name not in frozen.names) for i in range(n_run)
    )  # fmt: skip
    attention = 4 * hidden * TEXT.seq * (n_run + 2 * n_back)
    return (flops_per_token(model, spec, frozen) + attention) * TEXT.batch * TEXT.seq


def run(name: str, lr: float, seed: int, text: Corpus) -> dict[str, Any]:
    """Run a recipe to the budget; return its row."""
    recipe, per = RECIPES[name], cost(build(LARGE, seed))
    end, grows = STEPS * per, recipe.growth is not None
    model = build(SMALL if grows else LARGE, seed)
    optim = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    order, draw = (torch.Generator().manual_seed(1000 * i + seed) for i in (1, 2))
    flops, steps, since, landed, source = 0.0, 0, 0, None, None
    peak, attachment, costs = SOURCE_LR if grows else lr, None, dict[object, float]()
    while True:
        if grows and flops >= SOURCE * end and landed is None:
            source = evaluate(model, text[1])
            growkern.expand_inplace(model, optim, to=LARGE, seed=seed, **recipe.growth)  # pyright: ignore
            landed, peak, since = evaluate(model, text[1]), lr, 0
            if recipe.stage1:
                later = [growkern.At(step=10 * STEPS, to=None)]
                schedule = growkern.GrowthSchedule(later, trains=trains.SubModels(3, seed=seed))
                attachment = schedule.attach(model, optim)
        if attachment is not None and flops >= (SOURCE + STAGE1) * end:
            attachment.remove()
            attachment = None
        kind = landed is None, None if (frozen := frozen_of(model)) is None else frozen.n_blocks
        step = costs[kind] = costs.get(kind) or cost(model)
        if flops + step / 2 >= end:
            break
        factor = min(1.0, (since + 1) / TEXT.warmup) * max(0.0, 1 - flops / end)
        for group in optim.param_groups:
            group["lr"] = peak * factor * group.get("lr_factor", 1.0)
        starts = torch.randint(len(text[0]) - TEXT.seq, (TEXT.batch,), generator=order)
        given, labels = masked(text[0], starts, draw)
        model(given, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TEXT.clip)
        optim.step()
        optim.zero_grad()
        flops, steps, since = flops + step, steps + 1, since + 1
    return {
        "recipe": name, "lr": lr, "seed": seed, "loss": evaluate(model, text[1]), "landed": landed, "source_loss": source,
        "flops": flops, "steps": steps,
    } | machine()  # fmt: skip


def measure(
    seeds: list[int], text: Corpus, known: dict[tuple[str, float, int], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Tune every recipe on seed 0, and run it at its best rate on the other seeds; yield the rows, those that are known as they are."""

    def row(name: str, lr: float, seed: int) -> dict[str, Any]:
        key = name, lr, seed
        if key not in known:
            known[key] = run(name, lr, seed, text)
        return known[key]

    for name in RECIPES:
        tried: dict[float, float] = {}
        ahead, best = [*RATES], RATES[0]
        while ahead:  # until the best rate is not the lowest or the highest
            lr = ahead.pop(0)
            yield (made := row(name, lr, 0))
            tried[lr] = float(made["loss"])
            best = min(tried, key=tried.__getitem__)
            if not ahead and best in (min(tried), max(tried)):
                ahead = [best / 2 if best == min(tried) else best * 2]
        yield from (row(name, best, seed) for seed in seeds)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield README's table: means of the seeds but 0."""
    yield "| recipe | loss | learning rate | steps |"
    yield "|---|---|---|---|"
    for name in RECIPES:
        own = [row for row in rows if row["recipe"] == name and int(row["seed"])]
        losses = [float(row["loss"]) for row in own]
        steps = mean(int(row["steps"]) for row in own)
        yield f"| {name} | {mean(losses):.4f} ({', '.join(f'{x:.3f}' for x in losses)}) | {float(own[0]['lr']):g} | {steps:.0f} |"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the rows; return the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder of the rows; rows that are there are not run again",
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = asked.out / f"bert2bert-{slug(machine()['device'])}.csv"
    found = [*csv.DictReader(path.open())] if path.exists() else []
    known = {(r["recipe"], float(r["lr"]), int(r["seed"])): dict[str, Any](r) for r in found}
    rows: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for row in measure(asked.seeds, read_corpus(6_000_000), known):
            rows.append(row)
            yield row

    record(path, COLUMNS, kept(), 4)
    Console(width=160).print(*table(rows), sep="\n", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
