"""Learned growth beside growth by a closed form: ``python -m bench.learned_growth [SEED ...]`` prints the README's table.

A byte-level Llama trains on the source text of Python's library for 400 steps, then copies of the model grow to twice the width and twice
the depth, and train with a new AdamW. Learning takes the first 100 of the 300 steps, on the operators. All steps have equal batches; losses
are of held-out files, in nats per byte.
"""

import copy
import sys
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn

import growkern
from growkern import depth, width
from growkern.analysis.comparison import loss_of
from growkern.cli import demo_run
from growkern.support.text import table

SOURCE, STEPS, EVERY, WARM_UP = 400, 300, 100, 20
BATCH, SEQ, EVAL = 8, 64, 96
SIZES = dict(
    hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, num_hidden_layers=3, vocab_size=256,
    tie_word_embeddings=True, use_cache=False,
)  # fmt: skip
STACK = {"width": width.FPI(maps="cyclic"), "depth": depth.Stack()}
CASES = {  # growth, and the options of learn; None for a closed form
    "FPI + Stack": (STACK, None),
    "Lossless + IdentityBlocks": ({}, None),
    "learned from FPI + Stack": (STACK, {}),
    "the same, noise=0.03": (STACK, {"noise": 0.03}),
    'the same, tie="published"': (STACK, {"tie": "published"}),
    'the same, tie="shared"': (STACK, {"tie": "shared"}),
    "learned from Lossless + IdentityBlocks": ({}, {}),
}


def windows(text: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` random windows of the text."""
    starts = torch.randint(len(text) - SEQ, (n, 1), generator=generator)
    return text[starts + torch.arange(SEQ)].long()


def train(
    model: nn.Module, batches: list[Tensor], lr: float, warm_up: int, measured: Tensor
) -> list[str]:
    """Train with a new AdamW; return the held-out loss after every ``EVERY`` steps."""
    optim, losses = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95)), []
    for i, batch in enumerate(batches, 1):
        optim.param_groups[0]["lr"] = lr * min(1, i / (warm_up + 1))
        loss = loss_of(model, batch)
        optim.zero_grad()
        loss.backward()
        optim.step()
        if i % EVERY == 0:
            losses.append(held_out_loss(model, measured))
    return losses


def held_out_loss(model: nn.Module, measured: Tensor) -> str:
    """Return the loss of held-out windows, as text."""
    with torch.no_grad():
        return f"{float(loss_of(model, measured)):.3f}"


def rows(seed: int) -> Iterator[list[str]]:
    """Yield name, learned numbers, and losses of the closed form and after every ``EVERY`` steps."""
    text, held_out = demo_run.read_corpus(6_000_000)
    draw = torch.Generator().manual_seed(seed)
    measured = windows(held_out, EVAL, torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    train(source, [windows(text, BATCH, draw) for _ in range(SOURCE)], 2e-3, 0, measured)
    batches, to = [windows(text, BATCH, draw) for _ in range(STEPS)], {"hidden": 96, "layers": 6}
    for name, (methods, options) in CASES.items():
        model, learner, numbers, losses = copy.deepcopy(source), copy.deepcopy(source), "", []
        growkern.expand_inplace(model, to=to, **methods)
        losses.append(held_out_loss(model, measured))
        left = batches
        if options is not None:
            model, left = learner, batches[EVERY:]
            report = growkern.learn(model, None, batches, to=to, steps=EVERY, **methods, **options)
            numbers = f"{report.learned.n_numbers:,}"
            losses.append(held_out_loss(model, measured))
        yield [name, numbers, *losses, *train(model, left, 1e-3, WARM_UP, measured)]


def main(seeds: list[int]) -> None:
    """Print a table per seed."""
    head = [
        "growth",
        "numbers",
        "closed form",
        *(f"after {n}" for n in range(EVERY, STEPS + 1, EVERY)),
    ]
    for seed in seeds or [0]:
        print(f"seed {seed}\n\n{table(head, [*rows(seed)])}\n")


if __name__ == "__main__":
    main([*map(int, sys.argv[1:])])
