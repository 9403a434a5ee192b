"""A growth that fails leaves model, optimizer and scheduler bitwise unchanged."""

import os
import signal

import pytest
import torch
import triton
from models import DEVICE, batch, grow, logits, make, train
from states import fail_at, same, state_of

import growkern
from growkern import api
from growkern.commit import commit
from growkern.commit import optimizer as optim_target
from growkern.commit import param_groups as groups
from growkern.engine import run as engine
from growkern.engine.ddp import Ranks
from growkern.engine.sources import tensors_of
from growkern.errors import CommitError, GrowthError, InsufficientMemoryError
from growkern.execution import execute, sets
from growkern.optimizer.describe import describe_optimizer


def fixture(family="bert"):
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 100)
    train(model, optim, 2)
    logits(model, batch()).square().mean().backward()
    return model, optim, scheduler


STAGES = {
    "plan": (api, "build"),
    "execute": (execute, "_run"),
    "copy blocks": (commit, "_new_blocks"),
    "guards": (commit, "_guard"),
    "hooks": (optim_target, "_scales"),
    "values": (commit.Undo, "storage"),
    "dicts": (commit.Undo, "set_dict"),
    "lists": (commit.Undo, "set_list"),
    "attributes": (commit.Undo, "attribute"),
    "optimizer": (optim_target, "_optimizer"),
    "groups": (optim_target, "split_groups"),
    "scheduler": (groups, "_follow"),
    "last check": (optim_target, "check_state"),
    "gradient norm": (engine, "grad_norm_factor"),
}
ERRORS = [
    RuntimeError("boom"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    KeyboardInterrupt(),
]


# a growth calls these stages several times; the number is that of a later call
OFTEN = {"values": 3, "dicts": 3, "lists": 3, "attributes": 3}
CASES = [(stage, 1, error) for stage in STAGES for error in ERRORS]
CASES += [(stage, OFTEN[stage], ERRORS[i % len(ERRORS)]) for i, stage in enumerate(OFTEN)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "call", "error"),
    CASES,
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else None,
)
def test_a_failure_at_any_stage_leaves_everything_bitwise_unchanged(
    stage, call, error, monkeypatch
):
    model, optim, scheduler = fixture()
    before = state_of(model, optim, scheduler)
    failures = fail_at(monkeypatch, *STAGES[stage], error, call)

    with pytest.raises((CommitError, type(error))):
        grow(model, optim, to={"hidden": 48, "layers": 3}, scheduler=scheduler)

    assert failures
    assert same(state_of(model, optim, scheduler), before)
    monkeypatch.undo()
    train(model, optim, 1)


WRITING = {"attributes": (commit, "_attributes"), "the last step": (Ranks, "finish")}


@pytest.mark.parametrize("stage", WRITING)
def test_control_c_during_the_writing_takes_the_growth_back(stage, monkeypatch):
    model, optim, scheduler = fixture("llama")
    start, original = state_of(model, optim, scheduler), getattr(*WRITING[stage])
    monkeypatch.setattr(
        *WRITING[stage], lambda *a: (os.kill(os.getpid(), signal.SIGINT), original(*a))[1]
    )

    # a background job ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            grow(model, optim, to="2x", scheduler=scheduler)
    finally:
        signal.signal(signal.SIGINT, before)

    assert same(state_of(model, optim, scheduler), start)
    monkeypatch.undo()
    grow(model, optim, to="2x", scheduler=scheduler)


def test_a_growth_that_does_not_fit_is_refused_with_both_figures(monkeypatch):
    model, optim, scheduler = fixture()
    before = state_of(model, optim, scheduler)
    monkeypatch.setattr(sets, "free_bytes", lambda device: 1000)

    with pytest.raises(
        InsufficientMemoryError, match=r"need, beside the source, 0\.00 GiB on cpu.*free: 0\.00 GiB"
    ):
        grow(model, optim, to="2x", scheduler=scheduler)

    assert same(state_of(model, optim, scheduler), before)


def test_the_bytes_promised_are_the_bytes_staged():
    model, optim, _ = fixture()
    spec = growkern.describe(model)
    plan = growkern.plan(model, optim, to={"hidden": 48, "layers": 4})
    sources = tensors_of(model, (optim,), spec)
    law = describe_optimizer(model, optim, spec).rules

    run = execute.Execution(plan, sources, lambda _: law, memory="stage")
    (staged,) = run.parts()

    scalars = sum(
        t.numel() * t.element_size()
        for s in staged.states.values()
        for t in s.values()
        if t.dim() == 0
    )
    assert run.peak_bytes == run.n_written == staged.n_bytes() - scalars


def test_wrong_state_that_appears_on_the_way_is_caught_before_the_next_step(monkeypatch):
    model, optim, scheduler = fixture()
    before = state_of(model, optim, scheduler)
    original = commit._values

    def forgets(rows, staged, *rest):
        original(rows, type(staged)(staged.values, staged.grads, {}), *rest)

    monkeypatch.setattr(commit, "_values", forgets)
    with pytest.raises(CommitError, match="exp_avg.*has shape"):
        grow(model, optim, to="2x", scheduler=scheduler)

    assert same(state_of(model, optim, scheduler), before)


def test_hooks_weakrefs_and_names_survive():
    import weakref

    model, optim, scheduler = fixture("gpt2")
    p = model.transformer.h[0].mlp.c_fc.weight
    fired, alive = [], weakref.ref(p)
    p.register_post_accumulate_grad_hook(lambda q: fired.append(q.shape))
    named = dict(model.named_parameters())

    grow(model, optim, to="2x", scheduler=scheduler)
    model.zero_grad()
    logits(model, batch()).square().mean().backward()

    assert fired == [p.shape] and alive() is p
    assert model.lm_head.weight is model.transformer.wte.weight
    after = dict(model.named_parameters())
    assert [*after] == [*named] and all(after[name] is named[name] for name in named)


def test_new_blocks_share_the_config_and_the_same_block_list_object():
    model, optim, scheduler = fixture("llama")
    layers = model.model.layers

    grow(model, optim, to={"layers": 3}, scheduler=scheduler)

    assert model.model.layers is layers and len(layers) == 3
    assert all(layer.self_attn.config is model.config for layer in layers)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("backend", "patched", "match"),
    [
        ("cuda", None, "backend='cuda' is unknown"),
        ("triton", (triton.knobs.runtime, "interpret", DEVICE != "cpu"), "does not run on"),
        ("triton", (execute, "find_spec", lambda name: None), "triton is not installed"),
    ],
    ids=["unknown", "other device", "not installed"],
)
def test_a_backend_that_cannot_run_says_why(backend, patched, match, monkeypatch):
    model, optim, scheduler = fixture()
    before = state_of(model, optim, scheduler)
    if patched is not None:
        monkeypatch.setattr(*patched)

    with pytest.raises(GrowthError, match=match):
        grow(model, optim, to="2x", scheduler=scheduler, backend=backend)

    assert same(state_of(model, optim, scheduler), before)


@pytest.mark.parametrize("how", ["own", "ignored"])
def test_a_signal_handler_of_the_users_own_is_called_after_the_growth(how, monkeypatch):
    model, optim, scheduler = fixture()
    calls, attributes = [], commit._attributes
    handler = (
        (lambda *_: calls.append(model.config.hidden_size)) if how == "own" else signal.SIG_IGN
    )
    before = signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(
        commit, "_attributes", lambda *a: (os.kill(os.getpid(), signal.SIGINT), attributes(*a))
    )
    try:
        grow(model, optim, to="2x", scheduler=scheduler)
    finally:
        signal.signal(signal.SIGINT, before)

    assert model.config.hidden_size == 48 and calls == ([48] if how == "own" else [])
