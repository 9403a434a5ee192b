"""A run that grows: a byte-level Llama learns Python's own library, doubles its width, gains layers and trains on.

Beside it trains a model of the final size from scratch: the same code, text, batches, schedule, clipping and FLOPs; only its
learning rate is its own. The verdict is read off the two runs.
"""

import copy
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from growkern.api import expand_inplace
from growkern.errors import GrowthError
from growkern.report import GrowthReport

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from transformers import LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-4  # nats by which a growth may move the validation loss
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # not the library
SKIPPED |= {"encodings", "pydoc_data"}  # tables and prose, not source text
HELD_OUT = 12  # every twelfth file is for validation
HEAD_DIM = 32
FLOOR = 0.1  # of the peak learning rate, at the end of the cosine
WARMUP = 0.1  # of the steps
EVAL_BATCH = 32  # windows at a time; bounds memory, changes no result


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes and training of the demo.

    Attributes:
        hidden: Width of the source.
        layers: Its blocks.
        stages: What to grow to, if anything, and the steps to train from there.
        lr: Peak learning rate of the grown run; growth scales it where its law says so.
        scratch_lr: Peak learning rate from scratch: the best of those tried.
        batch: Windows in a step.
        seq: Bytes in a window.
        n_eval: Windows that the validation loss is the mean of.
        n_points: Validation losses on a curve, about.
        n_bytes: Source text to read, in bytes.
    """

    hidden: int = 64
    layers: int = 4
    stages: tuple[tuple[str | Mapping[str, int | str] | None, int], ...] = ((None, 1800), ("2x", 500), ({"layers": 6}, 300))
    lr: float = 4e-3
    scratch_lr: float = 2e-3
    batch: int = 4
    seq: int = 128
    n_eval: int = 128
    n_points: int = 16
    n_bytes: int = 6_000_000


QUICK = Setup(hidden=32, layers=2, stages=((None, 30), ("2x", 10), ({"layers": 3}, 10)), n_eval=8, n_points=5, n_bytes=300_000)


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
    curve: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    growths: list[Growth] = field(default_factory=list[Growth])

    @property
    def loss(self) -> float:
        """The last validation loss, in nats per byte."""
        return self.curve[-1][1]


def run(out: Path, *, seed: int = 0, compare: bool = True, device: str = "cpu", setup: Setup | None = None) -> Path:
    """Train, grow, train on, compare, and draw.

    Args:
        out: Folder of the picture; made when it is missing.
        seed: Of weights, batches and growth noise.
        compare: Train a model of the final size from scratch too, at equal FLOPs.
        device: Where to train, as torch names it.
        setup: Sizes and training; the full demo when None.

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

    setup = setup or Setup()
    out.mkdir(parents=True, exist_ok=True)
    text = read_corpus(setup.n_bytes, device)
    console = Console()
    console.print(f"{len(text[0]):,} bytes of Python's library to train on, {len(text[1]):,} held out, on {device}")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setup.hidden,
        intermediate_size=setup.hidden * 11 // 4,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.hidden // HEAD_DIM,
        num_key_value_heads=setup.hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=setup.seq,
        tie_word_embeddings=False,
        use_cache=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        model = build(config, seed, device)
        runs = [train("grown", model, text, setup, setup.stages, setup.lr, seed, progress)]
        if compare:
            final = build(copy.deepcopy(model.config), seed, device)  # the config has grown with the model
            n_steps = max(1, round(runs[0].flops / flops_per_step(final, setup)))
            runs.append(train("from scratch", final, text, setup, ((None, n_steps),), setup.scratch_lr, seed, progress))
    console.print(summary(runs))
    console.print(verdict(runs), highlight=False)
    path = draw(runs, out / "loss.png")
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return path


def read_corpus(n_bytes: int, device: str) -> tuple[Tensor, Tensor]:
    """Read the source text of the Python that runs this: bytes to train on, and of other files, bytes held out.

    Raises:
        GrowthError: There is too little of it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts = bytearray(), bytearray()
    files = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
    for i, path in enumerate(files):
        parts[i % HELD_OUT == 0].extend(path.read_bytes())
        if sum(map(len, parts)) >= n_bytes:
            break
    if min(map(len, parts)) < n_bytes // 100:
        raise GrowthError(f"the demo trains on the source text of Python's library, and {root} holds {len(files)} files of it.")
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
    config = model.config
    n_params = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * HEAD_DIM * setup.seq
    return float((6 * n_params + attention) * setup.batch * setup.seq)


def train(
    name: str,
    model: "LlamaForCausalLM",
    text: tuple[Tensor, Tensor],
    setup: Setup,
    stages: tuple[tuple[str | Mapping[str, int | str] | None, int], ...],
    lr: float,
    seed: int,
    progress: "Progress",
) -> Run:
    """Train a model through its stages, growing it in place between them; both runs come through here.

    Raises:
        GrowthError: A growth moved the validation loss.
    """
    optim = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    n_steps = sum(steps for _, steps in stages)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, schedule(n_steps))
    batches = torch.Generator().manual_seed(seed)
    done, clip, start = Run(name), 1.0, perf_counter()
    bar = progress.add_task(name, total=n_steps, loss="")
    for to, steps in stages:
        if to is not None:
            before = evaluate(model, text[1], setup)
            report = expand_inplace(model, optim, to=to, scheduler=scheduler, seed=seed)
            clip *= report.grad_norm_factor or 1.0
            done.growths.append(Growth(done.flops, label(report), before, evaluate(model, text[1], setup)))
            show_growth(report, done.growths[-1], progress)
        cost = flops_per_step(model, setup)
        for step in range(1, steps + 1):
            starts = torch.randint(len(text[0]) - setup.seq, (setup.batch,), generator=batches)
            loss = loss_at(model, text[0], starts, setup)
            loss.backward()
            clip_grad_norm_(model.parameters(), clip)
            optim.step()
            scheduler.step()
            optim.zero_grad()
            done.steps, done.flops = done.steps + 1, done.flops + cost
            if done.steps % max(1, n_steps // setup.n_points) == 0 or step == steps:
                done.curve.append((done.flops, evaluate(model, text[1], setup)))
            if done.steps % 10 == 0 or step == steps:
                progress.update(bar, completed=done.steps, loss=f"{float(loss):.3f}")
    done.seconds, done.n_params = perf_counter() - start, sum(p.numel() for p in model.parameters())
    return done


def schedule(n_steps: int) -> Callable[[int], float]:
    """Rise linearly, then fall by a cosine: the factor on the learning rate at every step."""
    n_warmup = max(1, round(WARMUP * n_steps))
    return lambda step: min(1.0, (step + 1) / n_warmup) * (FLOOR + (1 - FLOOR) * (1 + cos(pi * min(1.0, step / n_steps))) / 2)


def loss_at(model: "LlamaForCausalLM", text: Tensor, starts: Tensor, setup: Setup) -> Tensor:
    """Mean loss of predicting each next byte in the windows that begin at ``starts``, in nats per byte."""
    window = text[(starts[:, None] + torch.arange(setup.seq + 1)).to(text.device)].long()
    logits = model(input_ids=window[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: "LlamaForCausalLM", text: Tensor, setup: Setup) -> float:
    """Mean loss over windows spread evenly over the held-out text, always the same ones, in eval mode."""
    model.eval()
    starts = torch.arange(setup.n_eval) * ((len(text) - setup.seq - 1) // setup.n_eval)
    losses = [float(loss_at(model, text, part, setup)) * len(part) for part in starts.split(EVAL_BATCH)]
    model.train()
    return sum(losses) / setup.n_eval


def label(report: GrowthReport) -> str:
    """The first size that grew: ``width 64 → 128``."""
    name, n = next((name, n) for name, n in report.source_sizes.items() if report.target_sizes[name] != n)
    return f"{ {'hidden': 'width'}.get(name, name)} {n} → {report.target_sizes[name]}"


def show_growth(report: GrowthReport, growth: Growth, progress: "Progress") -> None:
    """Print the report, and the loss on either side of the growth.

    Raises:
        GrowthError: The two losses differ by more than the tolerance.
    """
    moved = abs(growth.after - growth.before)
    show = progress.console.print
    show(f"\n{report}\n", highlight=False, markup=False, soft_wrap=True)
    rows = [(growth.label, f"{growth.before:.7f}", f"{growth.after:.7f}", f"{moved:.1e}")]
    show(_table(("growth", "loss before", "loss after", "difference"), rows))
    if not moved <= TOLERANCE:  # a NaN is no pass
        raise GrowthError(f"{growth.label} moved the validation loss from {growth.before:.7f} to {growth.after:.7f}; {TOLERANCE:g} is allowed.")


def summary(runs: list[Run]) -> "Table":
    """The runs beside each other."""
    rows = [(r.name, f"{r.loss:.4f}", f"{r.flops:.3e}", f"{r.n_params:,}", f"{r.steps:,}", f"{r.seconds:.0f}") for r in runs]
    return _table(("run", "validation loss (nats / byte)", "FLOPs", "parameters", "steps", "seconds"), rows)


def verdict(runs: list[Run]) -> str:
    """Say in two lines what was measured, whoever won."""
    grown = runs[0]
    if len(runs) == 1:
        moved = max(abs(g.after - g.before) for g in grown.growths)
        return f"Grown in mid-run: {', then '.join(g.label for g in grown.growths)}\nno growth moved the validation loss by more than {moved:.1e}"
    scratch = runs[1]
    if not grown.loss < scratch.loss:
        return f"Growing did not pay here\n{grown.loss:.3f} nats per byte, {scratch.loss:.3f} from scratch, at equal FLOPs"
    reached = next(flops for flops, loss in grown.curve if loss <= scratch.loss)
    share = f"it was at from-scratch's final loss after {reached / scratch.flops:.0%} of from-scratch's FLOPs"
    return f"Growing wins by {scratch.loss - grown.loss:.3f} nats per byte at equal FLOPs\n{grown.loss:.3f} against {scratch.loss:.3f}; {share}"


def draw(runs: list[Run], path: Path) -> Path:
    """Draw validation loss over training FLOPs, every growth marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=150, layout="tight")
    axes = figure.add_subplot()
    low = min(loss for r in runs for _, loss in r.curve)
    late = [loss for r in runs for flops, loss in r.curve if flops >= r.flops / 10]  # the first fall would flatten the rest
    high = low + 1.25 * (max(late) - low) + 1e-3
    for r, color in zip(runs, ("#0969da", "#9a6700"), strict=False):
        tera = [flops / 1e12 for flops, _ in r.curve]
        text = f"{r.name}: {r.n_params / 1e6:.2f} M parameters at the end, {r.steps:,} steps"
        axes.plot(tera, [loss for _, loss in r.curve], "o-", color=color, markersize=3.5, linewidth=1.8, label=text)
        axes.annotate(f"{r.loss:.3f}", (tera[-1], r.loss), (6, 0), textcoords="offset points", va="center", color=color, weight="bold")
    for growth in runs[0].growths:
        axes.axvline(growth.flops / 1e12, color="#57606a", linestyle="--", linewidth=1)
        axes.annotate(growth.label, (growth.flops / 1e12, high), (-4, -8), textcoords="offset points", rotation=90, ha="right", va="top")
    axes.set_ylim(low - 0.08 * (high - low), high)
    axes.set_xlim(0, 1.08 * max(r.flops for r in runs) / 1e12)
    axes.set_xlabel("training compute (10¹² FLOPs)")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    title, below = verdict(runs).split("\n")
    figure.suptitle(title, x=0.02, ha="left", weight="bold", size=13)
    axes.set_title(below, loc="left", size=10, color="#57606a")
    figure.savefig(path)
    return path


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> "Table":
    from rich.table import Table

    table = Table(*header, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table
