"""A run that grows: a byte-level Llama learns Python's standard library, doubles its width, gains layers, and trains on.

Beside it, a run of the final size from scratch: the same code, data, schedule and FLOPs.
"""

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from growkern.api import expand_inplace
from growkern.errors import GrowthError
from growkern.report import GrowthReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Target = str | Mapping[str, int | str]

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # not the library
SKIPPED |= {"encodings", "pydoc_data"}  # generated tables and prose, not source text
HELD_OUT = 12  # every twelfth file is for validation
TOLERANCE = 1e-4  # nats by which a growth may move the validation loss
CLIP = 0.0
STD = 0.02
FLOOR = 0.1  # of the learning rate, at the end of the cosine
EVAL_BATCH = 32  # windows; bounds memory, not results


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes and training of the demo.

    Attributes:
        hidden: Width of the source.
        layers: Layers of the source.
        growths: What grows, after how many steps of the stage before: ``(steps, to)``.
        last_steps: Steps after the last growth.
        lr: Peak learning rate of the grown run; ``dynamics="mup"`` scales it at the growth.
        scratch_lr: Peak learning rate from scratch.
        warmup: Fraction of the steps in which the learning rate rises.
        batch: Windows in a step.
        seq: Bytes in a window.
        n_eval: Windows of the validation loss.
        evals: Validation losses on a run's curve, about.
        n_bytes: Bytes of source text read.
    """

    hidden: int = 64
    layers: int = 4
    growths: tuple[tuple[int, Target], ...] = ((900, "2x"), (250, {"layers": 6}))
    last_steps: int = 150
    lr: float = 4e-3
    scratch_lr: float = 2e-3
    warmup: float = 0.05
    batch: int = 8
    seq: int = 128
    n_eval: int = 128
    evals: int = 16
    n_bytes: int = 6_000_000


@dataclass(slots=True)
class Run:
    """What a run was and did; ``curve`` holds (FLOPs, validation loss)."""

    name: str
    lr: float
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    n_params: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    growths: list[tuple[float, str, float, float]] = field(default_factory=list[tuple[float, str, float, float]])


def read_corpus(n_bytes: int, device: str):
    root = Path(sysconfig.get_path("stdlib"))
    train, held = bytearray(), bytearray()
    files = (path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts))
    for i, path in enumerate(files):
        (held if i % HELD_OUT == 0 else train).extend(path.read_bytes())
        if len(train) + len(held) >= n_bytes:
            break
    return tuple(torch.frombuffer(part, dtype=torch.uint8).to(device) for part in (train, held))


def flops_per_token(model, seq: int) -> float:
    c = model.config
    n_params = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return 6 * n_params + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq


def windows(text: Tensor, starts: Tensor, seq: int):
    rows = text[(starts[:, None] + torch.arange(seq + 1)).to(text.device)].long()
    return rows[:, :-1], rows[:, 1:]


def loss_of(model, x, y):
    return cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def evaluate(model, text, setup):
    model.eval()
    starts = torch.linspace(0, len(text) - setup.seq - 1, setup.n_eval).long()
    t = [loss_of(model, *windows(text, s, setup.seq)) for s in starts.split(EVAL_BATCH)]
    model.train()
    return float(torch.stack(t).mean())


def build(setup, seed, device, hidden=None, layers=None):
    from transformers import LlamaConfig, LlamaForCausalLM
    h = hidden or setup.hidden
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=h, intermediate_size=h * 11 // 4, num_hidden_layers=layers or setup.layers,
      num_attention_heads=h // 32, num_key_value_heads=h // 32, head_dim=32, max_position_embeddings=setup.seq, initializer_range=STD, tie_word_embeddings=False, use_cache=False)).to(device)


def train(run, model, stages, lr, setup, train_text, val_text, seed, mode="steps", growkw={}, groups=None, verbose=False):
    optim = torch.optim.AdamW(groups(model, lr) if groups else model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    n_steps = sum(s for s, _ in stages)
    cost = []
    for s, f in zip([s for s, _ in stages], run_flops(setup, stages)):
        cost += [f] * s
    tot = sum(cost); cum = [0.0]
    for c in cost: cum.append(cum[-1] + c)
    warm = max(1, int(setup.warmup * n_steps))
    def shape(step):
        prog = min(1.0, (step / n_steps) if mode == "steps" else (cum[min(step, n_steps)] / tot))
        return min(1.0, (step + 1) / warm) * (FLOOR + (1 - FLOOR) * (1 + cos(pi * prog)) / 2 if mode != "const" else 1)
    sched = torch.optim.lr_scheduler.LambdaLR(optim, shape)
    gen = torch.Generator().manual_seed(seed)
    t0 = perf_counter()
    for k, (steps, to) in enumerate(stages):
        if to is not None:
            b = evaluate(model, val_text, setup)
            expand_inplace(model, optim, to=to, seed=seed, scheduler=sched, **growkw)
            a = evaluate(model, val_text, setup)
            run.growths.append((run.flops, str(to), b, a))
        f = flops_per_token(model, setup.seq) * setup.batch * setup.seq
        for i in range(steps):
            starts = torch.randint(len(train_text) - setup.seq, (setup.batch,), generator=gen)
            loss = loss_of(model, *windows(train_text, starts, setup.seq))
            loss.backward(); CLIP and nn.utils.clip_grad_norm_(model.parameters(), CLIP); optim.step(); sched.step(); optim.zero_grad()
            run.flops += f; run.steps += 1
            if run.steps % max(1, n_steps // setup.evals) == 0:
                run.curve.append((run.flops, evaluate(model, val_text, setup)))
    run.curve.append((run.flops, evaluate(model, val_text, setup)))
    run.seconds = perf_counter() - t0
    run.n_params = sum(p.numel() for p in model.parameters())
    return run


def run_flops(setup, stages):
    "flops per step of every stage, by size arithmetic"
    h, l = None, None
    return [s_f for s_f in STAGE_FLOPS(setup, stages)]
