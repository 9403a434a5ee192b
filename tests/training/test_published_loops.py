"""Published training loops run through a growth unedited: nanoGPT's, litgpt's and timm's, which all set the rates of their groups by hand.

Each loop follows its published script: param groups, schedule, accumulation, clipping, checkpoint. Under ``dynamics="exact"`` every loss
after the growth is the loss of the same loop without growth, so a rate that is lost at any step shows. The loops train a model of a known
family, and a user's own model, which is described by its last call.
"""

import math
from functools import partial

import pytest
import torch
from models import Plain, batch, exact_norms, logits, loss_of, make
from torch.nn.utils import clip_grad_norm_

import growkern
from growkern import At, GrowthSchedule, width

STEPS, GROWTH, STOP, RATE = 12, 4, 8, 5e-3
FAR = 1e6  # clipping threshold that no norm reaches: growth changes the norm, and the report says by how much


def cosine(step: int) -> float:
    """Linear warmup, then cosine decay to a tenth."""
    if step < 3:
        return RATE * (step + 1) / 4
    return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3))))


def by_decay(model):
    """Two param groups: matrices decay, vectors do not."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


class NanoGPT:
    """nanoGPT's train.py: AdamW by hand-set rates, GradScaler, gradient accumulation."""

    def __init__(self, model, folder):
        self.model, self.at, self.first = model, folder / "ckpt.pt", 0
        self.optim = torch.optim.AdamW(by_decay(model), lr=RATE, betas=(0.9, 0.95))

    def load(self, replay):
        checkpoint = torch.load(self.at, weights_only=True)
        replay(self.model, self.optim, checkpoint["optimizer"])
        self.model.load_state_dict(checkpoint["model"])
        self.optim.load_state_dict(checkpoint["optimizer"])
        self.first = checkpoint["iter_num"]

    def run(self, last):
        model, optim, losses = self.model, self.optim, []
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(self.first, last):
            for group in optim.param_groups:
                group["lr"] = cosine(step)
            for micro in range(2):
                loss = loss_of(model, batch(2 * step + micro)) / 2
                scaler.scale(loss).backward()
            scaler.unscale_(optim)
            clip_grad_norm_(model.parameters(), FAR)
            scaler.step(optim)
            scaler.update()
            optim.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        saved = {"model": model.state_dict(), "optimizer": optim.state_dict(), "iter_num": last}
        torch.save(saved, self.at)
        return losses


class LitGPT:
    """litgpt's pretrain.py: Fabric prepares, steps, clips and saves."""

    def __init__(self, model, folder):
        from lightning.fabric import Fabric

        self.fabric = Fabric(accelerator="cpu", devices=1)
        optim = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
        self.inner, (self.model, self.optim) = model, self.fabric.setup(model, optim)
        self.state = {"model": self.model, "optimizer": self.optim, "iter_num": 0}
        self.at = folder / "lit.ckpt"

    def load(self, replay):
        replay(self.model, self.optim, torch.load(self.at, weights_only=True)["optimizer"])
        self.fabric.load(self.at, self.state)

    def run(self, last):
        losses = []
        for step in range(self.state["iter_num"], last):
            for group in self.optim.param_groups:
                group["lr"] = cosine(step)
            loss = loss_of(self.model, batch(step))
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optim, max_norm=FAR)
            self.optim.step()
            self.optim.zero_grad()
            losses.append(float(loss.detach()))
        self.state["iter_num"] = last
        self.fabric.save(self.at, self.state)
        return losses


class Timm:
    """timm's train.py: its scheduler is no torch scheduler, and writes a rate per group from the rates of the start; it has an average."""

    def __init__(self, model, folder):
        self.model, self.at, self.first = model, folder / "last.pth.tar", 0
        self.ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
        )
        self.optim = torch.optim.AdamW(by_decay(model), lr=RATE)
        for group in self.optim.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_values = [group["initial_lr"] for group in self.optim.param_groups]

    def step_update(self, num_updates):
        values = [base * cosine(num_updates) / RATE for base in self.base_values]
        for group, value in zip(self.optim.param_groups, values, strict=True):
            group["lr"] = value * group.get("lr_scale", 1.0)

    def load(self, replay):
        checkpoint = torch.load(self.at, weights_only=True)
        replay(self.model, self.optim, checkpoint["optimizer"], ema=self.ema)
        self.model.load_state_dict(checkpoint["state_dict"])
        self.ema.load_state_dict(checkpoint["state_dict_ema"])
        self.optim.load_state_dict(checkpoint["optimizer"])
        self.first = checkpoint["epoch"]

    def run(self, last):
        losses = []
        for step in range(self.first, last):
            self.step_update(step)
            self.optim.zero_grad()
            loss = loss_of(self.model, batch(step))
            loss.backward()
            clip_grad_norm_(self.model.parameters(), FAR)
            self.optim.step()
            self.ema.update_parameters(self.model)
            losses.append(float(loss.detach()))
        state = {"state_dict": self.model.state_dict(), "optimizer": self.optim.state_dict()}
        torch.save(state | {"state_dict_ema": self.ema.state_dict(), "epoch": last}, self.at)
        return losses


def llama():
    return make("llama", tied=False).double()


def own():
    """A model that no family knows."""
    torch.manual_seed(0)
    return Plain(tied=False).double()


def grows(loop):
    """Attach a schedule to a loop's model and optimizer: the loop itself stays as it is."""
    event = At(step=GROWTH, to="2x", width=width.HyperClone(), dynamics="exact")
    return GrowthSchedule([event]).attach(loop.model, loop.optim, ema=getattr(loop, "ema", None))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*The Fabric.*")
@pytest.mark.parametrize("model", [llama, own], ids=lambda make: make.__name__)
@pytest.mark.parametrize("loop", [NanoGPT, LitGPT, Timm], ids=lambda kind: kind.__name__)
def test_a_published_loop_runs_through_a_growth_unedited_and_resumes(
    loop, model, tmp_path, monkeypatch
):
    exact_norms(monkeypatch)
    unbroken = loop(model(), tmp_path)
    expected = unbroken.run(STEPS)

    grown = loop(model(), tmp_path)
    grows(grown)
    losses = grown.run(STOP)
    rates = [group["lr"] for group in grown.optim.param_groups]
    assert losses == pytest.approx(expected[:STOP], rel=1e-9)
    assert rates == pytest.approx([cosine(STOP - 1)] * len(rates))
    n_groups = len(loop(model(), tmp_path).optim.param_groups)
    assert len(rates) == n_groups

    resumed = loop(model(), tmp_path)
    spec = partial(growkern.describe, inputs=batch()) if model is own else None
    resumed.load(partial(growkern.resume, spec=spec))
    assert resumed.run(STEPS) == pytest.approx(expected[STOP:], rel=1e-9)
    if loop is Timm:
        averages = [logits(run.ema.module, batch()) for run in (unbroken, resumed)]
        torch.testing.assert_close(averages[1], averages[0], rtol=0, atol=1e-9)
