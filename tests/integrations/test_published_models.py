"""The models of timm and litgpt grow in a training loop without a spec, as its first step describes them by their last call.

timm and litgpt are no dependencies of the tests (timm needs a torchvision built for this torch, litgpt pins other packages): without them,
``tests/training/test_published_loops.py`` runs loops of their shape.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from growkern import At, GrowthSchedule, width

STEPS, GROWTH = 6, 3


def vision_transformer() -> nn.Module:
    import timm

    sizes = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=4, num_classes=11)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)


def decoder(name: str) -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    own = dict(block_size=32, n_layer=2, n_embd=48, n_head=4, intermediate_size=80, vocab_size=97, padded_vocab_size=97)  # fmt: skip
    groups = {"n_query_groups": 2} if "Llama" in name else {}
    return GPT(Config.from_name(name, **own, **groups))


def run(model: nn.Module, inputs: Tensor, grows: bool) -> tuple[list[float], nn.Module]:
    """Train with an exponential average, and return the losses and the average."""
    model = model.double()
    optim = torch.optim.AdamW(model.parameters(), 1e-3)
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)
    if grows:
        event = At(step=GROWTH, to="2x", width=width.HyperClone(), dynamics="exact")
        GrowthSchedule([event]).attach(model, optim, ema=average)
    losses = []
    for step in range(STEPS):
        optim.zero_grad()
        out = model(inputs.roll(step, 0))
        loss = nn.functional.cross_entropy(out.flatten(0, -2), torch.arange(out[..., 0].numel()) % 7)  # fmt: skip
        loss.backward()
        optim.step()
        average.update_parameters(model)
        losses.append(float(loss.detach()))
    return losses, average.module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "pythia-14m", "Llama-3.2-1B"])
def test_a_published_model_trains_on_through_a_growth_without_a_spec(name):
    for package in ("timm", "torchvision") if name == "timm" else ("litgpt",):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    ids = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.float64) if name == "timm" else ids
    trained = []
    for grows in (False, True):
        torch.manual_seed(0)
        model = vision_transformer() if name == "timm" else decoder(name)
        losses, average = run(model, inputs, grows)
        with torch.no_grad():
            trained.append((losses, average.eval()(inputs), sum(p.numel() for p in model.parameters())))  # fmt: skip

    unbroken, grown = trained
    assert grown[2] > 2 * unbroken[2]
    assert grown[0] == pytest.approx(unbroken[0], rel=1e-6)  # litgpt's norms round to float32
    torch.testing.assert_close(grown[1], unbroken[1], rtol=0, atol=1e-5)
