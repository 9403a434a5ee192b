"""A fault at any line of the writing leaves the source or the target: found by counting lines, so that no line is left out."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import make, train
from states import same, state_of

import growkern
from growkern import width

ROOT = Path(growkern.__file__).parent
FILES = {
    str(ROOT / name)
    for name in (
        "commit/commit.py",
        "commit/undo.py",
        "commit/param_groups.py",
        "commit/optimizer.py",
        "optimizer/update_scale.py",
        "optimizer/factors.py",
    )
}
SIZES = dict(num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=4)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=1)
ROLLBACK = {"rollback", "back"}  # functions of undo.py that a fault must not stop: other tests


class Fault(BaseException):
    """Not an Exception, so that no code takes it for a failure that it knows."""


class Tracer:
    """Counts how often each line of the files runs, and raises a ``Fault`` at a line when it has run ``n`` times."""

    def __init__(self, line="", n=0):
        self.at, self.n, self.counts = line, n, Counter()

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code.co_filename not in FILES or code.co_name in ROLLBACK:
            return None
        return self.line

    def line(self, frame, event, arg):
        if event == "line":
            line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            self.counts[line] += 1
            if line == self.at and self.counts[line] == self.n:
                sys.settrace(None)
                raise Fault(line)
        return self.line

    def growth(self, run, plan):
        """Grow under this tracer; return True when the fault was raised, and came out of the growth."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            run.grow(plan)
        except Fault:
            return True
        finally:
            sys.settrace(before)
        return False


class Run:
    """A model with an average, an AdamW of two groups and a scheduler, in the middle of a run."""

    def __init__(self):
        self.model = make("llama", tied=True, **SIZES)
        params = [*self.model.parameters()]
        groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.1}]
        self.optim = torch.optim.AdamW(groups, lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optim, 100)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        train(self.model, self.optim, 2)

    def state(self):
        """Return everything that a growth may change."""
        average = [
            (n, id(t), t.clone()) for n, t in self.average.state_dict(keep_vars=True).items()
        ]
        hooks = (
            self.optim._optimizer_step_pre_hooks,
            self.optim._optimizer_load_state_dict_pre_hooks,
        )
        return (
            state_of(self.model, self.optim, self.scheduler), average, [[*h] for h in hooks],
            [*self.model._load_state_dict_pre_hooks],
        )  # fmt: skip

    def grow(self, plan=None, **options):
        return growkern.expand_inplace(
            self.model, self.optim, plan=plan, scheduler=self.scheduler, ema=self.average, **options
        )


@pytest.mark.slow
def test_a_fault_at_any_line_leaves_the_source_or_the_target():
    run, counter = Run(), Tracer()
    # uneven shares: the factors of some tensors are numbers (groups are split), of others vectors (UpdateScale)
    plan = growkern.plan(run.model, to={"hidden": 16, "layers": 2}, width=width.Lemon())
    counter.growth(run, plan)
    run, wrong = Run(), []
    source = run.state()

    for line, n in [(line, n) for line, last in counter.counts.items() for n in {1, last}]:
        if not Tracer(line, n).growth(run, plan):
            wrong.append(f"{line}, time {n}: another growth than before")
        elif same(run.state(), source):
            continue
        elif not grown(run):
            wrong.append(f"{line}, time {n}: between source and target")
        run = Run()
        source = run.state()

    assert wrong == []
    assert {line.partition(":")[0] for line in counter.counts} == {
        Path(name).name for name in FILES
    }
    assert not Tracer().growth(run, plan) and grown(run)


def grown(run):
    """True when model, average and optimizer are the target: they train, and grow once more."""
    sizes = {name: tuple(p.shape) for name, p in run.model.named_parameters()}
    held = {id(p) for group in run.optim.param_groups for p in group["params"]}
    if (
        run.model.config.hidden_size != 16
        or len(run.model.model.layers) != 2
        or held != {id(p) for p in run.model.parameters()}
        or sizes != {name: tuple(p.shape) for name, p in run.average.module.named_parameters()}
        or any(s["exp_avg"].shape != p.shape for p, s in run.optim.state.items())
    ):
        return False
    train(run.model, run.optim, 1)
    run.grow(to={"hidden": 32})
    return run.model.config.hidden_size == 32
