"""A model described by one forward: hand-written specs of the families, and the forward of the grown model, are the oracles."""

import re
import threading
from dataclasses import dataclass, replace

import families_oracle
import pytest
import torch
import transformers
import zoo
from models import FAMILIES, VOCAB, batch, inputs, logits, make, spec_of
from torch import Tensor, nn

import growkern
from growkern.errors import CommitError, PlanError, UnsupportedModelError
from growkern.model.size_values import space_of, space_size
from growkern.model.spec import AxisUse, ModelSpec
from growkern.model.tracing import hollow
from growkern.model.tracing.permutation import permutation_error
from growkern.model.tracing.terms import Dim, atoms, enumerated, product
from growkern.model.tracing.traced import trace_model
from growkern.model.tracing.trial import Tensors

LENGTH = 12


def example(model: nn.Module):
    """Return a batch for a model of tests/models.py, as the model is called."""
    ids = batch()
    given = inputs(model, ids)
    if isinstance(given, Tensor):
        return given.double() if given.is_floating_point() else given
    return given


class Mixer(nn.Module):
    """Attention of a user's decoder: heads are split by an attribute, and one layer computes queries, keys and values."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.n_head, self.width = n_head, width

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.to_qkv(x).split(self.width, dim=2)
        q, k, v = (
            t.view(rows, length, self.n_head, width // self.n_head).transpose(1, 2) for t in parts
        )
        scores = (q @ k.transpose(-2, -1)) * (k.shape[-1] ** -0.5)
        later = torch.ones(length, length).triu(1).bool()
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.to_out(mixed.transpose(1, 2).contiguous().view(rows, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = Mixer(width, n_head)
        self.net = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before(x))
        return x + self.net(self.between(x))


class Decoder(nn.Module):
    """A user's own decoder, of which growkern has no spec: learned positions, tied head, loss beside the logits."""

    def __init__(self, width: int = 48, n_head: int = 4, n_layer: int = 2) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "tokens": nn.Embedding(VOCAB, width),
                "places": nn.Embedding(64, width),
                "layers": nn.ModuleList(Layer(width, n_head) for _ in range(n_layer)),
                "last": nn.LayerNorm(width),
            }
        )
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.body["tokens"].weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(ids.shape[1]))
        for layer in self.body["layers"]:
            x = layer(x)
        out = self.head(self.body["last"](x))
        loss = None
        if targets is not None:
            loss = nn.functional.cross_entropy(out.view(-1, out.shape[-1]), targets.view(-1))
        return out, loss


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def decoder(kind: type[nn.Module] = Decoder) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


# ---- families: the spec by hand is the oracle


def plain(spec: ModelSpec, axis: AxisUse, free: set[str]) -> list[object]:
    """Return an axis as its role and its segments, with fixed sizes as numbers and spaces without their streams."""
    segments = list[object]()
    for segment in axis.segments:
        n, names = 1, list[object]()
        for c in segment:
            parts = c if isinstance(c, tuple) else (c,)
            spaces = tuple(space_of(s) for s in parts if isinstance(s, str) and _size(s) in free)
            n *= 1 if spaces else space_size(c, spec.sizes)
            names += [spaces] if spaces else []
        segments.append((*names, n))
    grows = any(len(s) > 1 for s in segments)
    return [axis.role, segments] if grows else [sum(s[0] for s in segments)]


def _size(stream: str) -> str:
    name = re.sub(r"\d*(\..*)?$", "", space_of(stream))
    return {"residual": "hidden", "group": "heads"}.get(name, name)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_traced_spec_equals_the_family(family):
    model = make(family, tied=True)
    by_hand = growkern.describe(model, spec_of(model) or families_oracle.by_hand(model))
    traced = growkern.describe(model, inputs=example(model))

    renamed: dict[object, object] = {}
    temporary = by_hand.tensors.keys() - traced.tensors.keys()
    assert not temporary & model.state_dict().keys()
    for name, axes in by_hand.tensors.items():
        if name in temporary:
            continue
        for i, (own, found) in enumerate(zip(axes, traced.tensors[name], strict=True)):
            a, b = plain(by_hand, own, FREE), plain(traced, found, FREE)
            assert str(skeleton(a)) == str(skeleton(b)), (name, i, str(own), str(found))
            for x, y in zip(names_in(b), names_in(a), strict=True):
                assert renamed.setdefault(x, y) == y, (name, i, x, y)
    assert {frozenset(t) for t in traced.ties.items()} == {
        frozenset(t) for t in by_hand.ties.items()
    }
    assert not {"hidden", "heads", "ffn"} & traced.fixed.keys()
    powers = {p for p in by_hand.activation_scales.values() if p.size == "hidden"}
    assert {*traced.activation_scales.values()} == powers


FREE = {"hidden", "heads", "kv_heads", "ffn"}


def skeleton(x: object) -> object:
    """Return a nested list with the names of spaces replaced by their sizes."""
    if isinstance(x, list | tuple):
        return [skeleton(y) for y in x]
    return _size(x) if isinstance(x, str) and x not in ("writer", "reader", "gain") else x


def names_in(x: object) -> list[str]:
    if isinstance(x, list | tuple):
        return [n for y in x for n in names_in(y)]
    return [x] if isinstance(x, str) and x not in ("writer", "reader", "gain") else []


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "opt", "mixtral", "gemma2", "t5"])
def test_family_grows_by_its_traced_spec(family):
    model = make(family, tied=True).double()
    before, spec = logits(model, batch()), growkern.describe(model, inputs=example(model))

    growkern.expand_inplace(model, spec=spec, to="2x")

    error = (logits(model, batch()) - before).abs().max() / before.abs().max()
    assert error < 1e-6  # norms of transformers round to float32
    again = type(model)(model.config).double()
    again.load_state_dict(model.state_dict())
    assert (logits(again, batch()) - before).abs().max() / before.abs().max() < 1e-6


@pytest.mark.parametrize(
    "family",
    ["gpt2", "opt", "llama", "qwen3", "bert", "vit", "modernbert", "plain", "gemma2", "t5"],
)
def test_growth_by_a_traced_spec_is_bitwise_that_by_the_family(family):
    grown = list[dict[str, Tensor]]()
    for traced in (False, True):
        model = make(family, tied=True).double()
        optim = torch.optim.AdamW(model.parameters(), 1e-3)
        given = example(model)
        out = model(**given) if isinstance(given, dict) else model(given)
        (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
        optim.step()
        by_hand = spec_of(model) or families_oracle.by_hand(model)
        spec = growkern.describe(model, inputs=given) if traced else by_hand

        growkern.expand_inplace(model, optim, to="2x", spec=spec, dynamics="exact")

        tensors = dict(model.named_parameters())
        tensors |= {
            f"{name} grad": p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        tensors |= {
            f"{name} {key}": t
            for name, p in model.named_parameters()
            for key, t in optim.state[p].items()
        }
        grown.append(tensors)

    assert grown[0].keys() == grown[1].keys() and len(grown[0]) > 4 * 20
    assert [name for name in grown[0] if not torch.equal(grown[0][name], grown[1][name])] == []


# ---- models that nobody described


@pytest.mark.parametrize("to", ["2x", "1.5x", {"hidden": 96}, {"ffn": 200}, {"layers": 3}], ids=str)
def test_own_decoder_grows_without_a_spec(to):
    model = decoder().eval()
    optim = torch.optim.AdamW(model.parameters())
    model(ids(), ids())[1].backward()
    optim.step()
    optim.zero_grad()
    before = model(ids(), ids())

    growkern.expand_inplace(
        model, optim, to=to, spec=growkern.describe(model, inputs=(ids(), ids()))
    )

    for old, new in zip(before, model(ids(), ids()), strict=True):
        assert torch.allclose(old, new, rtol=0, atol=1e-12)
    model(ids(), ids())[1].backward()
    optim.step()


def test_transformers_model_that_no_family_knows_grows_without_anything():
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=VOCAB, intermediate_size=80, max_position_embeddings=64
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config).double().eval()
    before = model(ids()).logits

    growkern.expand_inplace(model, to={"hidden": "2x", "layers": 3})

    assert torch.allclose(model(ids()).logits, before, rtol=0, atol=1e-12)
    again = transformers.PhiForCausalLM(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.allclose(again(ids()).logits, before, rtol=0, atol=1e-12)


def test_a_report_says_when_loading_a_grown_checkpoint_was_not_tried(monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 1000)
    model = zoo.make(
        "bart_classifier"
    )  # its forward looks for the tokens that end sentences in embeddings
    assert not growkern.describe(zoo.make("phi")).reload_problem

    report = growkern.expand_inplace(model, to={"ffn": 160})

    assert "may not load: not tried, as the forward of a model of more than 1,000 parameters" in str(report)  # fmt: skip
    assert "a checkpoint of a grown model may not load" in str(growkern.describe(model))


def test_own_model_without_inputs_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"no family describes .*Pass spec=growkern.describe"
    ):
        growkern.expand_inplace(decoder())


class Branching(Decoder):
    """A layer that only other values reach."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(48, 48)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        out, loss = super().forward(ids, targets)
        return (out if out.mean() < 100 else out + self.other(out[..., :48]).sum()), loss


def test_parameter_that_the_example_does_not_reach_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"other\.weight: the forward does not use it"):
        growkern.describe(decoder(Branching), inputs=ids())


class Shuffled(Decoder):
    """Features move to other places, which a constant tells."""

    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(48)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids)[..., self.order]
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.body["last"](x)) + self.body["places"].weight.mean(), None


def test_size_whose_order_a_constant_knows_is_fixed():
    spec = growkern.describe(decoder(Shuffled), inputs=ids())

    assert "hidden" not in spec.sizes
    with pytest.raises(PlanError, match="unknown size 'hidden'"):
        growkern.plan(decoder(Shuffled), spec=spec, to={"hidden": 96})


class Scaled(Decoder):
    """The stream is multiplied by a learned number per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48))

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) * self.scale + self.body["places"](torch.arange(ids.shape[1]))
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.body["last"](x)), None


def test_size_that_copies_alone_keep_grows_by_whole_multiples():
    model = decoder(Scaled)
    spec, before = growkern.describe(model, inputs=ids()), model(ids())[0]

    with pytest.raises(
        PlanError, match="no whole multiple of 48, and .* multiplied feature by feature"
    ):
        growkern.expand_inplace(model, spec=spec, to={"hidden": 72})
    growkern.expand_inplace(model, spec=spec, to="2x")

    assert torch.allclose(model(ids())[0], before, rtol=0, atol=1e-12)


class OfNanoGPT(nn.Module):
    """LayerNorm whose epsilon is a number in ``forward``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-2)


class Bare(nn.Module):
    """RMSNorm without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), eps=1e-2)


class FixedEpsilon(Decoder):
    """No attribute holds the epsilon of a norm."""

    def __init__(self, kind: type[nn.Module] = OfNanoGPT) -> None:
        super().__init__()
        for layer in self.body["layers"]:
            layer.before, layer.between = (
                (kind(48), kind(48)) if kind is OfNanoGPT else (kind(), kind())
            )
        self.body["last"] = OfNanoGPT(48) if kind is OfNanoGPT else nn.RMSNorm(48, eps=1e-3)


@pytest.mark.parametrize("kind", [FixedEpsilon, lambda: FixedEpsilon(Bare)], ids=["layer", "rms"])
@pytest.mark.parametrize("noise", [None, 0])
def test_norms_whose_epsilon_cannot_change_keep_their_mean_square(kind, noise):
    model = decoder(kind)
    spec, before = growkern.describe(model, inputs=ids()), model(ids())[0]

    width = growkern.width.Lossless(noise=noise)
    growkern.expand_inplace(model, spec=spec, to="1.5x", width=width)

    assert torch.allclose(model(ids())[0], before, rtol=0, atol=1e-12)


def test_norms_of_sums_inside_a_layer_grow_by_any_factor():
    spec = growkern.describe(zoo.make("deepseek_v3"))
    ranks = {size: 3 * spec.sizes[size] // 2 for size in spec.sizes if spec.sizes[size] in (16, 20)}

    error, *_ = zoo.grown("deepseek_v3", ranks)

    assert len(ranks) == 2 and error < 1e-6  # norms of transformers round to float32


class Unlike(Layer):
    """A block without attention."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__(width, n_head)
        del self.before, self.mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.between(x))


def alternating(kinds: str) -> nn.Module:
    model = Decoder().double()
    blocks = [(Unlike if kind == "u" else Layer)(48, 4).double() for kind in kinds]
    model.body["layers"] = nn.ModuleList(blocks)
    return model


@pytest.mark.parametrize(
    ("kinds", "grown"),
    [("lulu", "lulululu"), ("ull", "ullll"), ("luulu", None), ("ul", "ulll")],
)
def test_own_blocks_of_several_kinds_go_on_in_turn(kinds, grown):
    torch.manual_seed(0)
    model = alternating(kinds)
    spec, before = growkern.describe(model, inputs=ids()), model(ids())[0]
    if grown is None:
        assert "layers" not in spec.sizes and "their kinds do not repeat" in str(spec)
        return

    plan = growkern.plan(model, spec=spec, to={"layers": len(grown)})
    growkern.expand_inplace(model, spec=spec, plan=plan)

    assert torch.allclose(model(ids())[0], before, rtol=0, atol=1e-12)
    found = "".join("u" if type(b) is Unlike else "l" for b in model.body["layers"])
    assert found == grown
    wrong = replace(plan, blocks=tuple(replace(b, source=0) if b.new else b for b in plan.blocks))
    with pytest.raises(PlanError, match="not of the kinds of their places"):
        growkern.expand_inplace(alternating(kinds), spec=spec, plan=wrong)


@pytest.mark.parametrize("name", ["deepseek_v3", "recurrent_gemma"])
def test_blocks_of_several_kinds_are_those_that_the_config_builds(name):
    model = zoo.make(name)
    spec = growkern.describe(model)
    before, n = zoo.output(model, spec.example), spec.sizes["layers"]

    growkern.expand_inplace(model, to={"layers": n + 4})

    again = type(model)(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(zoo.output(again, spec.example), before)


class ByRoot(Decoder):
    """The embedding is multiplied by the root of an attribute, and the last stream by a number that was computed once."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width, width // 12)
        self.ninp, self.down = width, width**-0.5

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) * self.ninp**0.5 + self.body["places"](
            torch.arange(ids.shape[1])
        )
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.body["last"](x) * self.down), None


@pytest.mark.parametrize("to", ["2x", "1.5x"])
def test_powers_of_hidden_grow_and_the_writers_take_them_back(to):
    model = decoder(ByRoot)
    spec, before = growkern.describe(model, inputs=ids()), model(ids())[0]
    gradients = gradients_of(model)

    plan = growkern.plan(model, spec=spec, to=to, width=growkern.width.Lossless(noise=0))
    growkern.expand_inplace(model, spec=spec, plan=plan)

    width = model.ninp
    assert width == plan.target_sizes["hidden"] and model.down == width**-0.5
    assert torch.allclose(model(ids())[0], before, rtol=0, atol=1e-12)
    if to == "2x":
        again = ByRoot(width).double()
        again.load_state_dict(model.state_dict())
        assert torch.allclose(again(ids())[0], before, rtol=0, atol=1e-12)
        assert_law(plan, gradients, gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids())[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_law(
    plan: growkern.GrowthPlan, source: dict[str, Tensor], target: dict[str, Tensor]
) -> None:
    """Hold every gradient of the target against the source's, copied and scaled as the plan says."""
    assert plan.gradients_exact
    for row in plan.tensors:
        expected = source[row.source]
        for at, axis in enumerate(plan.axis_maps(row)):
            scale = torch.tensor([*axis.grad_scale.expanded()], dtype=expected.dtype)
            shape = [-1 if i == at else 1 for i in range(expected.dim())]
            index = torch.tensor([*axis.index_map.indices])
            expected = expected.index_select(at, index) * scale.view(shape)
        assert torch.allclose(target[row.name], expected, rtol=1e-9, atol=1e-14), row.name


def test_table_names_axes_and_reasons():
    text = str(growkern.describe(decoder(), inputs=ids()))

    assert re.search(
        r"body.layers.\*.mixer.to_qkv +weight +writer heads x 12 \+ heads x 12 \+", text
    )
    assert re.search(r"body.tokens +weight .*rows are looked up by number", text)
    assert "hidden grows with heads" in text


# ---- the permutation test


def test_permutation_test_sees_a_wrong_description():
    model = decoder()
    found = trace_model(model, ids())
    own = Tensors(found.weights, found.roles.tensors, found.roles.ties)
    right = permutation_error(model, ids(), own, found.tape.output_dims)

    wrong = dict(found.weights)
    heads, inside = (Dim(4), Dim(12))
    wrong["body.layers.0.mixer.to_out.weight"] = [wrong["body.layers.0.mixer.to_out.weight"][0], product([inside, heads])]  # fmt: skip
    error = permutation_error(
        model, ids(), Tensors(wrong, own.axes, own.ties), found.tape.output_dims
    )

    assert right < 1e-12 and error > 1e-2


def test_permutation_test_sees_every_axis_that_a_description_forgets():
    model = decoder()
    found = trace_model(model, ids())

    missed = []
    for name, dims in found.weights.items():
        for axis, dim in enumerate(dims):
            if all(a.keeps_order for a in atoms(dim)):
                continue
            forgotten = [Dim(d.size) if i == axis else d for i, d in enumerate(dims)]
            own = Tensors({**found.weights, name: forgotten}, found.roles.tensors, found.roles.ties)
            if permutation_error(model, ids(), own, found.tape.output_dims) < 1e-4:
                missed.append((name, axis))

    assert missed == []


# ---- traps


class Closure(Decoder):
    """The number of heads is in a function, which no growth can change."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.body["layers"]:
            layer.mixer = Fixed(48, 4)


class Fixed(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class Summed(Decoder):
    """A sum over features, which copies of features change."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(ids.shape[1]))
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.body["last"](x)) * x.sum(-1, keepdim=True).tanh(), None


class Literal(Decoder):
    """A width is a number in the forward."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(ids.shape[1]))
        for layer in self.body["layers"]:
            x = layer(x.view(-1, LENGTH, 48))
        return self.head(self.body["last"](x)), None


class Waves(Decoder):
    """Positions are waves, a number per feature that follows from the width."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(ids.shape[1]))
        x = x + (torch.arange(LENGTH)[:, None] / 10 ** (torch.arange(48) / 48)).sin()
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.body["last"](x)), None


class Gated(Decoder):
    """What is between blocks is more than the sum of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 48)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(ids.shape[1]))
        for layer in self.body["layers"]:
            x = layer(x) * self.gate(x).sigmoid()
        return self.head(self.body["last"](x)), None


class TiedByUse(Decoder):
    """One parameter under one name is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(ids.shape[1]))
        for layer in self.body["layers"]:
            x = layer(x)
        return self.body["last"](x) @ self.body["tokens"].weight.T, None


@pytest.mark.parametrize(
    ("kind", "gone"),
    [(Closure, "heads"), (Summed, "hidden"), (Literal, "hidden"), (Waves, "hidden"), (Gated, "layers"), (TiedByUse, "hidden")],
    ids=lambda x: getattr(x, "__name__", x),
)  # fmt: skip
def test_what_a_trace_cannot_know_does_not_grow_and_the_rest_is_exact(kind, gone):
    model = decoder(kind)
    spec, before = growkern.describe(model, inputs=ids()), model(ids())[0]

    assert gone in spec.fixed or gone not in spec.sizes
    plan = growkern.plan(model, spec=spec, to="2x")
    assert spec.fixed[gone] in str(spec)
    if gone in spec.sizes:
        assert f"{gone} stays at {spec.sizes[gone]}: {spec.fixed[gone]}" in str(plan)
    elif gone != "layers":
        assert f"{gone} cannot grow: {spec.fixed[gone]}" in str(plan)
    assert plan.target_sizes["ffn"] == 2 * spec.sizes["ffn"]
    growkern.expand_inplace(model, spec=spec, plan=plan)

    assert torch.allclose(model(ids())[0], before, rtol=0, atol=1e-12)


def test_table_says_that_a_constant_differs_along_a_size():
    assert "a constant differs along it (add)" in str(
        growkern.describe(decoder(Waves), inputs=ids())
    )


class Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()[..., ::-1].copy())


class Outer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Outside.apply(x)


class Leaving(Decoder):
    """Features leave torch and come back in another order."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.body["layers"]:
            layer.net[1] = Outer()


def test_model_whose_forward_leaves_torch_is_refused():
    with pytest.raises(
        UnsupportedModelError,
        match="when the coordinates of its spaces are permuted",
    ):
        growkern.describe(decoder(Leaving), inputs=ids())


def test_wrong_attribute_is_taken_back_by_the_check_on_the_traced_inputs():
    model = decoder()
    spec = growkern.describe(model, inputs=ids())
    wrong = replace(
        spec, attributes={k: v for k, v in spec.attributes.items() if "n_head" not in k}
    )
    before = model(ids())[0]

    with pytest.raises(CommitError, match="The growth was taken back"):
        growkern.expand_inplace(model, spec=wrong, to="2x")

    assert torch.equal(model(ids())[0], before)


def test_enumerated_coordinates_are_no_atoms():
    assert atoms(product([enumerated(3), Dim(4)])) != [] and atoms(enumerated(3)) == []


# ---- models of transformers that no family describes


@pytest.mark.parametrize("name", ["olmoe", "granite_moe"])
def test_experts_whose_matrices_are_multiplied_as_one_group_grow(name):
    """In float32 and bfloat16 transformers multiplies all experts by one operation."""
    model = zoo.make(name).float()
    model.set_experts_implementation("grouped_mm")
    spec = growkern.describe(model)
    before, deeper = zoo.output(model, spec.example), {"layers": spec.sizes["layers"] + 1}

    assert {"hidden", "ffn"} <= zoo.targets(spec, 2.0).keys()
    growkern.expand_inplace(model, to=zoo.targets(spec, 2.0) | deeper)

    assert zoo.difference(zoo.output(model, spec.example), before) < 1e-4


# ---- what users' models do


@dataclass
class Result:
    scores: Tensor
    n: int


class ReturnsResult(Decoder):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Result:
        return Result(super().forward(ids)[0], 1)


class ReturnsLoss(Decoder):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(ids)[0].flatten(0, 1).logsumexp(-1).mean()


class BatchNormed(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.channels = nn.BatchNorm1d(48)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.channels(self.body["tokens"](ids).mT).mT
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.body["last"](x + self.body["places"](torch.arange(ids.shape[1]))))


@pytest.mark.parametrize("kind", [ReturnsResult, ReturnsLoss, BatchNormed])
def test_models_that_return_a_dataclass_or_the_loss_and_batch_norms_grow(kind):
    def scores(model: nn.Module) -> Tensor:
        output = model(ids())
        return output.scores if isinstance(output, Result) else output

    model = decoder(kind).eval()
    spec, before = growkern.describe(model, inputs=ids()), scores(model)

    growkern.expand_inplace(model, spec=spec, to="2x")

    assert model.body["layers"][0].net[0].weight.shape == (384, 96)
    assert torch.allclose(scores(model), before, rtol=0, atol=1e-12)
    if kind is BatchNormed:
        assert model.channels.num_features == 96
        assert (model.channels.running_var > 0).all()


def test_forwards_of_other_threads_are_not_disturbed_and_disturb_no_description():
    failed, over = list[Exception](), threading.Event()

    def train() -> None:
        model = decoder()
        while not over.is_set():
            try:
                model(ids())[0].sum().backward()
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(4):
            model = decoder()
            before = model(ids())[0]
            spec = growkern.describe(model, inputs=ids())
            growkern.expand_inplace(model, spec=spec, to="2x")
            assert torch.allclose(model(ids())[0], before, rtol=0, atol=1e-12)
    finally:
        over.set()
        thread.join()
    assert failed == []
