"""A small training run whose compute is counted: a byte-level Llama under a warmup-stable-decay (WSD) schedule.

The trunk of a run trains at a constant learning rate. At any budget of FLOPs a branch can be annealed off the trunk: its
learning rate falls linearly to zero over the last quarter of the budget, and the held-out loss is measured there. Weights,
optimizer state and batches of the trunk are restored afterwards, so one trunk serves many budgets (Hu et al., "MiniCPM",
arXiv:2404.06395, section 4). ``growkern demo`` and ``bench.savings`` compare runs of this kind at equal FLOPs.
"""

# pyright: reportUnknownMemberType=false
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from growkern.api import expand_inplace
from growkern.engine.report import GrowthReport
from growkern.errors import GrowthError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HEAD_DIM = 32
EVAL_BATCH = 32  # windows per forward of an evaluation; bounds memory, changes no result
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
FAR = 10.0  # factor on the FLOPs of a curve's ends, beyond which nothing is extrapolated
HELD_OUT = 12  # every twelfth file is for validation

Corpus = tuple[Tensor, Tensor]  # bytes to train on, and bytes held out


@dataclass(frozen=True, slots=True)
class Training:
    """Training settings that all runs of a comparison share; only sizes and learning rate differ."""

    batch: int = 4  # windows in a step
    seq: int = 128  # bytes in a window
    warmup: int = 60  # steps in which the learning rate rises
    anneal: float = 0.25  # share of a budget's FLOPs over which the learning rate falls to zero
    clip: float = 1.0  # largest gradient norm
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    n_eval: int = 512  # held-out windows that an annealed loss is the mean of
    n_trunk: int = 64  # held-out windows that a loss of the trunk is the mean of


@dataclass(slots=True)
class Snapshot:
    """State of a trunk, from which the trunk can be restored or another run can start."""

    model: dict[str, Tensor]
    optims: list[dict[str, Any]]
    batches: Tensor
    counters: dict[str, float] = field(default_factory=dict[str, float])


class Run:
    """One model in training.

    Args:
        sizes: ``hidden`` and ``layers``.
        lr: Peak learning rate.
        seed: Seed of the initial weights, and of the batches: runs of equal seeds see equal batches.
        text: Training bytes and held-out bytes.
        training: Training settings that all runs of a comparison share.
        optimizer: ``"adamw"``, or ``"muon"``: ``torch.optim.Muon`` for the matrices of blocks, AdamW for the rest.

    Attributes:
        flops: FLOPs spent on training, in every phase.
        n_bytes: Bytes trained on.
    """

    def __init__(
        self, sizes: Mapping[str, int], lr: float, seed: int, text: Corpus, training: Training,
        *, optimizer: str = "adamw",
    ) -> None:  # fmt: skip
        self.lr, self.text, self.training, self.optimizer = lr, text, training, optimizer
        self.model = build(sizes, seed, text[0].device)
        self.optims = self._optimizers()
        self.batches = torch.Generator().manual_seed(1000 + seed)
        self.flops, self.n_bytes, self.n_steps, self.since = 0.0, 0, 0, 0
        self.clip, self.rate, self.rewarm = training.clip, 1.0, 0

    @property
    def n_params(self) -> int:
        """Parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def cost(self) -> float:
        """FLOPs of one step."""
        return flops_per_step(self.model, self.training)

    def step(self, end: float | None = None) -> float:
        """Train for one step and return its loss; with ``end``, on a schedule annealed to zero at ``end`` FLOPs."""
        t = self.training
        factor = self.rate * min(1.0, (self.n_steps + 1) / t.warmup)
        if self.rewarm:
            factor *= min(1.0, (self.since + 1) / self.rewarm)
        if end is not None:
            factor *= max(0.0, min(1.0, (end - self.flops) / (t.anneal * end)))
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.lr * factor * group.get("lr_factor", 1.0)
        starts = torch.randint(len(self.text[0]) - t.seq, (t.batch,), generator=self.batches)
        loss = loss_at(self.model, self.text[0], starts, t)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optim in self.optims:
            optim.step()
            optim.zero_grad()
        self.flops += self.cost
        self.n_bytes += t.batch * t.seq
        self.n_steps, self.since = self.n_steps + 1, self.since + 1
        return float(loss.detach())

    def train_until(self, flops: float) -> list[float]:
        """Train the trunk until ``flops`` are spent; return the losses of the steps."""
        losses: list[float] = []
        while self.flops < flops:
            losses.append(self.step())
        return losses

    def evaluate(self, n_windows: int | None = None) -> float:
        """Return the mean held-out loss in nats per byte, over a fixed set of windows."""
        return evaluate(self.model, self.text[1], self.training, n_windows or self.training.n_trunk)

    def annealed(self, end: float) -> tuple[float, float]:
        """Return FLOPs and held-out loss of a branch annealed to zero at the step nearest to ``end``; the trunk is restored."""
        here = self.snapshot()
        while self.flops + self.cost / 2 < end:
            self.step(end)
        point = self.flops, self.evaluate(self.training.n_eval)
        self.restore(here)
        return point

    def grow(self, *, rate: float = 1.0, rewarm: int = 0, **growth: Any) -> GrowthReport:
        """Grow in place, and go on training.

        Args:
            rate: Factor on all learning rates after the growth, beside the factors of ``dynamics="mup"``.
            rewarm: Steps over which the learning rate rises again from zero.
            growth: Arguments of ``growkern.expand_inplace``. Several optimizers are rebuilt without state.
        """
        if len(self.optims) > 1:
            growth.pop("state", None)
            self.optims.clear()
            report = expand_inplace(self.model, **growth)
            self.optims = self._optimizers()
        else:
            report = expand_inplace(self.model, self.optims[0], **growth)
        self.clip *= report.grad_norm_factor or 1.0
        self.rate, self.rewarm, self.since = self.rate * rate, rewarm, 0
        return report

    def snapshot(self) -> Snapshot:
        """Copy weights, optimizer state, batches and counters."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return Snapshot(
            {name: t.clone() for name, t in self.model.state_dict().items()},
            [_cloned(optim.state_dict()) for optim in self.optims],
            self.batches.get_state(),
            counters,
        )

    def restore(self, at: Snapshot) -> None:
        """Restore a snapshot of a model of the same sizes."""
        self.model.load_state_dict(at.model)
        for optim, state in zip(self.optims, at.optims, strict=True):
            optim.load_state_dict(_cloned(state))
        self.batches.set_state(at.batches)
        for name, value in at.counters.items():
            setattr(self, name, value)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        t = self.training
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": t.weight_decay}
        if self.optimizer == "adamw":
            return [
                torch.optim.AdamW(self.model.parameters(), betas=t.betas, fused=True, **options)
            ]
        named = [*self.model.named_parameters()]
        matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
        rest = [p for name, p in named if not (p.ndim == 2 and "layers." in name)]
        return [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW(rest, betas=t.betas, fused=True, **options),
        ]


@dataclass(frozen=True, slots=True)
class Growth:
    """One growth: FLOPs, label, and validation loss before and after."""

    flops: float
    label: str
    before: float
    after: float


@dataclass(slots=True)
class Line:
    """Record of one run.

    Attributes:
        curve: FLOPs and validation losses of the trunk, at a constant learning rate.
        starts: The points of the curve at which the annealed branches leave the trunk.
        ends: FLOPs and losses of the annealed branches, rising in FLOPs; the last is the run's end.
    """

    name: str
    n_params: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    starts: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    ends: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    growths: list[Growth] = field(default_factory=list[Growth])

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return self.ends[-1][0]

    @property
    def loss(self) -> float:
        """Annealed loss of the whole run, in nats per byte."""
        return self.ends[-1][1]


def parted(lines: list[Line]) -> tuple[Line, list[Line], Line]:
    """Split lines into the grown run, the runs from scratch (the lowest loss first) and the source that never grows."""
    grown, *scratch, never = lines
    return grown, sorted(scratch, key=lambda line: line.loss), never


def tuned(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """Return the lowest annealed loss at each budget: the curve of one size under the best of several learning rates."""
    return [
        min(points, key=lambda point: point[1])
        for points in zip(*(line.ends for line in lines), strict=True)
    ]


COUNTERS = ("flops", "n_bytes", "n_steps", "since", "clip", "rate", "rewarm")


def _cloned(state: Any) -> Any:
    """Copy a nested state dict with its tensors."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: _cloned(v) for k, v in state.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(state, list):
        return [_cloned(v) for v in state]  # pyright: ignore[reportUnknownVariableType]
    return state


def build(
    sizes: Mapping[str, int], seed: int, device: torch.device | str = "cpu"
) -> "LlamaForCausalLM":
    """Build a byte-level Llama with weights of variance 1 / width, the same on every device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = sizes["hidden"]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=hidden // HEAD_DIM,
        use_cache=False,
        initializer_range=hidden**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]


def flops_per_step(model: "LlamaForCausalLM", training: Training) -> float:
    """Count the FLOPs of a step, forward and backward: a multiply-add is 2, and backward is twice forward.

    A byte costs 6 FLOPs for every parameter outside of the embedding, which is a lookup, and 12 x layers x width x window for the
    two products of activations in attention (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B).
    """
    c = model.config
    n_params = sum(p.numel() for p in model.parameters()) - c.vocab_size * c.hidden_size
    attention = 12 * c.num_hidden_layers * c.hidden_size * training.seq
    return float((6 * n_params + attention) * training.batch * training.seq)


def loss_at(model: "LlamaForCausalLM", text: Tensor, starts: Tensor, training: Training) -> Tensor:
    """Return the mean next-byte loss of the windows that begin at ``starts``, in nats per byte."""
    window = text[(starts[:, None] + torch.arange(training.seq + 1)).to(text.device)].long()
    logits = model(input_ids=window[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: "LlamaForCausalLM", text: Tensor, training: Training, n_windows: int) -> float:
    """Return the mean loss over windows spread evenly over the held-out text, in eval mode."""
    model.eval()
    starts = torch.arange(n_windows) * ((len(text) - training.seq - 1) // n_windows)
    parts = [starts[i : i + EVAL_BATCH] for i in range(0, n_windows, EVAL_BATCH)]
    total = sum(float(loss_at(model, text, part, training)) * len(part) for part in parts)
    model.train()
    return total / n_windows


def flops_needed(curve: Sequence[tuple[float, float]], loss: float) -> tuple[float, bool]:
    """Return the FLOPs at which a curve reaches a loss, log-linear between its points and beyond them.

    Args:
        curve: FLOPs and losses; FLOPs rise. A point that is no lower than an earlier one is left out: it took more FLOPs for nothing.
        loss: The loss to look for.

    Returns:
        The FLOPs, and True if the loss lies outside of the curve, so that the FLOPs are extrapolated: by ``FAR`` at most, and not at
        all from a single point.
    """
    falling = [p for i, p in enumerate(curve) if all(p[1] < earlier[1] for earlier in curve[:i])]
    if len(falling) == 1:
        return falling[0][0], loss != falling[0][1]
    pairs = [*pairwise(falling)]
    inside = next((p for p in pairs if p[1][1] <= loss <= p[0][1]), None)
    (c0, l0), (c1, l1) = inside or (pairs[0] if loss > falling[0][1] else pairs[-1])
    need = log(c0) + (l0 - loss) / (l0 - l1) * (log(c1) - log(c0))
    least, most = log(falling[0][0] / FAR), log(falling[-1][0] * FAR)
    return exp(min(max(need, least), most)), inside is None


def read_corpus(n_bytes: int, device: str = "cpu") -> Corpus:
    """Read the source text of the running Python's library: bytes to train on, and held-out bytes from other files.

    Raises:
        GrowthError: Python's source text is not installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not NOT_LIBRARY & {*path.relative_to(root).parts}
    ]
    return read_files(files, n_bytes, device, f"Python's library in {root}")


def read_files(files: Sequence[Path], n_bytes: int, device: str, what: str) -> Corpus:
    """Read files until ``n_bytes`` are read; every twelfth file is held out.

    Raises:
        GrowthError: The training bytes or the held-out bytes are fewer than a hundredth of ``n_bytes``.
    """
    parts = bytearray(), bytearray()
    for i, path in enumerate(files):
        parts[i % HELD_OUT == 0].extend(path.read_bytes())
        if sum(map(len, parts)) >= n_bytes:
            break
    if min(map(len, parts)) < n_bytes // 100:
        raise GrowthError(f"the run trains on the text of {what}, which holds {len(files)} files.")
    train, held_out = (torch.frombuffer(part, dtype=torch.uint8).to(device) for part in parts)
    return train, held_out
