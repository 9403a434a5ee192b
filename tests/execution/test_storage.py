"""A growth keeps how a tensor is stored: its memory format, and memory that processes share."""

import pytest
import torch
from models import batch, grow, logits, make, train
from states import same, state_of

from growkern.engine.ddp import Ranks
from growkern.errors import CommitError

LAST = torch.channels_last
PATCHES = "vit.embeddings.patch_embeddings.projection.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def live(family, change=None, **options):
    model = make(family, tied=False, **options)
    if change:
        change(model)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    return model, optim


def of(model, optim, name):
    """Return a parameter, its gradient and its moments."""
    p = model.get_parameter(name)
    state = optim.state[p]
    return [p, p.grad, state["exp_avg"], state["exp_avg_sq"]]


def channels_last(model):
    model.to(memory_format=LAST)


def transposed(model):
    p = model.get_parameter(UP)
    p.data = p.data.t().contiguous().t()


@pytest.mark.parametrize("memory", ["stage", "lean"])
@pytest.mark.parametrize(
    ("family", "change", "name"), [("vit", channels_last, PATCHES), ("llama", transposed, UP)], ids=["channels_last", "transposed"]
)  # fmt: skip
def test_a_memory_format_is_kept_and_has_no_effect_on_the_numbers(family, change, name, memory):
    model, optim = live(family, change)
    plain, plain_optim = live(family)
    before = [t.stride() for t in of(model, optim, name)]

    for m, o in ((model, optim), (plain, plain_optim)):
        grow(m, o, memory=memory)

    for t, like, stride in zip(
        of(model, optim, name), of(plain, plain_optim, name), before, strict=True
    ):
        torch.testing.assert_close(t, like, rtol=1e-5, atol=1e-7)
        order = sorted(range(t.dim()), key=lambda axis: -t.stride(axis))
        assert order == sorted(range(t.dim()), key=lambda axis: -stride[axis])
    assert not model.get_parameter(name).is_contiguous()
    train(model, optim, 1)


@pytest.mark.parametrize("memory", ["stage", "lean"])
def test_shared_memory_is_kept_in_old_and_new_blocks(memory):
    model, optim = live("llama", torch.nn.Module.share_memory)
    for state in optim.state.values():
        state["exp_avg"].share_memory_()

    report = grow(model, optim, to={"hidden": 48, "layers": 3}, memory=memory)

    assert [note for note in report.notes if "tensors are in shared memory" in note]
    assert all(p.is_shared() for p in model.parameters())
    assert all(state["exp_avg"].is_shared() for state in optim.state.values())
    assert not any(state["exp_avg_sq"].is_shared() for state in optim.state.values())
    assert logits(model, batch()).isfinite().all()
    train(model, optim, 1)


@pytest.mark.parametrize("memory", ["stage", "lean"])
def test_a_failure_gives_shared_and_transposed_tensors_back(memory, monkeypatch):
    model, optim = live("llama", lambda m: transposed(m.share_memory()))
    model.lm_head.weight.data.share_memory_()
    before, strides = state_of(model, optim), [p.stride() for p in model.parameters()]
    shared = [p.is_shared() for p in model.parameters()]
    if memory == "lean":  # the addresses change
        before["params"] = [(name, value) for name, _, _, value, *_ in before["params"]]

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(Ranks, "finish", fail)
    with pytest.raises(CommitError):
        grow(model, optim, memory=memory)

    after = state_of(model, optim)
    if memory == "lean":
        after["params"] = [(name, value) for name, _, _, value, *_ in after["params"]]
    assert same(
        {k: after[k] for k in ("params", "state")}, {k: before[k] for k in ("params", "state")}
    )
    assert strides == [p.stride() for p in model.parameters()]
    assert any(shared) and shared == [p.is_shared() for p in model.parameters()]


def test_a_tensor_in_a_file_grows_into_ordinary_memory(tmp_path):
    model = make("llama", tied=False)
    p = model.get_parameter(UP)
    mapped = torch.from_file(str(tmp_path / "up"), shared=True, size=p.numel()).view_as(p)
    p.data = mapped.copy_(p.data)

    grow(model)

    assert not model.get_parameter(UP).is_shared()
