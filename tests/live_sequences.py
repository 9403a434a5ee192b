"""Random lives of a model: ``python tests/live_sequences.py [sequences] [first seed]`` grows, shrinks, trains, saves, loads and resumes.

Each sequence draws a family, an optimizer and a dozen actions from its seed, and checks after every action what has to hold for any model
and optimizer: the shapes are those of a model that stock transformers builds from the config, every state fits its parameter, every
parameter is trained once, the rates are the schedule's, and a growth that promises the function keeps the logits. A sequence that fails
prints its seed and its actions.
"""

import copy
import random
import sys
import tempfile
from pathlib import Path

import torch
from models import batch, logits, loss_of, make
from torch.optim.swa_utils import AveragedModel

import growkern
from growkern import depth, shrink, width
from growkern.errors import GrowthError

FAMILIES = "llama", "gpt2", "bert", "mixtral", "qwen3", "gpt_neox", "opt", "gemma2"
RATE = 1e-3
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=RATE),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=RATE, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9),
    "growkern": lambda groups: growkern.optim.AdamW(groups, lr=RATE),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=RATE),
}
WIDTHS = (
    width.Lossless(),
    width.Lossless(noise=1),
    width.FPI(maps="cyclic"),
    width.HyperClone(),
    width.Net2Wider(noise=0.1),
)
DEPTHS = depth.IdentityBlocks(), depth.Stack(), depth.Interpose(), depth.Fresh()
LARGEST = 100  # hidden size


class Life:
    """One sequence.

    Attributes:
        model: The model.
        optim: Its optimizer.
        scheduler: Its scheduler; None for a loop that sets the rates by hand.
        average: An average of the model, or None.
        start: The config at the start.
        done: The actions so far.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.folder, self.done = random.Random(seed), folder, list[str]()
        torch.manual_seed(seed)
        family = self.draw.choice(FAMILIES)
        self.model = make(family, tied=self.draw.random() < 0.5, seed=seed)
        self.kind, self.split = self.draw.choice([*OPTIMIZERS]), self.draw.random() < 0.5
        self.scheduled, self.steps = self.draw.random() < 0.5, 0
        self.start = copy.deepcopy(self.model.config)
        self.optim, self.scheduler = self.built(self.model)
        self.average: AveragedModel | None = None
        self.done.append(f"{family}, {self.kind}, scheduler {self.scheduled}")

    def built(self, model):
        """Build the optimizer and the scheduler of a model."""
        groups = [
            [p for p in model.parameters() if p.dim() > 1],
            [p for p in model.parameters() if p.dim() < 2],
        ]
        own = [{"params": params} for params in groups] if self.split else model.parameters()
        optim = OPTIMIZERS[self.kind](own)
        rule = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 1 / (1 + t))
        if self.scheduled:
            return optim, rule
        del rule
        for group in optim.param_groups:
            group["lr"] = RATE
        return optim, None

    # actions

    def train(self):
        """One step, with accumulation, autocast or gradient scaling."""
        self.optim.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=self.draw.random() < 0.3)
        for _ in range(self.draw.choice((1, 1, 2))):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.draw.random() < 0.3):
                loss = loss_of(self.model, batch(self.draw.randrange(99)))
            scaler.scale(loss).backward()
        if self.scheduler is None:
            for group in self.optim.param_groups:
                group["lr"] = RATE / (1 + self.steps)
        scaler.step(self.optim)
        scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.steps += 1

    def averaged(self):
        """Begin or end an average of the weights."""
        self.average = AveragedModel(self.model) if self.average is None else None

    def grow(self):
        """Grow width or depth by a method."""
        hidden = growkern.describe(self.model).sizes["hidden"]
        wide = hidden < LARGEST // 2 and self.draw.random() < 0.6
        to = "2x" if wide else {"layers": growkern.describe(self.model).sizes["layers"] + 1}
        self.changed(
            growkern.expand_inplace, to=to, width=self.draw.choice(WIDTHS) if wide else None,
            depth=None if wide else self.draw.choice(DEPTHS), dynamics=self.draw.choice(("mup", "exact", None)),
            state=self.draw.choice(("exact", "exact", "copy", "drop", "zero_pad")), memory=self.draw.choice(("stage", "lean")),
        )  # fmt: skip

    def shrink(self):
        """Shrink the width or the depth."""
        sizes = growkern.describe(self.model).sizes
        to = (
            "0.5x"
            if sizes["hidden"] >= 48 and self.draw.random() < 0.5
            else {"layers": sizes["layers"] - 1}
        )
        if to == "0.5x" or sizes["layers"] > 1:
            self.changed(
                growkern.shrink_inplace,
                to=to,
                method=self.draw.choice((shrink.WeightSelection(), shrink.FirstCopies())),
            )

    def changed(self, call, **options):
        """Grow or shrink; a refusal changes nothing, and what is promised holds."""
        before = logits(self.model.eval(), batch()).detach()
        shapes = [p.shape for p in self.model.parameters()]
        self.optim.zero_grad()
        source, its = copy.deepcopy((self.model, self.optim))
        its.load_state_dict(copy.deepcopy(self.optim.state_dict()))  # with its factors
        ema = self.average if self.average is not None else ()
        try:
            report = call(self.model, self.optim, scheduler=self.scheduler, ema=ema, **options)
        except GrowthError as error:
            assert [p.shape for p in self.model.parameters()] == shapes, error
            self.done[-1] += " (refused)"
        else:
            self.done[-1] += f" {options}"
            after = logits(self.model.eval(), batch()).detach()
            if report.preserves != "nothing":
                torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
            assert all("lr_factor" in group for group in self.optim.param_groups)
            if report.preserves == "trajectory":
                self.follows(source, its)
        self.model.train()

    def follows(self, source, optim):
        """Train the grown model and its source on the same batches: their losses agree."""
        losses = []
        for seed in range(3):
            losses.append([])
            for model, its in ((source.eval(), optim), (self.model, self.optim)):
                its.zero_grad()
                loss = loss_of(model, batch(seed))
                loss.backward()
                its.step()
                losses[-1].append(float(loss.detach()))
        assert all(abs(one - other) < 2e-3 * max(1.0, one) for one, other in losses), losses

    def save_and_load(self):
        """Go on with a new model of the config and a new optimizer, which load the state dicts; or replay the growths first."""
        at, replayed = self.folder / "life.pt", self.draw.random() < 0.5
        rule = None if self.scheduler is None else self.scheduler.state_dict()
        torch.save([self.model.state_dict(), self.optim.state_dict(), rule], at)
        expected, old = logits(self.model.eval(), batch()), (self.model, self.optim)
        weights, state, rule = torch.load(at, weights_only=True)
        split = len(self.optim.param_groups) != (2 if self.split else 1)
        if replayed or split:
            model = type(self.model)(copy.deepcopy(self.start))
            optim, scheduler = self.built(model)
            growkern.resume(model, optim, state, scheduler=scheduler, ema=())
            self.done[-1] += " (replayed)"
        else:
            model = type(self.model)(copy.deepcopy(self.model.config))
            optim, scheduler = self.built(model)
        model.load_state_dict(weights)
        optim.load_state_dict(state)
        if scheduler is not None:
            scheduler.load_state_dict(rule)
        torch.testing.assert_close(logits(model.eval(), batch()), expected, rtol=0, atol=0)
        self.model, self.optim, self.scheduler, self.average = model.train(), optim, scheduler, None
        ones = [loss_of(m, batch()) for m in (old[0].train(), model)]
        for loss, m, o in zip(ones, (old[0], model), (old[1], optim), strict=True):
            m.zero_grad()
            loss.backward()
            o.step()
        for p, q in zip(old[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)

    def compiled(self):
        """Run the forward of the compiled model."""
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend="eager")
        torch.testing.assert_close(
            logits(compiled, batch()), logits(self.model, batch()), rtol=1e-5, atol=1e-5
        )

    # what has to hold

    def check(self):
        """Compare model and optimizer with what stock transformers and torch make of the config."""
        model, optim = self.model, self.optim
        fresh = type(model)(copy.deepcopy(model.config))
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in fresh.named_parameters()
        }
        held = [id(p) for group in optim.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters()), (
            "a parameter is not trained once"
        )
        for p, state in optim.state.items():
            assert all(
                t.shape == p.shape
                for k, t in state.items()
                if k in ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum") and t is not None
            )
        now = RATE / (1 + self.steps) if self.scheduler is not None else RATE / max(1, self.steps)
        for group in optim.param_groups:
            assert abs(group["lr"] / group.get("lr_factor", 1.0) / now - 1) < 1e-6, (
                "a rate is not the schedule's"
            )
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if self.average is not None:
            assert [p.shape for p in self.average.module.parameters()] == [
                p.shape for p in model.parameters()
            ]

    def run(self, n: int = 12) -> None:
        """Live through ``n`` actions."""
        actions = {
            self.train: 6,
            self.grow: 4,
            self.shrink: 1,
            self.averaged: 1,
            self.save_and_load: 3,
            self.compiled: 0.1,
        }
        for action in self.draw.choices([*actions], [*actions.values()], k=n):
            self.done.append(action.__name__)
            action()
            self.check()


def live(seed: int) -> None:
    """Live one sequence; an error carries its actions."""
    with tempfile.TemporaryDirectory() as folder:
        life = Life(seed, Path(folder))
        try:
            life.run()
        except Exception as error:
            raise AssertionError(f"sequence {seed} failed after {life.done}") from error


def main(n: int = 2000, first: int = 0) -> int:
    """Live ``n`` sequences; print the failures and return their number."""
    failed = 0
    for seed in range(first, first + n):
        try:
            live(seed)
        except AssertionError as error:
            failed += 1
            print(
                error,
                "\n   ",
                type(error.__cause__).__name__,
                str(error.__cause__)[:300],
                flush=True,
            )
        if (seed - first + 1) % 100 == 0:
            print(f"{seed - first + 1} of {n} sequences, {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
