"""Every method on the demo's model and text, side by side: ``python -m bench.methods`` prints the README's tables.

A byte-level Llama trains on the source text of Python's library for 600 steps. Copies of the model grow by every method, to twice the
width or twice the depth, and train on for 100 steps with the same batches. Losses are of held-out files, in nats per byte.
"""

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import growkern
from growkern import depth, width
from growkern.analysis.comparison import loss_of
from growkern.cli import demo_run

STEPS, MORE, EVAL = 600, 100, 64
TRAINING = demo_run.Training()
WIDTHS = [
    width.Lossless(),
    width.Lossless(noise=1),
    width.Lossless(noise=0),
    width.FPI(),
    width.Net2Wider(noise=0.1),
    width.AKI(),
    width.HyperClone(),
    width.HyperClone(noise_db=10),
    width.Lemon(),
    width.CopyAndPad(),
    width.CopyAndPad(norm="corrected"),
    width.Sparkling(),
    width.Sparkling("random", "copy"),
]
DEPTHS = [
    depth.IdentityBlocks(),
    depth.Stack(),
    depth.TopCopies(),
    depth.Interpose(),
    depth.Interpose(halve_branches=True),
    depth.DepthUpscale(),
]


def windows(text: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` random windows of the text."""
    seq = TRAINING.seq + 1
    starts = torch.randint(len(text) - seq, (n, 1), generator=generator)
    return text[starts + torch.arange(seq)].long()


def main() -> None:
    """Train the source, compare the methods and print the tables."""
    console = Console(width=200)
    draw = torch.Generator().manual_seed(0)
    text, held_out = demo_run.read_corpus(6_000_000)
    model = demo_run.build({"hidden": 64, "layers": 4}, 0)
    optim = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=TRAINING.betas)
    for _ in track(range(STEPS), "the source", console=console):
        loss = loss_of(model, windows(text, TRAINING.batch, draw))
        optim.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
        optim.step()
    batches = [windows(text, TRAINING.batch, draw) for _ in range(MORE)]
    measured = windows(held_out, EVAL, torch.Generator().manual_seed(1))
    for to, methods in (("2x", WIDTHS), ({"layers": "2x"}, DEPTHS)):
        comparison = growkern.compare(
            model, optim, to=to, methods=methods, batch=batches, held_out=measured, steps=MORE
        )
        console.print(f"\nto={to!r}\n\n{comparison}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
