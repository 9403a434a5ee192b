"""Means of one tensor for several experts: new rows of an expert are the mean of its own rows, in every backend.

The oracle is a LayerNorm of the model: it sees the source's activations only where new coordinates are means.
"""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import growkern
from growkern import ModelSpec, embedding, linear, norm
from growkern.model.spec import AxisUse

HIDDEN, FFN = 6, 5


class Experts(nn.Module):
    """Experts that all run, between a LayerNorm and the residual stream."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Parameter(torch.randn(n, HIDDEN, FFN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(n, HIDDEN, FFN) / FFN**0.5 + torch.randn(n, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        units = torch.einsum("...h,ehf->...ef", self.norm(x), self.up).relu()
        return x + torch.einsum("...ef,ehf->...h", units, self.down)


class Model(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(7, HIDDEN), Experts(n)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(ids))))


def spec(n: int) -> ModelSpec:
    tensors = embedding("embed", rows="vocab", writes="residual")
    each = AxisUse("writer", ((n,),))
    tensors |= norm("block.norm", reads="residual", writes="residual:normed", kind="layer")
    tensors["block.up"] = (
        each,
        AxisUse("reader", (("residual:normed",),)),
        AxisUse("writer", (("ffn",),)),
    )
    tensors["block.down"] = (
        each,
        AxisUse("writer", (("residual",),)),
        AxisUse("reader", (("ffn",),)),
    )
    tensors |= norm("norm", reads="residual", writes="residual:final", kind="layer")
    tensors |= linear("head", reads="residual:final", writes="vocab", bias=False)
    return ModelSpec(
        family="Experts",
        sizes={"hidden": HIDDEN, "ffn": FFN, "vocab": 7},
        tensors=tensors,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("n", [3, 17])  # few runs of rows, and too many of them
@pytest.mark.parametrize("hidden", [12, 9])
def test_new_rows_of_an_expert_are_the_mean_of_its_rows(n, hidden, backend):
    model = Model(n).double()
    ids = torch.arange(7)
    before, sources = model(ids).detach(), copy.deepcopy(dict(model.named_parameters()))

    growkern.expand_inplace(model, to={"hidden": hidden, "ffn": FFN}, spec=spec(n), backend=backend)

    assert (model(ids) - before).abs().max() < 1e-12 * before.abs().max()
    down, own = model.block.down.detach(), sources["block.down"].detach()
    assert torch.equal(down[:, :HIDDEN], own)
    mean = own.mean(1, keepdim=True).expand(-1, hidden - HIDDEN, -1)
    torch.testing.assert_close(down[:, HIDDEN:], mean, rtol=1e-12, atol=0)


def test_a_language_model_with_layer_norms_and_experts_grows():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=80,
    )
    sizes |= dict(vocab_size=97, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    config = transformers.Cohere2MoeConfig(**sizes)
    config._experts_implementation = "eager"
    model = transformers.Cohere2MoeForCausalLM(config).double().eval()
    ids = torch.randint(4, 97, (2, 12))
    before = model(ids).logits

    growkern.expand_inplace(model, to={"hidden": 72})

    assert (model(ids).logits - before).abs().max() < 1e-6 * before.abs().max()
