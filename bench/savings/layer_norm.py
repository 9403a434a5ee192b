"""Which exact growth ends lowest under LayerNorm? ``python -m bench.savings.layer_norm`` measures it on a byte-level GPT-2.

The campaign trains Llamas, whose norms are RMSNorms. Here a GPT-2 of 32 x 4 trains as in the campaign's setup ``width``, grows to 64 x 4
at the same FLOPs by pads (the default) and by copies with twin noise (``noise=1``), at the law's learning rates and at one rate halved,
and is annealed at the first and the last budget. The learning rate is not tuned. Rows go to ``bench/results/layer-norm-<device>.csv``.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.harness import RESULTS, machine, record, slug
from bench.savings.campaign import RECIPES, SETUPS
from bench.savings.jobs import corpus
from growkern.cli.demo_run import HEAD_DIM, Corpus, Run, Training

RATES = {"default": 1.0, "noise 1": 1.0, "default, one rate": 0.5, "noise 1, one rate": 0.5}
SETUP, LR = SETUPS["width"], 8e-3
COLUMNS = (
    "recipe", "rate", "seed", "budget", "loss", "loss_before", "loss_after", "commit", "date", "device", "torch",
)  # fmt: skip


class GPT2Run(Run):
    """A run of a GPT-2; see ``Run``."""

    def __init__(self, sizes: Mapping[str, int], seed: int, text: Corpus) -> None:
        super().__init__(sizes, LR, seed, text, training := Training(**SETUP.training))
        config = transformers.GPT2Config(
            vocab_size=256, n_embd=sizes["hidden"], n_layer=sizes["layers"], n_head=sizes["hidden"] // HEAD_DIM,
            n_positions=training.seq, use_cache=False, initializer_range=sizes["hidden"] ** -0.5, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = transformers.GPT2LMHeadModel(config)
        self.optims = self._optimizers()


def measure(seed: int, text: Corpus) -> Iterator[dict[str, Any]]:
    """Train the source once; from its snapshot, grow by every recipe and train on. Yield the rows."""
    source, per = GPT2Run(SETUP.source, seed, text), GPT2Run(SETUP.target, seed, text).cost
    source.train_until(SETUP.grow_at[0] * per)
    here = source.snapshot()
    for name, rate in RATES.items():
        run = GPT2Run(SETUP.source, seed, text)
        run.restore(here)
        before = run.evaluate()
        run.grow(to=dict(SETUP.target), seed=seed, rate=rate, **RECIPES[name].growth)
        after = run.evaluate()
        for steps in (SETUP.budgets[0], SETUP.budgets[-1]):
            run.train_until((1 - run.training.anneal) * steps * per)
            yield {
                "recipe": name, "rate": rate, "seed": seed, "budget": steps * per, "loss": run.annealed(steps * per)[1],
                "loss_before": before, "loss_after": after,
            } | machine()  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the rows; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = corpus(SETUP.text, SETUP.n_bytes, "cpu")
    path = asked.out / f"layer-norm-{slug(machine()['device'])}.csv"
    record(path, COLUMNS, (row for seed in asked.seeds for row in measure(seed, text)), 7)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
