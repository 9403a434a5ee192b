"""Models of odd forwards: what tracing finds of them, and what the user reads where a size is fixed.

The oracle of a growth is the model's own forward.
"""

import types

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import growkern
from growkern.errors import PlanError, UnsupportedModelError
from growkern.model.tracing.mapped_weights import run_mapped
from growkern.model.tracing.permutation import rounds_as_far
from growkern.model.tracing.terms import Dim, cut, enumerated, same, segments, side_by_side
from growkern.model.tracing.traced import trace_model
from growkern.model.tracing.trial import Tensors

VOCAB, HIDDEN, N_LAYERS = 32, 32, 3
IDS = torch.arange(16).view(2, 8) % VOCAB


class Block(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)

    def mix(self, x: Tensor) -> Tensor:
        rows, length, n = x.shape
        split = (rows, length, self.heads, n // self.heads)
        q, k, v = (z.view(split).transpose(1, 2) for z in self.qkv(x).split(n, -1))
        own = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(own.transpose(1, 2).reshape(x.shape))

    def expand(self, x: Tensor) -> Tensor:
        return self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.down(F.gelu(self.expand(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, block: type[Block] = Block, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN)
        self.blocks = nn.ModuleList(block(heads) for _ in range(N_LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.double()

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))


class ByAttribute(Decoder):
    """Numbers its blocks by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.n_layer = N_LAYERS

    def run(self, x: Tensor) -> Tensor:
        for i in range(self.n_layer):
            x = self.blocks[i](x)
        return x


class ByConfig(Decoder):
    """Numbers its blocks by a field of a config that is none of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(n_layer=N_LAYERS, vocab=VOCAB)

    def run(self, x: Tensor) -> Tensor:
        for i in range(self.config.n_layer):
            x = self.blocks[i](x)
        return x


class ByLiteral(Decoder):
    """Numbers its blocks by a number in the code."""

    def run(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.blocks[i](x)
        return x


class Tuple(Decoder):
    """Keeps sizes in a tuple and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.dims, self.wide = (HIDDEN, 64), [64, 2]
        self.up, self.down = nn.Linear(HIDDEN, 64).double(), nn.Linear(64, HIDDEN).double()

    def run(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.dims[0])
        x = x + self.down(self.up(flat).view(*x.shape[:2], self.dims[1]).view(-1, self.wide[0])).view(x.shape)  # fmt: skip
        return super().run(x)


class LowRank(Block):
    """Adds a product of two weights to a weight."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.a, self.b = nn.Parameter(torch.randn(2, HIDDEN)), nn.Parameter(torch.randn(48, 2))

    def expand(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight + self.b @ self.a, self.up.bias)


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.first(x)).real


@pytest.mark.parametrize("kind", [ByAttribute, ByConfig])
def test_blocks_that_a_forward_counts_by_an_attribute_grow_with_it(kind):
    model = kind()
    before = model(IDS)

    growkern.expand_inplace(model, to={"layers": 5}, spec=growkern.describe(model, inputs=IDS))

    assert getattr(model, "config", model).n_layer == 5 == len(model.blocks)
    assert torch.allclose(model(IDS), before, rtol=0, atol=1e-12)
    nn.init.normal_(model.blocks[4].down.weight)
    assert not torch.allclose(model(IDS), before)  # the new blocks run


def test_every_size_in_a_tuple_or_list_grows():
    model = Tuple()
    before = model(IDS)

    spec = growkern.describe(model, inputs=IDS)
    growkern.expand_inplace(model, to="2x", spec=spec)

    assert (model.dims, model.wide) == ((2 * HIDDEN, 128), [128, 2])
    assert torch.allclose(model(IDS), before, rtol=0, atol=1e-12)


FIXED = {  # model -> size that cannot grow, and what the refusal says of it
    "blocks that the code counts": (
        ByLiteral, "layers", "unknown size 'layers': it cannot grow: blocks gains no blocks: its forward does not run a block more"),
    "one head": (lambda: Decoder(heads=1), "hidden", "one head is as long as hidden, and attention multiplies activations over it"),
    "a sum of weights": (
        lambda: Decoder(LowRank), "hidden", "unknown size 'hidden': it cannot grow: a matrix that the forward computes"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIXED)
def test_a_refusal_says_why_a_size_cannot_grow(case):
    make, size, why = FIXED[case]
    model = make()
    spec = growkern.describe(model, inputs=IDS)

    assert why.partition("it cannot grow: ")[2] in str(spec)
    with pytest.raises(PlanError, match=why):
        growkern.plan(model, to={size: "2x"}, spec=spec)


def test_a_model_without_a_size_that_grows_says_so():
    model = Fourier()
    spec = growkern.describe(model, inputs=torch.randn(2, 4))

    why = r"hidden cannot grow: no norm .*layers cannot grow: no ModuleList"
    with pytest.raises(
        PlanError, match=rf"equals its source \(no size was found that can grow\); print.* {why}"
    ):
        growkern.plan(model, to="2x", spec=spec)


def test_autocast_around_a_description_changes_nothing():
    model = Decoder().float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = growkern.describe(model, inputs=IDS)

    assert str(cast) == str(growkern.describe(Decoder().float(), inputs=IDS))


@pytest.mark.parametrize("path", ["", "blocks.1"])
def test_a_forward_that_keeps_modules_of_the_model_is_refused_by_name(path):
    model = Decoder()
    module = model.get_submodule(path)
    own = type(module).forward
    module.forward = lambda x: own(module, x)

    with pytest.raises(
        UnsupportedModelError,
        match=f"the forward of {path or 'the model'} is a function .*MethodType",
    ):
        growkern.describe(model, inputs=IDS)

    module.forward = types.MethodType(own, module)
    growkern.describe(model, inputs=IDS)


def test_a_family_with_a_module_of_its_owner_is_pointed_to_inputs():
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=66,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.gate = nn.Linear(24, 24)

    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.gate\.bias: .*growkern\.describe\(model, inputs=batch\)",
    ):
        growkern.expand_inplace(model, to="2x")


def test_two_towers_of_unlike_heads_grow_by_one_factor():
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(hidden_size=40, intermediate_size=80, num_hidden_layers=2, num_attention_heads=8)
    ids = dict(eos_token_id=1, bos_token_id=0, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=text | ids | dict(vocab_size=64, max_position_embeddings=16),
        vision_config=vision | dict(image_size=8, patch_size=4),
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).double().eval()
    sizes = growkern.describe(model).sizes

    assert (sizes["hidden"], sizes["heads"], sizes["head_dim"]) == (40, 8, 5)  # of one tower
    for to in ({"heads2": 8}, {"hidden2": 64}, {"hidden": 45}):
        with pytest.raises(PlanError, match="both grow by one factor"):
            growkern.plan(model, to=to)
    assert growkern.plan(model, to="2x").target_sizes["heads2"] == 8


class PaddedVocabulary(Decoder):
    """The logits of entries that are no tokens are minus infinity."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids).clone()
        logits[..., -7:] = -float("inf")
        return logits


@pytest.mark.parametrize("to", ["2x", {"layers": 4}], ids=str)
def test_logits_that_are_infinite_grow(to):
    model = PaddedVocabulary().double()
    before = model(IDS)

    growkern.expand_inplace(model, to=to, spec=growkern.describe(model, inputs=IDS))

    after = model(IDS)
    assert torch.equal(after.isfinite(), before.isfinite()) and not before.isfinite().all()
    assert torch.allclose(after, before, rtol=0, atol=1e-9)


def test_rounding_under_autocast_is_no_proof_against_a_description():
    model = Decoder().float()

    def low(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(IDS)

    found = trace_model(model, IDS)
    own = Tensors(found.weights, found.roles.tensors, found.roles.ties)
    before = {given: run_mapped(model, given, own, {}) for given in (low, IDS)}
    assert rounds_as_far(model, low, own, before[low], 2e-3)
    assert not rounds_as_far(model, IDS, own, before[IDS], 2e-3)
    assert not rounds_as_far(model, low, own, before[low], 0.1)


TEXT = dict(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_hidden_layers=2, vocab_size=97,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)
NUMBERS = {  # configs that say by their numbers which blocks are of which kind
    "Qwen2Moe": dict(mlp_only_layers=[0, 1], shared_expert_intermediate_size=20, **TEXT | EXPERTS),
    "Llama4": dict(intermediate_size_mlp=48, head_dim=8, num_local_experts=4, **TEXT),
    "Bamba": dict(attn_layer_indices=[0, 1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, **TEXT),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_blocks_whose_kind_follows_from_their_number_are_not_added(name):
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**NUMBERS[name])).double().eval()

    with pytest.raises(PlanError, match="no field of the config counts its blocks"):
        growkern.expand_inplace(model, to={"layers": 3})


def by_same(n: int) -> Dim:
    first = Dim(n)
    same(side_by_side([first, Dim(2)]), enumerated(n + 2))
    return first


def by_cut(n: int) -> Dim:
    first = Dim(n)
    cut(side_by_side([first, Dim(2)]), [1] * (n + 2))
    return first


def by_loop(n: int) -> Dim:
    dim = Dim(n)
    for i in range(n):
        cut(dim, [i, 1, n - i - 1])
    return dim


@pytest.mark.parametrize("how", [by_same, by_cut, by_loop])
def test_a_dimension_is_cut_into_any_number_of_segments(how):
    segments_of = segments(how(700))

    assert [s.size for s in segments_of] == [1] * 700


def test_a_text_that_is_padded_to_a_long_block_is_traced():
    torch.manual_seed(0)
    sizes = dict(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=40, decoder_layers=1, decoder_attention_heads=4)  # fmt: skip
    sizes |= dict(decoder_ffn_dim=40, d_model=32, vocab_size=97, num_global_tokens=4)
    config = transformers.PegasusXConfig(**sizes)
    assert config.block_size == 512
    model = transformers.PegasusXForConditionalGeneration(config).double().eval()
    ids = torch.randint(4, 97, (2, 12))
    before = model(ids, decoder_input_ids=ids).logits

    growkern.expand_inplace(model, to={"ffn": 60})

    after = model(ids, decoder_input_ids=ids).logits
    assert (after - before).abs().max() < 1e-6 * before.abs().max()
