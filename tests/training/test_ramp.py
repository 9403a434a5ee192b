"""MSG's ramp: masks folded into weights go from the source's function to the plain growth, and the optimizer sees weights without masks.

The oracle is a forward with masks by hand, as the paper has it, trained by Adam's formula.
"""

import copy
import math

import pytest
import torch
from models import Plain, batch, exact_norms, logits, loss_of, make
from scheduled import optimizer, run, same_weights

import growkern
from growkern import At, GrowthSchedule, depth, width
from growkern.errors import PlanError
from growkern.optimizer.update_scale import scale_of
from growkern.width.drawn import Drawn

PADS = width.CopyAndPad(norm="corrected")
LARGE = {"hidden": 48, "heads": 8, "kv_heads": 4, "ffn": 60, "layers": 4}
NARROW = {"hidden": 24}
RAMPED = {  # family, target, depth method
    "llama-hidden": ("llama", {"hidden": 48, "heads": 4, "kv_heads": 2, "ffn": 40}, None),
    "llama-ffn": ("llama", NARROW | {"ffn": 56}, None),
    "llama-heads": ("llama", NARROW | {"heads": 8, "kv_heads": 4, "ffn": 40}, None),
    "llama-groups": ("llama", NARROW | {"heads": 8, "kv_heads": 2, "ffn": 40}, None),
    "llama-layers": ("llama", {"layers": 4}, depth.Stack()),
    "llama-fresh": ("llama", {"layers": 3}, depth.Fresh(at="even")),
    "llama-all": ("llama", LARGE, depth.TopCopies()),
    "qwen2": ("qwen2", {"hidden": 36, "layers": 3}, depth.Stack()),
    "qwen3": ("qwen3", {"hidden": 36}, None),
    "mixtral": ("mixtral", {"hidden": 36, "layers": 3}, depth.Stack()),
    "gemma2": ("gemma2", {"hidden": 36, "layers": 3}, depth.Stack()),
    "gpt2": ("gpt2", NARROW | {"ffn": 112, "layers": 3}, depth.Interpose()),
    "bert": ("bert", NARROW | {"ffn": 56, "heads": 4}, None),
    "t5": ("t5", {"hidden": 36, "decoder_layers": 3}, depth.Stack()),
}


@pytest.fixture
def float64(monkeypatch):
    exact_norms(monkeypatch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ramped(to=NARROW | {"ffn": 56}, *, step=1, ramp=4, deep=None, **options) -> At:
    wide = None if {*to} == {"layers"} else PADS
    return At(step=step, to=to, width=wide, depth=deep, ramp=ramp, **options)


def attached(model, *events, optim=None, **options):
    optim = optimizer(model) if optim is None else optim
    schedule = GrowthSchedule(events)
    return schedule, schedule.attach(model, optim, **options), optim


@pytest.mark.parametrize(("family", "to", "deep"), RAMPED.values(), ids=RAMPED)
def test_at_c_0_the_function_is_the_sources(family, to, deep, float64):
    """c is 1e-15, and no more than rounding away from 0."""
    model, source = make(family, tied=False), make(family, tied=False)
    _, _, optim = attached(model, ramped(to, ramp=10**15, deep=deep))

    run(model, optim, 1)
    run(source, optimizer(source), 1)

    expected = logits(source, batch())
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in source.parameters())
    assert (logits(model, batch()) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_at_c_0_a_tied_head_does_not_read_new_coordinates(float64):
    model, source = make("llama", tied=True), make("llama", tied=True)
    _, _, optim = attached(model, ramped({"hidden": 48}, ramp=10**15))

    run(model, optim, 1)
    run(source, optimizer(source), 1)

    torch.testing.assert_close(logits(model, batch()), logits(source, batch()), rtol=0, atol=1e-12)


def test_at_c_0_a_model_of_your_own_computes_the_sources_function(float64):
    model, source = Plain(), Plain()
    source.load_state_dict(model.state_dict())
    event = ramped(NARROW | {"ffn": 112, "layers": 3}, ramp=10**15, deep=depth.Stack())
    _, _, optim = attached(model, event, spec=Plain.spec)

    run(model, optim, 1)
    run(source, optimizer(source), 1)

    torch.testing.assert_close(logits(model, batch()), logits(source, batch()), rtol=0, atol=1e-12)


def test_a_spec_that_does_not_follow_the_growth_is_refused():
    """A ``ModelSpec`` is of one size; a wrong function is found when the model has grown."""
    model = Plain()
    with pytest.raises(PlanError, match="cannot describe Plain"):
        attached(model, ramped(NARROW | {"ffn": 112}), spec=model.spec())

    wrong = Plain()
    schedule, _, optim = attached(wrong, ramped(NARROW | {"ffn": 96, "heads": 8}), spec=Plain.spec)
    with pytest.raises(
        PlanError, match="(?s)ramp has not begun: .* go on from a checkpoint before"
    ):
        run(wrong, optim, 1)
    assert len(schedule.state_dict()["history"]) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_at_c_1_the_model_is_the_plain_target(family, float64):
    """Old elements and epsilons are the source's, and new elements are drawn as strong as the old ones."""
    source, model = make(family, tied=False), make(family, tied=False)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    event = ramped({"hidden": 48, "layers": 3}, ramp=5, deep=depth.Stack())
    _, attachment, _ = attached(model, event, optim=still)
    eps = [vars(m) for m in source.modules() if "Norm" in type(m).__name__]

    run(model, still, 1 + 5)

    assert attachment.ramp.c == 1
    new = dict(model.named_parameters())
    for name, p in source.named_parameters():
        old = new[name][tuple(map(slice, p.shape))]
        if (
            family == "gemma2" and "embed" in name
        ):  # Gemma multiplies the embedding by the root of hidden
            old = old * math.sqrt(48 / 24)
        torch.testing.assert_close(old, p, rtol=1e-14, atol=1e-15)
        if p.dim() == 2 and new[name].shape != p.shape:
            sides = zip(p.shape, new[name].shape, strict=True)
            drawn = new[name][tuple(slice(n if n != m else 0, None) for n, m in sides)]
            assert 0.8 < drawn.std() / p.std() < 1.2, name
    for name in ("eps", "variance_epsilon"):
        own = {getattr(m, name) for m in model.modules() if name in vars(m)}
        assert own == {v[name] for v in eps if name in v}
    assert not any("_growkern_eps" in vars(m) for m in model.modules())


def test_a_ramp_of_one_step_is_the_growth_without_a_ramp():
    model, by_hand = make("llama", tied=True), make("llama", tied=True)
    optim, other = optimizer(model), optimizer(by_hand)
    attached(model, ramped(LARGE, ramp=1, deep=depth.Stack()), optim=optim)

    run(model, optim, 4)
    run(by_hand, other, 1)
    growkern.expand_inplace(by_hand, other, to=LARGE, width=Drawn(), depth=depth.Stack())
    run(by_hand, other, 3, first=1)

    same_weights(model, by_hand)


def masked_llama(weights, config, ids, c, n_old, source_layers, angles):
    """Compute the loss of a Llama whose new hidden coordinates, FFN units, heads and blocks are masked by ``c``."""
    n, hidden, heads, ffn = config.head_dim, *n_old

    def mask(n_old, n):
        return torch.where(torch.arange(n) < n_old, 1.0, torch.tensor(c))

    of_hidden, of_ffn = mask(hidden, config.hidden_size), mask(ffn, config.intermediate_size)
    of_heads = mask(heads, config.num_attention_heads)
    cos, sin = angles

    def norm(x, gain):
        mean = (of_hidden**2 * x**2).sum(-1, keepdim=True) / (of_hidden**2).sum()
        return gain * of_hidden * x / (mean + config.rms_norm_eps).sqrt()

    def rope(x):
        return x * cos + torch.cat((-x[..., n // 2 :], x[..., : n // 2]), -1) * sin

    def split(x):
        return x.unflatten(-1, (-1, n)).transpose(1, 2)

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items()}
        block = 1.0 if i < source_layers else c
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = (split(h @ w[f"self_attn.{p}_proj.weight"].T) for p in "qkv")
        group = q.shape[1] // k.shape[1]
        q, k, v = rope(q), rope(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        later = torch.ones(16, 16).triu(1).bool()
        scores = (q @ k.transpose(-1, -2) / math.sqrt(n)).masked_fill(later, -torch.inf)
        out = of_heads[:, None, None] * (scores.softmax(-1) @ v)
        x = x + block * out.transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        units = of_ffn * torch.nn.functional.silu(gate) * up
        x = x + block * units @ w["mlp.down_proj.weight"].T
    out = norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adam(p, grad, state, lr=1e-2, decay=0.01):
    """Take one step of AdamW, by its formula."""
    state["step"] += 1
    state["exp_avg"] = 0.9 * state["exp_avg"] + 0.1 * grad
    state["exp_avg_sq"] = 0.999 * state["exp_avg_sq"] + 0.001 * grad**2
    mean = state["exp_avg"] / (1 - 0.9 ** state["step"])
    square = state["exp_avg_sq"] / (1 - 0.999 ** state["step"])
    return p * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)


def test_a_ramp_trains_as_masks_in_the_forward_and_adam_on_unmasked_weights(float64):
    ramp, model, plain = 6, make("llama", tied=False), make("llama", tied=False)
    model.config._attn_implementation = plain.config._attn_implementation = "eager"
    _, _, optim = attached(model, ramped(LARGE, ramp=ramp, deep=depth.Stack()))
    _, _, other = attached(plain, ramped(LARGE, ramp=1, deep=depth.Stack()))
    for one, own in ((model, optim), (plain, other)):
        run(one, own, 1)
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    states = {name: copy.deepcopy(other.state[p]) for name, p in plain.named_parameters()}
    losses, expected = list[float](), list[float]()
    angles = plain.model.rotary_emb(torch.ones(()), torch.arange(16)[None])  # in float32

    run(model, optim, ramp + 2, first=1, each=lambda i, loss: losses.append(loss.item()))
    for t in range(ramp + 2):
        c = min(1.0, (t + 1) / ramp)
        leaves = {name: p.requires_grad_() for name, p in weights.items()}
        loss = masked_llama(leaves, plain.config, batch(seed=1 + t), c, (24, 4, 40), 2, angles)
        grads = torch.autograd.grad(loss, [*leaves.values()])
        weights = {
            name: adam(p.detach(), grad, states[name])
            for (name, p), grad in zip(weights.items(), grads, strict=True)
        }
        expected.append(loss.item())

    assert losses == pytest.approx(expected, rel=1e-11)


def test_an_update_scale_and_the_mask_multiply():
    """What the optimizer sees of a weight is divided by both, and its gradient is multiplied by the mask and divided by ``a``."""
    seen = {}

    class Spy(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            seen.update(p=down.clone(), grad=down.grad.clone())
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=-0.1)

    model = make("llama", tied=True)
    down = model.model.layers[0].mlp.down_proj.weight
    optim = Spy(model.parameters(), {})
    growkern.UpdateScale(optim, {down: growkern.Scale((2.0, 1.0), (3.0, 1.0))})
    attached(model, ramped(ramp=4), optim=optim, state_rules={})
    run(model, optim, 2)
    mask = torch.where(torch.arange(56) < 40, 1.0, 2 / 4)

    optim.zero_grad()
    loss_of(model, batch(seed=2)).backward()
    before, grad = down.detach().clone(), down.grad.clone()
    optim.step()

    torch.testing.assert_close(seen["p"], before / 2 / mask)
    torch.testing.assert_close(seen["grad"], grad / 3 * mask)
    moved = (seen["p"] - 0.1 * seen["grad"]) * 2 * torch.where(torch.arange(56) < 40, 1.0, 3 / 4)
    torch.testing.assert_close(down.detach(), moved)


def test_the_optimizer_sees_gemma2_gains_without_offset_and_mask(float64):
    """SGD on raw gains: Gemma multiplies by ``1 + weight``, and the mask applies to the sum."""
    model, source = make("gemma2", tied=False), make("gemma2", tied=False)
    optim = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    attached(model, ramped({"hidden": 36}, ramp=4), optim=optim)
    run(model, optim, 1)
    gain = model.model.norm.weight
    root = [math.sqrt((24 + c * c * 12) / 36) for c in (1 / 4, 2 / 4)]

    optim.zero_grad()
    loss_of(model, batch(seed=1)).backward()
    raw = (1 + gain.detach()) / root[0] - 1
    raw = raw - 0.1 * (gain.grad * root[0] + 0.5 * raw)
    optim.step()

    torch.testing.assert_close(gain.detach(), (1 + raw) * root[1] - 1)
    assert source.model.norm.eps * (24 + 12 / 4) / 36 == pytest.approx(model.model.norm.eps)


def losses_of(model, optim, steps, first):
    losses = list[float]()
    run(model, optim, steps, first=first, each=lambda i, loss: losses.append(loss.item()))
    return losses


EARLIER = At(step=1, to={"hidden": 36}, width=width.Lossless(noise=0.1), dynamics="exact")


RUNS = {
    "alone": [ramped(LARGE, ramp=6, deep=depth.Stack())],
    "after-exact": [EARLIER, ramped({"hidden": 48}, step=2, ramp=6)],
}


@pytest.mark.slow
@pytest.mark.parametrize("events", RUNS.values(), ids=RUNS)
def test_a_run_that_is_saved_and_resumed_in_a_ramp_goes_on_to_the_same_bits(events, tmp_path):
    model = make("llama", tied=True)
    schedule, _, optim = attached(model, *events)
    run(model, optim, 4)
    parts = {"model": model.state_dict(), "optim": optim.state_dict(), "schedule": schedule.state_dict()}  # fmt: skip
    torch.save(parts, tmp_path / "saved.pt")
    unbroken = losses_of(model, optim, 6, 4)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = make("llama", tied=True)
    other, schedule = optimizer(again), GrowthSchedule(events)
    growkern.resume(again, other, saved["schedule"]["history"])
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optim"])
    schedule.load_state_dict(saved["schedule"])
    attachment = schedule.attach(again, other)

    assert 0 < attachment.ramp.c < 1
    assert losses_of(again, other, 6, 4) == unbroken
    same_weights(again, model)
    eps = [[m.variance_epsilon for m in one.modules() if hasattr(m, "variance_epsilon")] for one in (model, again)]  # fmt: skip
    assert eps[0] == eps[1]


@pytest.mark.parametrize("attach_again", [False, True])
def test_an_earlier_checkpoint_of_a_ramp_loads_into_the_live_run(attach_again):
    model = make("llama", tied=True)
    schedule, attachment, optim = attached(model, ramped({"hidden": 48}, ramp=6))
    run(model, optim, 3)
    saved = copy.deepcopy((model.state_dict(), optim.state_dict(), schedule.state_dict()))
    unbroken = losses_of(model, optim, 2, 3)

    if attach_again:
        attachment.remove()
        schedule = GrowthSchedule(schedule.events)
    for part, state in zip((model, optim, schedule), saved, strict=True):
        part.load_state_dict(state)
    if attach_again:
        attachment = schedule.attach(model, optim)

    assert losses_of(model, optim, 2, 3) == unbroken


def test_a_new_schedule_is_refused_in_a_ramp_of_one_that_was_removed():
    schedule, attachment, optim = attached(model := make("llama", tied=True), ramped(ramp=6))
    run(model, optim, 3)
    attachment.remove()

    with pytest.raises(PlanError, match="removed: the ramp ends at step 6. Load the state of that"):
        GrowthSchedule(schedule.events).attach(model, optim)
    assert schedule.attach(model, optim).ramp.c == 3 / 6


@pytest.mark.parametrize("attach_again", [False, True])
def test_a_checkpoint_from_after_the_ramp_resets_the_epsilons_of_the_live_run(attach_again):
    model = make("llama", tied=True)
    schedule, attachment, optim = attached(model, ramped({"hidden": 48}, ramp=3))
    run(model, optim, 5)
    saved = copy.deepcopy((model.state_dict(), optim.state_dict(), schedule.state_dict()))
    live = make("llama", tied=True)
    schedule, attachment, other = attached(live, ramped({"hidden": 48}, ramp=3))
    run(live, other, 2)

    if attach_again:
        attachment.remove()
        schedule = GrowthSchedule(schedule.events)
    for part, state in zip((live, other, schedule), saved, strict=True):
        part.load_state_dict(state)
    if attach_again:
        attachment = schedule.attach(live, other)

    assert attachment.ramp.c == 1 and not scale_of(other).masks
    assert live.model.norm.variance_epsilon == live.config.rms_norm_eps
    assert losses_of(live, other, 2, 5) == losses_of(model, optim, 2, 5)


def test_a_schedule_in_a_ramp_is_refused_on_a_model_that_has_not_grown():
    model = make("llama", tied=True)
    schedule, _, optim = attached(model, ramped({"hidden": 48}, ramp=6))
    run(model, optim, 2)
    small, again = make("llama", tied=True), GrowthSchedule(schedule.events)
    again.load_state_dict(schedule.state_dict())

    with pytest.raises(PlanError, match=r"in a ramp of a model of .*'hidden': 48.*growkern\.resume"):  # fmt: skip
        again.attach(small, optimizer(small))
    assert again.attachment is None


def test_frozen_weights_carry_the_mask_too():
    model, plain = make("llama", tied=True), make("llama", tied=True)
    for one, ramp in ((model, 3), (plain, 1)):
        event = ramped({"hidden": 48, "layers": 3}, ramp=ramp, deep=depth.Stack(), trains=growkern.trains.New())  # fmt: skip
        _, _, optim = attached(one, event)
        run(one, optim, 4)

    for p, q in zip(model.model.layers[:2].parameters(), plain.model.layers[:2].parameters(), strict=True):  # fmt: skip
        assert not p.requires_grad
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert scale_of(optim) is None  # a ramp of one step needs none


def test_a_growth_inside_a_ramp_is_refused_and_named_with_the_step_of_its_end():
    with pytest.raises(PlanError, match="event 1: at step 50, the ramp of event 0 has not ended; name at least step 109"):  # fmt: skip
        GrowthSchedule([ramped(step=10, ramp=100), At(step=50, to={"hidden": 48})])
    GrowthSchedule([ramped(step=10, ramp=100), At(step=109, to={"hidden": 48})])


def test_an_event_that_is_due_in_a_ramp_waits_for_its_end():
    model = make("llama", tied=True)
    waits = At(tokens=1, to={"hidden": 48})
    schedule, _, optim = attached(model, ramped(ramp=4), waits)

    run(model, optim, 8, each=lambda i, loss: schedule.observe(tokens=8))

    assert schedule.fired == [1, 4]


def test_ramps_follow_each_other_under_other_hooks_of_the_user():
    model = make("llama", tied=True)
    events = [ramped(ramp=3), ramped({"layers": 3}, step=3, ramp=2, deep=depth.Stack())]
    schedule, attachment, optim = attached(model, *events, ramped({"hidden": 48}, step=7, ramp=2))
    seen = list[float]()
    optim.register_step_post_hook(lambda *_: seen.append(attachment.ramp.c))

    run(model, optim, 9)

    assert schedule.fired == [1, 3, 7]
    assert seen == pytest.approx([1 / 3, 2 / 3, 1 / 2, 1, 1, 1, 1 / 2, 1, 1])


def test_a_growth_by_hand_in_a_ramp_is_refused_with_the_step_of_its_end():
    model = make("llama", tied=True)
    schedule, _, optim = attached(model, ramped(ramp=9))
    run(model, optim, 2)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(PlanError, match="cannot grow during a ramp.*the ramp ends at step 9"):
        growkern.expand_inplace(model, optim, to={"hidden": 48})

    assert "ramp at 0.22, 1 at step 9" in str(schedule)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


REFUSED = {
    "post-norm": ("bert", ramped({"hidden": 48}), r"hidden: post-norm LayerNorms subtract a mean .*no function of weights.*Lossless"),
    "layer-norm": ("gpt2", ramped({"hidden": 48}), "hidden: LayerNorms subtract a mean over the masked coordinates"),
    "post-norm-layers": ("bert", ramped({"layers": 3}, deep=depth.Stack()), r"post-norm block normalizes its input.*IdentityBlocks\(\)"),
    "width": ("llama", At(step=1, to={"hidden": 48}, ramp=4), r"pass width=width\.CopyAndPad\(norm='corrected'\), not the default"),
    "published": ("llama", At(step=1, to={"hidden": 48}, width=width.CopyAndPad(), ramp=4), "norm='corrected'"),
    "copies": ("llama", At(step=1, to={"ffn": 80}, width=width.HyperClone(), ramp=4), "norm='corrected'"),
    "identity": ("llama", ramped({"layers": 3}), r"IdentityBlocks starts at 0.*depth\.Stack\(\)"),
    "branches": ("llama", ramped({"layers": 4}, deep=depth.Interpose(halve_branches=True)), "scales the branches"),
    "vocab": ("llama", ramped({"vocab": 80, "ffn": 56}), "not vocab: grow vocab by an event of its own"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "event", "match"), REFUSED.values(), ids=REFUSED)
def test_a_ramp_that_is_no_function_of_weights_is_refused_when_it_is_attached(family, event, match):
    model = make(family, tied=True)

    with pytest.raises(PlanError, match=match):
        attached(model, event)


def test_weights_in_low_precision_and_copies_of_weights_are_refused():
    model = make("llama", tied=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(PlanError, match="ramp= with ema=: the copies of the weights"):
        attached(model, ramped(), ema=average)

    del average
    masters = {p: torch.nn.Parameter(p.detach().clone()) for p in model.parameters()}
    with pytest.raises(PlanError, match="ramp= with master_weights=: the copies of the weights"):
        attached(model, ramped(), optim=torch.optim.AdamW([*masters.values()]), master_weights=masters)  # fmt: skip
    with pytest.raises(PlanError, match=r"torch\.bfloat16 rounds away"):
        attached(model.bfloat16(), ramped())


@pytest.mark.parametrize("wrong", [{"ramp": -1}, {"ramp": 3, "to": None}, {"ramp": 1.5}], ids=str)
def test_a_ramp_is_a_number_of_steps_after_a_growth(wrong):
    with pytest.raises(PlanError, match="ramp"):
        At(step=1, **wrong)
