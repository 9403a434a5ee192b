"""The steps of a growth in its report: every moment counts for the step that it was spent in."""

import pytest
from models import batch, make, train
from torch.optim import AdamW

import growkern
from growkern.engine import run as engine
from growkern.engine.forward_check import ForwardCheck
from growkern.execution import execute
from growkern.support import laps

STEPS = {
    "scan": (engine, "refuse_stale_references"),
    "describe": (engine, "describe"),
    "plan": (engine, "check_blocks"),
    "check": (ForwardCheck, "compare"),
    "cut": (execute.Tiler, "measure"),
    "write": (execute, "_run"),
    "commit": (engine.Ranks, "finish"),
}


@pytest.mark.parametrize("memory", ["stage", "lean"])
@pytest.mark.parametrize("step", STEPS)
def test_a_moment_counts_for_its_step(step, memory, monkeypatch):
    model = make("llama", tied=True)
    optim = AdamW(model.parameters())
    train(model, optim, 1)
    now = 0.0
    owner, name = STEPS[step]
    original = getattr(owner, name)

    def slow(*arguments, **options):
        nonlocal now
        now += 1.0
        return original(*arguments, **options)

    monkeypatch.setattr(laps, "perf_counter", lambda: now)
    monkeypatch.setattr(owner, name, slow)

    report = growkern.expand_inplace(model, optim, memory=memory, check=batch())

    others = [n for other, n in report.steps.items() if other != step]
    assert report.steps[step] >= 1 and not any(others) and report.seconds == report.steps[step]
    assert f"{step} 100%" in str(report)
