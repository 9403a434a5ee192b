"""A user's own model with norms and readers unlike those of the stock families: a growth that says that it preserves the function does.

This holds for every width method; other growths are refused, or say that they preserve nothing. The oracle is the model's own forward.
"""

import copy
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from pairwise import pairwise
from torch import nn
from torch.nn import functional as F

import growkern
from growkern import Blocks, ModelSpec, embedding, linear, norm, width
from growkern.errors import PlanError

VOCAB, HIDDEN, FFN = 11, 12, 20
TOKENS = torch.arange(VOCAB).repeat(2, 1)  # every row of the embedding is read


@dataclass(frozen=True)
class Shape:
    """What a model has; norms are ``"layer"``, ``"rms"``, ``"plain layer"`` or ``"plain rms"`` (without parameters), ``"fixed layer"`` or
    ``"fixed rms"`` (an epsilon in ``forward``), or None."""

    blocks: str = "layer"
    final: str | None = "layer"
    inner: str | None = None  # a norm in the FFN, behind its activation function
    transform: str | None = (
        None  # a linear layer, an activation function and this norm before the head
    )
    gate: bool = False  # reads the residual stream without a norm
    value: bool = False  # a second head, which reads the residual stream without a norm
    embedded: str = "residual"  # name of the stream that the embedding writes
    tied: bool = False
    said: bool = True  # the spec names norms without parameters


SHAPES = {
    "plain layer norms": Shape(),
    "plain rms norms": Shape("rms", "rms"),
    "LayerNorm in blocks, RMSNorm at the end": Shape("layer", "rms"),
    "RMSNorm in blocks, LayerNorm at the end": Shape("rms", "layer"),
    "several kinds, tied": Shape("layer", "rms", tied=True),
    "a norm without parameters in blocks": Shape("plain rms", "layer"),
    "a norm without parameters at the end": Shape("layer", "plain rms"),
    "two norms without parameters": Shape("plain layer", "plain layer"),
    "norms without parameters that the spec does not name": Shape("plain rms", "plain rms", said=False),
    "RMSNorms without parameters": Shape("plain rms", "plain rms"),
    "RMSNorm, one without parameters at the end": Shape("rms", "plain rms"),
    "RMSNorms of fixed epsilons": Shape("fixed rms", "fixed rms"),
    "an RMSNorm of fixed epsilon, tied": Shape("fixed rms", "rms", tied=True),
    "an RMSNorm of fixed epsilon, a gate": Shape("fixed rms", "rms", gate=True),
    "LayerNorms of fixed epsilons": Shape("fixed layer", "fixed layer"),
    "a LayerNorm of fixed epsilon, tied": Shape("layer", "fixed layer", tied=True),
    "a LayerNorm of fixed epsilon, a gate": Shape("layer", "fixed layer", gate=True),
    "no final LayerNorm": Shape("layer", None),
    "no final RMSNorm": Shape("rms", None),
    "no final LayerNorm, a tied head": Shape("layer", None, embedded="residual:embedded", tied=True),
    "no final RMSNorm, a tied head": Shape("rms", None, embedded="residual:embedded", tied=True),
    "a gate without a norm beside LayerNorm": Shape(gate=True),
    "a gate without a norm beside RMSNorm": Shape("rms", "rms", gate=True),
    "a gate without a norm, tied": Shape(gate=True, tied=True),
    "a value head without a norm": Shape(value=True),
    "an embedding of another name": Shape(embedded="residual:embedded"),
    "an embedding of another name beside RMSNorm": Shape("rms", "rms", embedded="residual:embedded"),
    "LayerNorm behind the activation of the FFN": Shape(inner="layer"),
    "RMSNorm behind the activation of the FFN": Shape("rms", "rms", inner="rms"),
    "RMSNorm behind the activation beside LayerNorm": Shape(inner="rms"),
    "LayerNorm behind the activation of a transform": Shape(transform="layer"),
    "RMSNorm behind the activation of a transform": Shape("rms", "rms", transform="rms"),
}  # fmt: skip
METHODS = [
    width.Lossless(),
    width.Lossless(noise=0),
    width.Lossless(noise=1),
    width.Lossless(norms="mean_pad"),
    width.Lossless(norms="centre_pad"),
    width.Lossless(noise=0, norms="centre_pad"),
    width.Lossless(norms="zero_pad"),
    width.Lossless(noise=1, norms="isometric"),
    width.Lemon(),
    width.Lemon("random"),
    width.Lemon("average"),
    width.HyperClone(),
    width.HyperClone(noise_db=10, general=True),
    width.CopyAndPad(norm="corrected"),
    width.CopyAndPad(),
    width.FPI(),
    width.FPI(maps="cyclic"),
    width.Net2Wider(maps="cyclic", noise=0.1),
    width.AKI(),
    width.AKIPro(),
    width.FreshFeatures(),
    width.Sparkling(),
    width.Sparkling("random", "zero"),
]
TARGETS = [
    "2x",
    {"hidden": 18},
    {"hidden": 24},
    {"hidden": 17, "ffn": 33},
    {"ffn": 30},
    {"ffn": 40},
    {"ffn": 60, "layers": 3},
]


class Plain(nn.Module):
    """A norm without parameters."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, h):
        return (
            F.rms_norm(h, h.shape[-1:], eps=1e-5)
            if self.kind == "plain rms"
            else F.layer_norm(h, h.shape[-1:])
        )


class Fixed(nn.Module):
    """A norm whose epsilon is a number in ``forward``; that of LayerNorm is another."""

    def __init__(self, kind, n):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n)) if kind == "fixed layer" else None

    def forward(self, h):
        if self.bias is None:
            return F.rms_norm(h, h.shape[-1:], self.weight, eps=1e-2)
        return F.layer_norm(h, h.shape[-1:], self.weight, self.bias, eps=2e-2)


def made(kind, n):
    if kind and kind.startswith("fixed"):
        return Fixed(kind, n)
    return {
        None: nn.Identity, "layer": lambda: nn.LayerNorm(n), "rms": lambda: nn.RMSNorm(n, eps=1e-5)
    }.get(kind, lambda: Plain(kind))()  # fmt: skip


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm, self.inner = made(shape.blocks, HIDDEN), made(shape.inner, FFN)
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.gate = nn.Linear(HIDDEN, FFN) if shape.gate else None

    def forward(self, h):
        units = F.gelu(self.up(self.norm(h)))
        if self.gate is not None:
            units = units * torch.sigmoid(self.gate(h))
        return h + self.down(self.inner(units))


class Own(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(2))
        self.final = made(shape.final, HIDDEN)
        if shape.transform:
            self.dense, self.ln = nn.Linear(HIDDEN, HIDDEN), made(shape.transform, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.value = nn.Linear(HIDDEN, 1) if shape.value else None
        if shape.tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        h = self.wte(tokens)
        for block in self.blocks:
            h = block(h)
        out = self.final(h)
        if hasattr(self, "dense"):
            out = self.ln(F.gelu(self.dense(out)))
        out = self.head(out)
        return out if self.value is None else torch.cat((out, self.value(h)), -1)


def spec_of(model, shape):
    plain = {}

    def normed(name, kind, reads, writes):
        """Add a norm; return the stream that its readers read."""
        kind, eps = (kind.removeprefix("fixed "), None) if kind and kind.startswith("fixed") else (kind, "eps")  # fmt: skip
        if kind in ("layer", "rms"):
            tensors.update(norm(name, reads=reads, writes=writes, kind=kind, eps=eps))
            return writes
        if kind is not None:
            plain[reads] = kind.removeprefix("plain ")
        return reads

    tensors = embedding("wte", rows="vocab", writes=shape.embedded)
    for i in range(len(model.blocks)):
        at, units = f"blocks.{i}", f"ffn.{i}"
        stream = normed(f"{at}.norm", shape.blocks, "residual", "residual:normed")
        tensors |= linear(f"{at}.up", reads=stream, writes=units)
        if shape.gate:
            tensors |= linear(f"{at}.gate", reads="residual", writes=units)
        units = normed(f"{at}.inner", shape.inner, units, f"{units}:normed")
        tensors |= linear(f"{at}.down", reads=units, writes="residual")
    stream = normed("final", shape.final, "residual", "residual:final")
    if shape.transform:
        tensors |= linear("dense", reads=stream, writes="residual:transform")
        stream = normed("ln", shape.transform, "residual:transform", "residual:out")
    tensors |= linear("head", reads=stream, writes="vocab", bias=False)
    if shape.value:
        tensors |= linear("value", reads="residual", writes="one")
    sizes = {
        "vocab": VOCAB,
        "hidden": model.wte.weight.shape[1],
        "ffn": model.blocks[0].up.out_features,
    }
    return ModelSpec(
        family="own",
        sizes={**sizes, "layers": len(model.blocks), "one": 1},
        tensors=tensors,
        ties={"head.weight": "wte.weight"} if shape.tied else {},
        blocks=Blocks("blocks", identity={"down.weight": 0.0, "down.bias": 0.0}),
        non_affine_norms=(plain or None) if shape.said else None,
    )


def model_of(shape):
    torch.manual_seed(0)
    model = Own(shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def grown(shape, to, method, *, trained=True):
    """Grow a model; return it, its optimizer, the report, and by how much its outputs moved; None where the method refuses."""
    model, optim = model_of(shape)
    if trained:
        model(TOKENS).square().mean().backward()
        optim.step()
        optim.zero_grad()
    before = model(TOKENS).detach()
    try:
        report = growkern.expand_inplace(
            model, optim, to=to, width=method, spec=spec_of(model, shape)
        )
    except PlanError:
        return None
    return model, optim, report, ((model(TOKENS).detach() - before).norm() / before.norm()).item()


CASES = pairwise([*product(SHAPES, METHODS, TARGETS)])


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "method", "to"), CASES, ids=str)
def test_a_growth_that_says_that_it_preserves_the_function_does(shape, method, to):
    found = grown(SHAPES[shape], to, method, trained=False)

    assert found is None or not found[2].function_preserving or found[3] < 1e-9


HALF, TWICE = {"hidden": 18}, {"hidden": 24}
RAW = ("no final LayerNorm", "no final RMSNorm", "a gate", "a value", "an embedding")
INNER = ("LayerNorm behind the activation of the FFN", "RMSNorm behind the activation")
EXACT = [  # what the default growth grows exactly; a width that is no whole multiple where pads are exact
    ("LayerNorm in blocks, RMSNorm at the end", {"ffn": 33}),
    *product(("LayerNorm in blocks, RMSNorm at the end", "RMSNorm in blocks, LayerNorm at the end"), (TWICE, "2x")),
    *product(("several kinds, tied", "a norm without parameters in blocks"), (TWICE, "2x")),
    *product((s for s in SHAPES if s.startswith(RAW) and "tied head" not in s), (HALF, TWICE, "2x")),
    ("no final RMSNorm, a tied head", HALF),
    *product((s for s in SHAPES if "fixed" in s or s.startswith(("RMSNorms without", "RMSNorm, one"))), (HALF, TWICE)),
    *product((s for s in SHAPES if s.startswith(INNER) and "transform" not in s), ({"hidden": 18, "ffn": 20}, "2x", {"ffn": 40})),
    *product((s for s in SHAPES if "of a transform" in s), (TWICE, "2x")),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "to"), EXACT, ids=str)
def test_the_default_growth_is_exact_and_trains_and_resumes(shape, to):
    shape = SHAPES[shape]
    model, optim, report, moved = grown(shape, to, None)
    assert report.function_preserving and moved < 1e-9

    trained = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for _ in range(2):
        optim.zero_grad()
        F.cross_entropy(
            model(TOKENS)[..., :VOCAB].flatten(0, 1), TOKENS.flatten().flip(0)
        ).backward()
        for seen, parameter in zip(trained, model.parameters(), strict=True):
            seen += parameter.grad.abs()
        optim.step()
    resumed, other = model_of(shape)
    growkern.resume(resumed, other, optim.state_dict(), spec=lambda m: spec_of(m, shape))
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optim.state_dict())

    assert all(
        (seen > 0).all()
        for (name, _), seen in zip(model.named_parameters(), trained, strict=True)
        if "value" not in name
    )
    assert torch.equal(resumed(TOKENS), model(TOKENS))


def train(model, optim, steps):
    for _ in range(steps):
        optim.zero_grad()
        F.cross_entropy(
            model(TOKENS)[..., :VOCAB].flatten(0, 1), TOKENS.flatten().flip(0)
        ).backward()
        optim.step()
    return model(TOKENS)


@pytest.mark.parametrize("to", [HALF, TWICE], ids=str)
@pytest.mark.parametrize(
    "shape",
    [s for s in SHAPES if ("RMSNorm" in s and "fixed" in s) or s == "RMSNorms without parameters"],
)
def test_a_run_whose_mean_squares_are_kept_goes_on_as_if_it_had_not_grown(shape, to):
    model, optim = model_of(SHAPES[shape])
    train(model, optim, 3)
    source = copy.deepcopy((model, optim))

    report = growkern.expand_inplace(
        model, optim, to=to, width=width.Lossless(noise=0), spec=spec_of(model, SHAPES[shape]), dynamics="exact",
    )  # fmt: skip

    assert report.preserves == "trajectory" and "epsilons" not in str(report)
    assert torch.allclose(train(model, optim, 10), train(*source, 10), rtol=0, atol=1e-9)


REFUSED = {
    "several kinds at 1.5x": ("LayerNorm in blocks, RMSNorm at the end", HALF, None, "several kinds; nearest whole multiples: 12, 24"),
    "several kinds with pads": ("several kinds, tied", TWICE, width.CopyAndPad(norm="corrected"), "several kinds; width.Lossless"),
    "no parameters at 1.5x": ("a norm without parameters at the end", HALF, None, "without parameters.*: 12, 24"),
    "a mean that is read": ("a value head without a norm", TWICE, width.Lossless(norms="centre_pad"), "reads 'residual' without a norm"),
    "a tied head without a norm": ("no final LayerNorm, a tied head", HALF, None, "'residual'.*Whole multiples"),
    "an activation in the FFN": ("LayerNorm behind the activation of the FFN", {"ffn": 30}, None, "'ffn.0', perhaps behind.*: 20, 40"),
    "an activation in a transform": ("RMSNorm behind the activation of a transform", HALF, None, "'residual:transform', perhaps.*: 12, 24"),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "to", "method", "match"), REFUSED.values(), ids=REFUSED)
def test_a_method_that_promises_refuses_what_it_cannot_keep(shape, to, method, match):
    model, optim = model_of(SHAPES[shape])

    with pytest.raises(PlanError, match=match):
        growkern.plan(model, optim, to=to, width=method, spec=spec_of(model, SHAPES[shape]))


def test_new_features_may_be_seen_by_a_norm_that_the_spec_does_not_name():
    shape = SHAPES["norms without parameters that the spec does not name"]
    _, _, report, moved = grown(shape, HALF, width.FreshFeatures())

    assert not report.function_preserving and moved > 1e-3
