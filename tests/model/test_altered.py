"""A model of a family that its owner has altered: its description does not see the alteration, so its growth is checked.

The oracle is the model's own forward.
"""

import types

import pytest
import torch
from models import batch, logits, make
from torch import nn

import growkern
from growkern.errors import CommitError


def softmax(model: nn.Module) -> None:
    model.model.layers[1].mlp.act_fn = nn.Softmax(-1)


def scaling(model: nn.Module) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


def forward(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    plain = type(mlp).forward

    def divided(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x) / self.up_proj.out_features

    mlp.forward = types.MethodType(divided, mlp)


@pytest.mark.parametrize("alter", [softmax, scaling, forward])
def test_a_growth_that_an_alteration_makes_wrong_is_taken_back(alter):
    model = make("llama", tied=False)
    alter(model)
    before, weights = logits(model, batch()), [p.detach().clone() for p in model.parameters()]

    with pytest.raises(CommitError, match="taken back"):
        growkern.expand_inplace(model, to={"ffn": "2x"})

    assert torch.equal(logits(model, batch()), before)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))


def test_an_alteration_that_changes_nothing_for_the_growth_passes():
    model = make("llama", tied=False)
    seen, mlp = list[int](), model.model.layers[0].mlp
    mlp.register_forward_hook(lambda *_: seen.append(1))
    plain = type(mlp).forward
    mlp.forward = types.MethodType(lambda self, x: plain(self, x), mlp)
    before = logits(model, batch())

    growkern.expand_inplace(model, to={"ffn": "2x", "layers": 3})

    assert seen and torch.allclose(logits(model, batch()), before, atol=1e-4)


def test_a_model_as_its_class_builds_it_is_not_run(monkeypatch):
    model = make("llama", tied=False)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("ran"))
    growkern.expand_inplace(model, to={"ffn": "2x"})
