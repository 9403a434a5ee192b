"""In torchtune's recipe, two gloo processes grow and train as one process on the joined batch does, and resume.

The runs need torchtune, which is no dependency of the tests (it is archived, and wants torchao 0.13 at most); the tests of its RMSNorm,
which has a gain with the name ``scale`` and a cached shape, run without it.
"""

from dataclasses import replace
from importlib.util import find_spec

import processes
import pytest
import torch
from models import batch, make
from torch import nn

import growkern
from growkern import norm


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchtune") is None, reason="needs torchtune")
def test_torchtunes_recipe_grows_and_resumes(tmp_path):
    for world in (2, 1):
        folder, log = tmp_path / str(world), tmp_path / f"{world}.log"
        folder.mkdir()
        started = [
            processes.start("torchtune_worker", folder, rank, world, log=log)
            for rank in range(world)
        ]
        processes.end(started, log)
    alone = torch.load(tmp_path / "1" / "0.pt", weights_only=False)

    for rank in range(2):
        found = torch.load(tmp_path / "2" / f"{rank}.pt", weights_only=False)
        for key, n in {"unbroken": 15, "compiled": 15, "parallel": 15, ("resumed", 3): 12, ("resumed", 6): 9}.items():  # fmt: skip
            run, one = found[key], alone["parallel" if key == "parallel" else "unbroken"]
            assert run["kept"] and run["fired"] == ([n - 10] if n > 10 else [])
            # tensor parallel halves the counts of heads, which stay ints
            assert run["heads"] == {(4, 2, int) if key == "parallel" else (6, 3, int)}
            if rank == 0:  # the recipe logs in one process
                assert run["losses"] == pytest.approx(one["losses"][-n:], rel=0, abs=1e-9)
            assert run["weights"].keys() == one["weights"].keys()
            for name, p in one["weights"].items():
                torch.testing.assert_close(run["weights"][name], p, rtol=0, atol=1e-9, msg=name)


class RMSNorm(nn.Module):
    """A norm with the attributes of torchtune's."""

    def __init__(self, width: int, eps: float = 1e-2) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (width,), eps
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.scale, self.eps)


def norms_of(model: nn.Module) -> list[str]:
    return [f"blocks.{i}.ln_{k}" for i in range(len(model.blocks)) for k in (1, 2)] + ["ln_f"]


def with_norms() -> nn.Module:
    model = make("plain", tied=False)
    for name in norms_of(model):
        model.set_submodule(name, RMSNorm(24))
    return model.double()


def spec_of(model: nn.Module) -> growkern.ModelSpec:
    spec, tensors = model.spec(), dict[str, object]()
    for name in norms_of(model):
        writes = "residual:final" if name == "ln_f" else "residual:normed"
        described = norm(name, reads="residual", writes=writes, kind="rms")
        tensors[f"{name}.scale"] = described[f"{name}.weight"]
    others = {n: axes for n, axes in spec.tensors.items() if ".ln_" not in n and "ln_f" not in n}
    shapes = {f"{name}.normalized_shape": "hidden" for name in norms_of(model)}
    return replace(spec, tensors=others | tensors, attributes={**spec.attributes, **shapes})


def test_a_norm_with_a_gain_of_another_name_grows():
    model = with_norms()
    before = model(batch()).detach()

    growkern.expand_inplace(
        model, to={"hidden": 36, "layers": 3}, spec=spec_of(model), check=batch()
    )

    torch.testing.assert_close(model(batch()), before, rtol=0, atol=1e-9)
    assert model.ln_f.normalized_shape == (36,) and model.ln_f.eps != 1e-2


def test_a_norm_with_a_gain_of_another_name_grows_by_a_ramp():
    model = with_norms()
    optim = torch.optim.SGD(model.parameters(), lr=1e-3)
    width = growkern.width.CopyAndPad(norm="corrected")
    schedule = growkern.GrowthSchedule([growkern.At(step=1, to={"hidden": 36}, ramp=3, width=width)])  # fmt: skip
    schedule.attach(model, optim, spec=spec_of, check=False)
    seen = list[float]()
    for _ in range(6):
        model(batch()).square().mean().backward()
        optim.step()
        optim.zero_grad()
        seen.append(model.ln_f.eps)

    # the new coordinates are at 0 first: the mean of squares is over 24 of 36
    assert seen[0] < seen[1] < seen[-1] == pytest.approx(1e-2)
    assert schedule.fired == [1]


def test_a_cached_shape_that_the_spec_does_not_name_is_found_by_the_check():
    model = with_norms()
    spec = spec_of(model)
    kept = {name: size for name, size in spec.attributes.items() if "normalized" not in name}
    with pytest.raises(growkern.errors.CommitError, match=r"failed in blocks.0.ln_1.*attributes="):
        growkern.expand_inplace(model, to={"hidden": 36}, spec=replace(spec, attributes=kept), check=batch())  # fmt: skip
    assert model.ln_f.normalized_shape == (24,)
