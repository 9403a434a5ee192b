"""``check=`` takes a growth back when the grown model's forward fails or computes something else, and notes name what a spec forgot."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from models import batch, logits, loss_of, make, spec_of, train
from states import same, state_of
from torch import nn
from torch.nn import functional as F

import growkern
from growkern import At, GrowthSchedule, ModelSpec, Power, embedding, linear, norm, width
from growkern.errors import CommitError, GrowthError, PlanError
from growkern.model.tracing.rounding import RandomRounding


class Tiny(nn.Module):
    """An attention without softmax that splits its projection by a cached width, as nanoGPT's does, and a norm without parameters."""

    def __init__(self, split=None, normed=False):
        super().__init__()
        self.width, self.normed = split, normed
        self.emb = nn.Embedding(50, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 50)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids, labels=None):
        x = self.emb(ids)
        x = F.rms_norm(x, x.shape[-1:]) if self.normed else x
        q, k, v = self.qkv(x).split(self.width or self.qkv.out_features // 3, dim=2)
        return {"logits": self.out(self.drop(q * k * v)), "parts": [q, (x.shape,)]}


SPEC = ModelSpec(
    "tiny",
    sizes={"hidden": 16, "heads": 4, "head_dim": 4, "vocab": 50},
    tensors=embedding("emb", rows="vocab", writes="residual")
    | linear("qkv", reads="residual", writes=[("heads", "head_dim")] * 3)
    | linear("out", reads=("heads", "head_dim"), writes="vocab"),
)
IDS = torch.arange(12).view(3, 4)
WIDER = {"hidden": 32, "heads": 8}
BATCHES = {
    "tensor": IDS,
    "mapping": {"ids": IDS, "labels": IDS},
    "sequence": [IDS, None],
    "function": lambda model: model(IDS)["logits"],
}


def started(model):
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS)["logits"].square().sum().backward()
    optim.step()
    model.config = Sizes()
    return model, optim


class Sizes:
    def to_dict(self):
        return dict(vars(self))


@pytest.mark.parametrize("check", BATCHES.values(), ids=BATCHES)
def test_a_growth_that_keeps_the_function_passes_and_leaves_no_trace(check):
    model, optim = started(Tiny())
    model.emb.eval()
    random = torch.get_rng_state()

    growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=check)

    assert model.training and not model.emb.training
    assert torch.equal(torch.get_rng_state(), random)
    assert model.emb.embedding_dim == 32


@pytest.mark.parametrize("check", BATCHES.values(), ids=BATCHES)
def test_a_forward_that_fails_takes_the_growth_back_and_names_the_module(check):
    model, optim = started(Tiny(split=16))
    before = copy.deepcopy(state_of(model, optim)), state_of(model, optim)

    with pytest.raises(
        CommitError, match=r"(?s)failed in Tiny: ValueError.*taken back.*attributes="
    ):
        growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=check)

    assert same(state_of(model, optim), before[1])
    report = growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC)
    assert any("width = 16 (hidden)" in note for note in report.notes)


def test_the_deepest_module_that_fails_is_named():
    model, optim = started(Tiny())
    model.out.register_forward_pre_hook(lambda m, args: args[0].view(3, 4, 16))
    with pytest.raises(CommitError, match="failed in out: RuntimeError"):
        growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=IDS)


@pytest.mark.parametrize("method", [width.Lossless(), width.FPI(maps="cyclic")], ids=str)
def test_an_output_that_moves_takes_the_growth_back(method):
    """The spec says wrongly that no norm reads the residual stream."""
    model, optim = started(Tiny(normed=True))
    before = state_of(model, optim)
    wrong = replace(SPEC, non_affine_norms={})

    with pytest.raises(CommitError, match=r"logits moved by .* plan promises.*taken back"):
        growkern.expand_inplace(model, optim, to={"hidden": 24}, spec=wrong, width=method, check=IDS)  # fmt: skip

    assert same(state_of(model, optim), before)


class Literal(nn.LayerNorm):
    """Has an epsilon that its forward does not read."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.literal)


@pytest.mark.parametrize(
    ("dtype", "eps", "least", "most"), [(torch.float64, 1e-7, 1e-8, 2e-6), (torch.float32, 3e-6, 1e-6, 5e-5)], ids=str
)  # fmt: skip
def test_a_norm_whose_epsilon_is_a_literal_is_seen(dtype, eps, least, most):
    """A growth by a half changes the epsilon that nothing reads, so that the outputs move by as little as the epsilon."""
    model = make("gpt2", tied=False, layer_norm_epsilon=eps).to(dtype)
    for block in model.transformer.h:
        block.ln_1.__class__, block.ln_1.literal = Literal, eps
    before = logits(model, batch())

    with pytest.raises(CommitError, match="logits moved by .*rounding moves it by .*taken back"):
        growkern.expand_inplace(model, to="1.5x", check=batch())

    assert torch.equal(logits(model, batch()), before)
    growkern.expand_inplace(model, to="1.5x", check=lambda _: torch.ones(1))
    moved = (logits(model, batch()) - before).abs().max() / before.abs().max()
    assert least < moved < most


# error of all outputs, relative -> dtype: what the check has to see
SEEN = {torch.float64: 2e-6, torch.float32: 4e-6, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", SEEN, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "mixtral"])
def test_a_right_growth_passes_and_an_error_a_little_above_rounding_does_not(name, dtype):
    """The norms of Llama and Mixtral round to float32 in float64 too; routers choose other experts where rounding decides."""

    def outputs(model):
        out = logits(model, batch())
        return out * (1 + error) if next(model.parameters()).numel() > n else out

    for error in (0.0, SEEN[dtype]):
        model = make(name, tied=True).to(dtype)
        n = next(model.parameters()).numel()
        if not error:
            growkern.expand_inplace(model, to="2x", check=outputs)
            continue
        with pytest.raises(CommitError, match="moved by .*rounding moves it"):
            growkern.expand_inplace(model, to="2x", check=outputs)


@pytest.mark.parametrize("dtype", SEEN, ids=str)
def test_what_an_operation_rounds_moves_by_its_dtype_at_random(dtype):
    whole, part = torch.arange(64, dtype=dtype), torch.rand(4096).to(dtype) + 0.5
    whole[-1], eps = float("inf"), torch.finfo(dtype).eps

    with (mode := RandomRounding(0)):
        kept, moved, copied = whole + 0, part + 0, part.clone()

    assert torch.equal(kept, whole) and torch.equal(copied, part) and mode.eps == eps
    off = ((moved - part) / part).abs()
    assert 0.1 * eps < off.mean() and off.max() <= 2.1 * eps


def once(first, later):
    """A check function that returns one thing in its first call, and another in all later calls."""
    calls = []

    def check(model):
        calls.append(model(IDS)["logits"])
        return first(calls[-1]) if len(calls) == 1 else later(calls[-1])

    return check


@pytest.mark.parametrize(
    "later", [lambda _: None, lambda x: {"other": x}, lambda _: 1.0], ids=["none", "name", "number"]
)
def test_outputs_that_are_gone_take_the_growth_back(later):
    model, optim = started(Tiny())
    before = state_of(model, optim)

    with pytest.raises(CommitError, match=r"returned none of the outputs.*taken back"):
        growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=once(lambda x: x, later))

    assert same(state_of(model, optim), before)


def test_the_report_says_that_nothing_was_compared():
    model, other = Tiny(), Tiny()

    report = growkern.expand_inplace(
        model, to=WIDER, spec=SPEC, check=lambda model: model(IDS)["parts"]
    )
    compared = growkern.expand_inplace(other, to=WIDER, spec=SPEC, check=IDS)

    assert "compared nothing" in report.notes[0] and "compared nothing" in str(report)
    assert not any("compared nothing" in note for note in compared.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_without_a_finite_number_are_refused(value):
    model, optim = started(Tiny())
    before = state_of(model, optim)
    with pytest.raises(PlanError, match="no finite floating-point number"):
        growkern.expand_inplace(
            model, optim, to=WIDER, spec=SPEC, check=lambda m: m(IDS)["logits"] * value
        )
    assert same(state_of(model, optim), before)


def writes(model):
    model.out.bias += 0.0


def freezes(model):
    model.emb.weight.requires_grad_(False)


def replaces(model):
    model.out.bias = nn.Parameter(model.out.bias.clone())


def adds(model):
    model.extra = nn.Parameter(torch.ones(1))


def clears(model):
    model.out.weight.grad = None


def adds_up(model):
    with torch.enable_grad():
        model(IDS)["logits"].sum().backward()


@pytest.mark.parametrize("call", [1, 2, 4], ids=["before", "rounded", "after"])
@pytest.mark.parametrize("change", [writes, freezes, replaces, adds, clears, adds_up])
def test_a_check_that_changes_a_parameter_is_refused(change, call):
    model, optim = started(Tiny())
    before, calls = state_of(model, optim), []

    def check(model):
        calls.append(None)
        if len(calls) == call:
            change(model)
        return model(IDS)["logits"]

    with pytest.raises(
        CommitError if call == 4 else PlanError, match="the forward changed the parameter"
    ):
        growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=check)

    assert model.emb.embedding_dim == 16
    assert len(calls) == call
    if change is writes:
        assert same(state_of(model, optim), before)


class Swapping(Tiny):
    """Acts on the switch between the modes, counts its calls, and puts a new tensor in the place of a buffer."""

    inside = False

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def train(self, mode=True):
        self.inside = not mode
        return super().train(mode)

    def forward(self, ids):
        self.calls += 1
        self.last = self.calls + 1
        return super().forward(ids)


@pytest.mark.parametrize("split", [None, 16], ids=["passes", "fails"])
def test_a_check_leaves_modes_and_buffers_as_they_were(split):
    model = Swapping(split=split)
    calls, last = model.calls, model.last
    try:
        growkern.expand_inplace(model, to=WIDER, spec=SPEC, check=IDS)
    except CommitError:
        assert split
    assert not model.inside and model.training
    assert model.calls is calls and model.last is last and calls == last == 0


@pytest.mark.parametrize("size", [1.0, 1e-2], ids=str)
def test_small_outputs_are_compared_too(size):
    model, optim = started(Tiny())
    with torch.no_grad():
        model.out.weight.mul_(size)
        model.out.bias.mul_(size)
    model.emb.register_forward_hook(lambda m, args, out: out * (1 if out.shape[-1] == 16 else 1.5))
    with pytest.raises(CommitError, match="logits moved"):
        growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=IDS)


def test_an_output_may_move_where_the_plan_says_so():
    model = make("llama", tied=True).eval()
    report = growkern.expand_inplace(model, width=width.FPI(), check={"input_ids": batch()})
    assert report.preserves == "nothing"


@pytest.mark.parametrize(
    ("check", "why"),
    [
        (5, "expected a batch or a function of the model, got int"),
        (torch.zeros(2, 2), "the forward failed before the growth"),
        (lambda model: IDS, "no finite floating-point number"),
    ],
    ids=["number", "floats", "function"],
)
def test_a_check_that_cannot_run_is_refused_before_anything_changes(check, why):
    model, optim = started(Tiny())
    before = state_of(model, optim)
    with pytest.raises(PlanError, match=why):
        growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC, check=check)
    assert same(state_of(model, optim), before)


@pytest.mark.parametrize("check", [None, True, False, IDS], ids=["spec", "true", "false", "batch"])
def test_a_schedule_checks_on_the_last_batch(check):
    """By default a schedule checks models that a spec describes; without the check, the step after the growth fails."""
    model, optim = Tiny(split=16), None
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = GrowthSchedule([At(step=2, to=WIDER)])
    schedule.attach(model, optim, spec=SPEC, check=check)

    def step():
        model(IDS)["logits"].square().sum().backward()
        optim.step()
        optim.zero_grad()

    step()
    if check is False:
        step()
        with pytest.raises(ValueError, match="too many values"):
            step()
        return
    with pytest.raises(CommitError, match="failed in Tiny"):
        step()
    assert schedule.fired == [] and model.emb.embedding_dim == 16
    model.width = None
    step()
    assert schedule.fired == [3] and model.emb.embedding_dim == 32
    schedule.attachment.remove()
    assert not model._forward_pre_hooks


def test_a_schedule_of_a_stock_model_checks_only_if_asked():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = GrowthSchedule([At(step=1, to="2x")])
    schedule.attach(model, optim)
    assert not model._forward_pre_hooks
    schedule.attachment.remove()
    schedule.attach(model, optim, check=True)
    loss = loss_of(model, batch())
    loss.backward()
    optim.step()
    assert schedule.fired == [1]


def test_a_schedule_checks_under_the_autocast_of_the_training_loop():
    class Mixed(Tiny):
        """A model whose forward works under autocast alone."""

        def forward(self, ids, labels=None):
            return {"logits": self.out(self.qkv(self.emb(ids).bfloat16())[..., : self.out.in_features])}  # fmt: skip

    model = Mixed()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = GrowthSchedule([At(step=2, to=WIDER)])
    schedule.attach(model, optim, spec=SPEC, check=True)

    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS)["logits"].float().square().sum()
        loss.backward()
        optim.step()
        optim.zero_grad()

    assert schedule.fired == [2]


def test_a_check_keeps_no_graph_of_the_last_batch():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    GrowthSchedule([At(step=9, to="2x")]).attach(model, optim, check=True)
    embeds = model.get_input_embeddings()(batch())

    model(inputs_embeds=embeds)
    graph = weakref.ref(embeds)
    del embeds

    assert graph() is None


# What a spec forgot


def test_an_epsilon_that_has_to_change_and_is_no_attribute_is_refused_by_the_plan():
    class LN(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    model = nn.Sequential()
    model.emb, model.ln, model.head = nn.Embedding(50, 16), LN(), nn.Linear(16, 50)
    spec = ModelSpec(
        "tiny",
        sizes={"hidden": 16, "vocab": 50},
        tensors=embedding("emb", rows="vocab", writes="residual")
        | norm("ln", reads="residual", writes="residual:final", kind="layer")
        | linear("head", reads="residual:final", writes="vocab"),
    )
    with pytest.raises(PlanError, match=r"ln: the LN has no attribute 'eps'.*norm\(eps=...\)"):
        growkern.plan(model, to={"hidden": 24}, spec=spec)
    model.ln.eps = 1e-5
    assert growkern.plan(model, to={"hidden": 24}, spec=spec).preserves != "nothing"


def test_an_int_that_is_a_quotient_of_sizes_stays_an_int_and_becomes_no_fraction():
    model = Tiny()
    model.pairs = 2  # of four heads
    spec = replace(SPEC, attributes={"pairs": Power("heads", 1.0, base=2)})
    for change, n in ((growkern.expand_inplace, 5), (growkern.shrink_inplace, 3)):
        with pytest.raises(PlanError, match=f"pairs: is the int 2, and would be {n / 2}"):
            change(model, to={"heads": n}, spec=spec)

    growkern.expand_inplace(model, to={"heads": 6}, spec=spec, check=IDS)
    assert type(model.pairs) is int and model.pairs == 3


@pytest.mark.parametrize("to", [24, 32, 48])
@pytest.mark.parametrize("stated", [None, {}, {"residual": "rms"}], ids=["unsaid", "none", "rms"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_a_norm_without_parameters_is_kept_or_refused(to, stated, normed):
    """What a plan promises is true of the forward: a spec that says nothing promises what holds with and without the norm."""
    if (stated == {} and normed) or (stated and not normed):
        return  # the spec would be wrong
    torch.manual_seed(1)
    model = Tiny(normed=normed).double().eval()
    before = model(IDS)["logits"]
    try:
        growkern.expand_inplace(model, to={"hidden": to}, spec=replace(SPEC, non_affine_norms=stated))  # fmt: skip
    except GrowthError as error:
        assert to == 24 and stated != {} and "whole multiples" in str(error)
        return
    assert to > 24 or stated in (
        {},
        {"residual": "rms"},
    )  # of an RMSNorm, writers keep the mean square
    torch.testing.assert_close(model(IDS)["logits"], before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "family", [5, None, b"x", "x" * 10_000], ids=lambda family: str(family)[:4]
)
def test_a_family_that_no_record_can_name_is_refused_before_anything_changes(family):
    model, optim = started(Tiny())
    before = state_of(model, optim)
    with pytest.raises(GrowthError, match="family"):
        growkern.expand_inplace(model, optim, to=WIDER, spec=replace(SPEC, family=family))
    assert same(state_of(model, optim), before)
    growkern.expand_inplace(model, optim, to=WIDER, spec=SPEC)


def test_families_have_no_note_on_sizes_that_nothing_lists():
    for family in ("llama", "gpt2", "bert"):
        assert not any(
            "in no spec" in note for note in growkern.plan(make(family, tied=True)).notes
        )


def test_a_model_of_the_users_own_trains_on_after_a_check():
    model = make("plain", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    growkern.expand_inplace(model, optim, spec=spec_of(model), check=batch())
    train(model, optim, 1)


class WithLoss(nn.Module):
    """A model that returns float32 logits and a loss under any autocast, and keeps an expanded buffer."""

    def __init__(self):
        super().__init__()
        self.emb, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
        self.up, self.down, self.last = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 50)
        self.register_buffer("mask", torch.ones(1, 4).expand(3, 4), persistent=False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, ids):
        self.seen += 1
        x = self.emb(ids) * self.mask[..., None]
        logits = self.head(self.last(x + self.down(F.gelu(self.up(self.norm(x))))))
        return logits.float(), F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())

    def spec(self):
        named = [
            norm("norm", reads="residual", writes="residual:normed", kind="layer"),
            norm("last", reads="residual", writes="residual:last", kind="layer"),
            linear("up", reads="residual:normed", writes="ffn"),
            linear("down", reads="ffn", writes="residual"),
            linear("head", reads="residual:last", writes="vocab"),
        ]
        tensors = embedding("emb", rows="vocab", writes="residual")
        sizes = {"hidden": self.head.in_features, "ffn": self.up.out_features, "vocab": 50}
        return ModelSpec("own", sizes, {k: v for part in named for k, v in part.items()} | tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["2x", {"hidden": 24}])
def test_a_check_allows_for_the_rounding_of_autocast(dtype, to):
    torch.manual_seed(0)
    model = WithLoss()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = GrowthSchedule([At(step=30, to=to)])
    schedule.attach(model, optim, spec=WithLoss.spec)
    for _ in range(31):  # one batch is learned by heart: its loss is small
        optim.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(IDS)[1]
        loss.backward()
        optim.step()

    assert schedule.fired == [30] and loss.item() < 0.5
    assert model.mask.stride() == (0, 1)


def test_buffers_beside_an_expanded_one_are_put_back():
    model = WithLoss()
    model(IDS)

    growkern.expand_inplace(model, spec=model.spec(), check=IDS, to="2x")

    assert float(model.seen) == 1


def test_under_autocast_another_function_is_still_found():
    model = WithLoss()

    def moved(model):
        return model(IDS)[0] + (model.head.in_features - 16)

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(CommitError, match="the output moved by 8"),
    ):
        growkern.expand_inplace(model, spec=model.spec(), check=moved, to={"hidden": 24})

    assert model.head.in_features == 16
