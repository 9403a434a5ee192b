"""A run that grows: a byte-level Llama learns Python's own library, doubles its width, gains layers and trains on.

Beside it trains a model of the final size from scratch: the same code, text, batches, schedule, clipping and FLOPs; only its
learning rate is its own. The verdict is read off the two runs, and is about them: it does not say that a run of this length
needs the final size.
"""

# pyright: reportUnknownMemberType=false
import copy
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from growkern.api import expand_inplace
from growkern.errors import GrowthError
from growkern.report import GrowthReport

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from transformers import LlamaConfig, LlamaForCausalLM

Stages = tuple[
    tuple[str | Mapping[str, int | str] | None, int], ...
]  # what to grow to, if anything; steps from there

TOLERANCE = 1e-4  # nats by which a growth may move the validation loss
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
HELD_OUT = 12  # every twelfth file is for validation
HEAD_DIM = 32
FLOOR = 0.1  # of the peak learning rate, at the end of the cosine
WARMUP = 0.1  # of the steps
CLIP = 1.0  # gradient norm before growth; the report says what becomes of it
EVAL_BATCH = 32  # windows at a time; bounds memory, changes no result


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes and training of the demo."""

    hidden: int = 64  # of the source
    layers: int = 4
    stages: Stages = ((None, 600), ("2x", 220), ({"layers": 6}, 100))
    lr: float = 4e-3  # peak, of the grown run; growth scales it where its law says so
    scratch_lr: float = 2e-3  # peak, from scratch: best of 1e-3, 2e-3, 4e-3 (2.127, 2.040, 2.057)
    batch: int = 4  # windows in a step
    seq: int = 128  # bytes in a window
    n_eval: int = 128  # windows that a validation loss is the mean of
    n_points: int = 16  # validation losses on a curve, about
    n_bytes: int = 6_000_000  # of source text


FULL = Setup()
QUICK = Setup(
    hidden=32,
    layers=2,
    stages=((None, 30), ("2x", 10), ({"layers": 3}, 10)),
    n_eval=8,
    n_points=5,
    n_bytes=1_000_000,
)


@dataclass(frozen=True, slots=True)
class Growth:
    """One growth: where on the curve, what grew, and the validation loss on either side."""

    flops: float
    label: str
    before: float
    after: float


@dataclass(slots=True)
class Run:
    """What a run did; ``curve`` holds (FLOPs, validation loss) and ends with the last step."""

    name: str
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    n_params: int = 0
    loss: float = float("nan")  # the last of the curve, nats per byte
    curve: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    growths: list[Growth] = field(default_factory=list[Growth])


def run(
    out: Path, *, seed: int = 0, compare: bool = True, device: str = "cpu", setup: Setup = FULL
) -> Path:
    """Train, grow, train on, compare, and draw.

    Args:
        out: Folder of the picture; made when it is missing.
        seed: Of weights, batches and growth noise.
        compare: Train a model of the final size from scratch too, at equal FLOPs.
        device: Where to train, as torch names it.
        setup: Sizes and training.

    Returns:
        Path of the picture.

    Raises:
        GrowthError: A growth moved the validation loss by more than 1e-4, or Python's source text is not installed.
        ModuleNotFoundError: An extra is missing.
    """
    import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]  # missing, it should be missed now, not after minutes
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import LlamaConfig

    out.mkdir(parents=True, exist_ok=True)
    text = read_corpus(setup.n_bytes, device)
    (console := Console()).print(
        f"{len(text[0]):,} bytes of Python's library to train on, {len(text[1]):,} held out, on {device}"
    )
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setup.hidden,
        intermediate_size=setup.hidden * 11 // 4,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.hidden // HEAD_DIM,
        use_cache=False,
    )
    name, loss = TextColumn("{task.description}"), TextColumn("loss {task.fields[loss]}")
    with Progress(
        name, BarColumn(), MofNCompleteColumn(), loss, TimeElapsedColumn(), console=console
    ) as bars:
        model = build(config, seed, device)
        runs = [train("grown", model, text, setup, setup.stages, setup.lr, seed, bars)]
        if compare:
            final = build(
                copy.deepcopy(model.config), seed, device
            )  # the config has grown with the model
            n_steps = max(1, round(runs[0].flops / flops_per_step(final, setup)))
            alone: Stages = ((None, n_steps),)
            runs.append(
                train("from scratch", final, text, setup, alone, setup.scratch_lr, seed, bars)
            )
    console.print(summary(runs))
    draw(runs, path := out / "loss.png")
    console.print(f"{verdict(runs)}\n\n{path}", highlight=False, markup=False, soft_wrap=True)
    return path


def read_corpus(n_bytes: int, device: str) -> tuple[Tensor, Tensor]:
    """Read the source text of the Python that runs this: bytes to train on, and of other files, bytes held out."""
    root = Path(sysconfig.get_path("stdlib"))
    parts = bytearray(), bytearray()
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not NOT_LIBRARY & {*path.relative_to(root).parts}
    ]
    for i, path in enumerate(files):
        parts[i % HELD_OUT == 0].extend(path.read_bytes())
        if sum(map(len, parts)) >= n_bytes:
            break
    if min(map(len, parts)) < n_bytes // 100:
        raise GrowthError(
            f"the demo trains on the source text of Python's library, and {root} holds {len(files)} files of it."
        )
    train, held_out = (torch.frombuffer(part, dtype=torch.uint8).to(device) for part in parts)
    return train, held_out


def build(config: "LlamaConfig", seed: int, device: str) -> "LlamaForCausalLM":
    """Initialise a model with weights of variance 1 / width, the same on every device."""
    from transformers import LlamaForCausalLM

    config.initializer_range = config.hidden_size**-0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]


def flops_per_step(model: "LlamaForCausalLM", setup: Setup) -> float:
    """Count the FLOPs of a step, forward and backward: a multiply-add is 2, and backward is twice forward.

    Per byte, 6 for every parameter but the embedding's, which is looked up; and 12 x layers x width x window for attention's
    two products of activations (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B).
    """
    c = model.config
    n_params = sum(p.numel() for p in model.parameters()) - c.vocab_size * c.hidden_size
    attention = 12 * c.num_hidden_layers * c.hidden_size * setup.seq
    return float((6 * n_params + attention) * setup.batch * setup.seq)


def train(
    name: str,
    model: "LlamaForCausalLM",
    text: tuple[Tensor, Tensor],
    setup: Setup,
    stages: Stages,
    lr: float,
    seed: int,
    bars: "Progress",
) -> Run:
    """Train a model through its stages, growing it in place between them; both runs come through here."""
    optim = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    n_steps = sum(steps for _, steps in stages)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, schedule(n_steps))
    batches = torch.Generator().manual_seed(seed)
    done, clip, start = Run(name), CLIP, perf_counter()
    bar = bars.add_task(name, total=n_steps, loss="")
    for to, steps in stages:
        if to is not None:
            before = evaluate(model, text[1], setup)
            report = expand_inplace(model, optim, to=to, scheduler=scheduler, seed=seed)
            clip *= report.grad_norm_factor or 1.0
            done.growths.append(
                Growth(done.flops, label(report), before, evaluate(model, text[1], setup))
            )
            show_growth(report, done.growths[-1], bars)
        cost = flops_per_step(model, setup)
        for step in range(1, steps + 1):
            starts = torch.randint(len(text[0]) - setup.seq, (setup.batch,), generator=batches)
            loss = loss_at(model, text[0], starts, setup)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optim.step()
            scheduler.step()
            optim.zero_grad()
            done.steps, done.flops = done.steps + 1, done.flops + cost
            if step % max(1, steps * len(stages) // setup.n_points) == 0 or step == steps:
                done.curve.append((done.flops, evaluate(model, text[1], setup)))
            if done.steps % 10 == 0 or step == steps:
                bars.update(bar, completed=done.steps, loss=f"{float(loss.detach()):.3f}")
    done.seconds, done.n_params, done.loss = (
        perf_counter() - start,
        sum(p.numel() for p in model.parameters()),
        done.curve[-1][1],
    )
    return done


def schedule(n_steps: int) -> Callable[[int], float]:
    """Rise linearly, then fall by a cosine: the factor on the learning rate at every step."""
    n_warmup = max(1, round(WARMUP * n_steps))
    return lambda step: (
        min(1.0, (step + 1) / n_warmup)
        * (FLOOR + (1 - FLOOR) * (1 + cos(pi * min(1.0, step / n_steps))) / 2)
    )


def loss_at(model: "LlamaForCausalLM", text: Tensor, starts: Tensor, setup: Setup) -> Tensor:
    """Mean loss of predicting each next byte in the windows that begin at ``starts``, in nats per byte."""
    window = text[(starts[:, None] + torch.arange(setup.seq + 1)).to(text.device)].long()
    logits = model(input_ids=window[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: "LlamaForCausalLM", text: Tensor, setup: Setup) -> float:
    """Mean loss over windows spread evenly over the held-out text, always the same ones, in eval mode."""
    model.eval()
    starts = torch.arange(setup.n_eval) * ((len(text) - setup.seq - 1) // setup.n_eval)
    parts = [starts[i : i + EVAL_BATCH] for i in range(0, setup.n_eval, EVAL_BATCH)]
    loss = (
        sum(float(loss_at(model, text, part, setup)) * len(part) for part in parts) / setup.n_eval
    )
    model.train()
    return loss


def label(report: GrowthReport) -> str:
    """The first size that grew: ``width 64 → 128``."""
    name, n = next(
        (name, n) for name, n in report.source_sizes.items() if report.target_sizes[name] != n
    )
    return f"{'width' if name == 'hidden' else name} {n} → {report.target_sizes[name]}"


def show_growth(report: GrowthReport, growth: Growth, bars: "Progress") -> None:
    """Print the report, and the loss on either side of the growth; raise GrowthError when they differ."""
    moved = abs(growth.after - growth.before)
    row = growth.label, f"{growth.before:.7f}", f"{growth.after:.7f}", f"{moved:.1e}"
    bars.console.print(f"\n{report}\n", highlight=False, markup=False, soft_wrap=True)
    bars.console.print(_table(("growth", "validation loss before", "after", "difference"), [row]))
    if not moved <= TOLERANCE:  # a NaN is no pass
        raise GrowthError(
            f"{growth.label}: the validation loss went from {row[1]} to {row[2]}; growth may move it by {TOLERANCE:g}."
        )


def summary(runs: list[Run]) -> "Table":
    """The runs beside each other."""
    rows = [
        (
            r.name,
            f"{r.loss:.4f}",
            f"{r.flops:.3e}",
            f"{r.n_params:,}",
            f"{r.steps:,}",
            f"{r.seconds:.0f}",
        )
        for r in runs
    ]
    return _table(
        ("run", "validation loss (nats / byte)", "FLOPs", "parameters", "steps", "seconds"), rows
    )


def verdict(runs: list[Run]) -> str:
    """Say in two lines what was measured, whoever won."""
    grown = runs[0]
    if len(runs) == 1:
        labels = ", ".join(g.label for g in grown.growths)
        moved = max(abs(g.after - g.before) for g in grown.growths)
        return f"Grown while it trained: {labels}\nno growth moved the validation loss by more than {moved:.1e}"
    scratch = runs[1]
    losses = f"{grown.loss:.3f} against {scratch.loss:.3f} nats per byte"
    if not grown.loss < scratch.loss:
        return f"Growing did not beat the final size from scratch: {losses}\nat equal FLOPs"
    reached = next(flops for flops, loss in grown.curve if loss <= scratch.loss) / scratch.flops
    passed = f"the grown run passed from-scratch's final loss after {reached:.0%} of them"
    return f"Growing beat the final size from scratch: {losses}\nat equal FLOPs; {passed}"


def draw(runs: list[Run], path: Path) -> None:
    """Draw validation loss over training FLOPs, every growth marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=150, layout="tight")
    axes = figure.add_subplot()
    low = min(loss for r in runs for _, loss in r.curve)
    late = [
        loss for r in runs for flops, loss in r.curve if flops >= r.flops / 8
    ]  # the first fall would flatten the rest
    high = low + 1.25 * (max(late) - low) + 1e-3
    for r, color in zip(runs, ("#0969da", "#9a6700"), strict=False):
        tera = [flops / 1e12 for flops, _ in r.curve]
        text = f"{r.name}: {r.n_params / 1e6:.2f} M parameters at the end, {r.steps:,} steps"
        axes.plot(
            tera,
            [loss for _, loss in r.curve],
            "o-",
            color=color,
            markersize=3.5,
            linewidth=1.8,
            label=text,
        )
        axes.annotate(
            f"{r.loss:.3f}",
            (tera[-1], r.loss),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
        )
    for growth in runs[0].growths:
        axes.axvline(growth.flops / 1e12, color="#57606a", linestyle="--", linewidth=1)
        axes.annotate(
            growth.label,
            (growth.flops / 1e12, 0),
            (5, 8),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )
    axes.set(xlabel="training compute (10¹² FLOPs)", ylabel="validation loss (nats per byte)")
    axes.set(
        xlim=(0, 1.08 * max(r.flops for r in runs) / 1e12), ylim=(low - 0.15 * (high - low), high)
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=1, edgecolor="white")
    title, below = verdict(runs).split("\n")
    axes.set_title(title, loc="left", weight="bold", size=12.5, pad=26)
    axes.annotate(
        below,
        (0, 1),
        (0, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        color="#57606a",
    )
    figure.savefig(path)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> "Table":
    from rich.table import Table

    table = Table(*header, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table
