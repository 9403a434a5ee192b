"""What a description by tracing costs and leaves: memory, repeated descriptions, and a model whose description is interrupted."""

import os
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

import growkern
from growkern.model.tracing import (
    attributes,
    hollow,
    mapped_weights,
    permutation,
    reload,
    rules,
    traced,
)
from growkern.model.tracing.forward import TracingError
from growkern.model.tracing.mapped_weights import run_mapped
from growkern.model.tracing.permutation import permutation_error
from growkern.model.tracing.terms import Dim, atoms
from growkern.model.tracing.traced import describe_by_tracing, trace_model
from growkern.model.tracing.trial import Tensors
from growkern.support.progress import listening

SIZES = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, intermediate_size=80, vocab_size=97, pad_token_id=0)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(traced, "_ALIKE", {})


def phi(dtype: torch.dtype = torch.float64, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES | fields)).to(dtype)


# ---- memory, and what is left of a description that raises


def test_description_and_check_take_less_memory_than_the_model():
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, here / "describe_peak_worker.py", "4"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    described, checked, n_bytes = map(int, done.stdout.split("peaks")[1].split())
    assert n_bytes > 2.6e8
    assert described < 0.6 * n_bytes and checked < 0.6 * n_bytes


@pytest.mark.parametrize("large", [False, True], ids=["by values", "by shapes"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.85, 0.99])
def test_model_whose_description_is_interrupted_is_as_it_was(part, large, monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 0 if large else 20_000_000)
    model, calls, last = phi().train(), [], [1 << 60]

    def count(module: nn.Module, args: object, output: object) -> None:
        calls.append(module)
        if len(calls) > last[0]:
            raise KeyboardInterrupt

    hook = register_module_forward_hook(count)
    before = {name: (t.clone(), id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}  # fmt: skip
    modes = [module.training for module in model.modules()]
    try:
        describe_by_tracing(phi().train())
        last[0] = int(part * len(calls))
        calls.clear()
        traced._ALIKE.clear()
        with pytest.raises(KeyboardInterrupt):
            describe_by_tracing(model)
    finally:
        hook.remove()

    for name, t in model.state_dict(keep_vars=True).items():
        assert torch.equal(t, before[name][0]) and (id(t), t._version) == before[name][1:], name
    assert [module.training for module in model.modules()] == modes
    assert _get_current_dispatch_mode() is None and torch.is_grad_enabled()


# ---- weights that no memory holds


def permutation_of(model: nn.Module, held: bool) -> tuple[Tensor, Tensor]:
    """Return the outputs with moved weights, and with moved and permuted weights."""
    found = trace_model(model, traced.example_inputs(model))
    own = Tensors(found.weights, found.roles.tensors, found.roles.ties)
    every = dict.fromkeys(a for dims in own.dims.values() for d in dims for a in atoms(d))
    draw = torch.Generator().manual_seed(0)
    maps: dict[Dim, list[int]] = {a: torch.randperm(a.size, generator=draw).tolist() for a in every}
    return tuple(run_mapped(model, found.inputs, own, m, held=held) for m in ({}, maps))


@pytest.mark.parametrize("kind", ["phi", "gpt_bigcode", "olmoe", "bart", "swin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_products_with_permuted_activations_are_those_with_permuted_weights(kind, dtype, monkeypatch):  # fmt: skip
    monkeypatch.setattr(mapped_weights, "CHUNK", 1000)
    model = zoo.make(kind).to(dtype)

    for own, held in zip(permutation_of(model, False), permutation_of(model, True), strict=True):
        assert own.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        assert (own - held).abs().max() < tolerance * held.abs().max()


def test_the_source_runs_with_moved_weights_once(monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 0)
    runs = list[object]()

    def run(*args: object, **options: object) -> object:
        runs.append(args[3] if "mode" not in options else None)
        return run_mapped(*args, **options)

    for module in (attributes, permutation, reload):
        monkeypatch.setattr(module, "run_mapped", run)

    describe_by_tracing(zoo.make("gemma3n"))  # numbers and operations are held against values too

    assert len(runs) > 5 and runs.count({}) == 1


class Escaping(nn.Linear):
    """A weight is read past the operations of torch too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * float(self.weight.detach().numpy()[0, 0])


def test_weights_that_are_read_past_operations_are_held_in_memory():
    model = phi()
    for block in model.model.layers:
        escaping = Escaping(48, 80).double()
        escaping.weight, escaping.bias = block.mlp.fc1.weight, block.mlp.fc1.bias
        block.mlp.fc1 = escaping
    found = trace_model(model, traced.example_inputs(model))
    own = Tensors(found.weights, found.roles.tensors, found.roles.ties)

    assert run_mapped(model, found.inputs, own, {}).isnan().all()
    assert permutation_error(model, found.inputs, own, found.tape.output_dims) < 1e-9


@pytest.mark.parametrize("large", [False, True], ids=["by values", "by shapes"])
def test_stages_of_a_description_are_told_in_turn(large, monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 0 if large else 20_000_000)
    told = list[tuple[str, float]]()

    with listening(lambda what, done: told.append((what, done))):
        describe_by_tracing(phi())
    describe_by_tracing(phi())

    done = [part for _, part in told]
    assert len(told) == 7 and done == sorted({*done}) and 0 <= min(done) < 0.1 < 0.8 < max(done) < 1


# ---- tensors without values


@pytest.mark.parametrize(
    "name",
    ["phi", "olmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in zoo.ZOO if n not in ("phi", "olmoe", "wav2vec2"))],
)  # fmt: skip
def test_description_by_shapes_is_the_description_by_values(name, monkeypatch):
    by_values = describe_by_tracing(zoo.make(name), zoo.example(name))
    traced._ALIKE.clear()
    monkeypatch.setattr(hollow, "LARGE", 0)
    model = zoo.make(name)
    by_shapes = describe_by_tracing(model, zoo.example(name))

    asks = name in (
        "bart_classifier",
        "llava",
        "recurrent_gemma",
        "qwen3_vl",
    )  # their forwards read values
    assert asks or trace_model(model, by_shapes.example).tape.hollow
    tried = by_shapes.reload_problem == by_values.reload_problem
    assert tried or (asks and "depends on their values" in by_shapes.reload_problem)
    if tried:
        fixed = dict(by_values.fixed)
        if (
            name == "llava"
        ):  # a block more is tried by shapes alone, and the check of a growth sees its values
            assert "a block more moves the output" in fixed.pop("layers")
        assert by_shapes.fixed.keys() == fixed.keys()
    for part in (
        "sizes",
        "tensors",
        "ties",
        "attributes",
        "config",
        "config_lists",
        "config_eps",
        "stacks",
    ):
        if name == "llava" and part in ("sizes", "config", "stacks"):
            continue  # see above
        if name == "gemma3n" and part == "attributes":
            continue  # a norm behind a scale hides, but for its epsilon, whether the scale grows
        assert getattr(by_values, part) == getattr(by_shapes, part), part


def test_shapes_of_the_latest_operations_are_remembered(monkeypatch):
    monkeypatch.setattr(hollow, "REMEMBERED", 2)
    monkeypatch.setattr(hollow, "_SHAPES", type(hollow._SHAPES)())
    computed, meta = [], hollow._meta
    monkeypatch.setattr(hollow, "_meta", lambda t: computed.append(len(t)) or meta(t))

    for n in (1, 2, 1, 3, 1, 2):
        hollow.hollow("x", torch.empty(0), (n,)).exp()

    assert computed == [1, 2, 3, 2]


CHANCE = {  # 64 ** -0.5 is 1 / 8
    "llama": ("LlamaForCausalLM", "Llama", SIZES | dict(num_attention_heads=16, num_key_value_heads=8, head_dim=64)),
    "bart": ("BartForConditionalGeneration", "Bart", dict(
        d_model=512, encoder_attention_heads=8, decoder_attention_heads=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, vocab_size=97, max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=1, dropout=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("large", [False, True], ids=["by values", "by shapes"])
@pytest.mark.parametrize("name", CHANCE)
def test_a_number_that_is_a_power_of_a_size_by_chance_stays(name, large, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, name, CHANCE[name])
    monkeypatch.setattr(hollow, "LARGE", 0 if large else 1 << 40)
    model = zoo.make(name)

    spec = describe_by_tracing(model)
    before = zoo.output(model, spec.example)
    to = {
        size: 2 * spec.sizes[size] for size in ("hidden", "heads", "kv_heads") if size in spec.sizes
    }
    growkern.expand_inplace(model, to=to, spec=spec, width=growkern.width.Lossless(noise=0))

    assert "heads" not in spec.fixed and not spec.reload_problem
    assert not any("scaling" in name for name in spec.attributes)
    assert zoo.difference(zoo.output(model, spec.example), before) < 1e-6


class Scaled(nn.Module):
    """A decoder of 8 heads of 64 whose logits are divided by the root of its width: both numbers equal powers of sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(97, 512), nn.LayerNorm(512), nn.Linear(512, 97, bias=False)  # fmt: skip
        self.qkv, self.out, self.logits_scale, self.scale = nn.Linear(512, 1536), nn.Linear(512, 512), 512**-0.5, 64**-0.5  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        heads = (*ids.shape, -1, 64)
        q, k, v = (z.view(heads).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        shares = (q @ k.transpose(2, 3) * self.scale).softmax(-1)
        x = x + self.out((shares @ v).transpose(1, 2).flatten(2))
        return self.head(x) * self.logits_scale


@pytest.mark.parametrize("large", [False, True], ids=["by values", "by shapes"])
def test_several_numbers_that_are_powers_by_chance_stay(large, monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 0 if large else 1 << 40)
    model, ids = Scaled().double().requires_grad_(False), torch.arange(24).view(2, 12)
    before = model(ids)

    growkern.expand_inplace(
        model, to={"hidden": 1024, "heads": 16}, spec=growkern.describe(model, inputs=ids)
    )

    assert model.scale == 64**-0.5 and zoo.difference(model(ids), before) < 1e-9


def test_description_in_inference_mode_is_that_of_any_mode():
    model = phi()
    with torch.inference_mode():
        inside = describe_by_tracing(model)
    traced._ALIKE.clear()

    outside = describe_by_tracing(phi())

    assert inside.tensors == outside.tensors and inside.fixed == outside.fixed
    assert inside.sizes == outside.sizes == growkern.describe(phi()).sizes


def test_moved_weights_of_a_chaotic_model_round_further_than_its_own(monkeypatch):
    monkeypatch.setattr(traced, "limit_of", lambda model: 1e-5)
    torch.manual_seed(0)
    fields = dict(
        d_model=256, d_ff=384, num_heads=4, d_kv=64, num_layers=5, vocab_size=97
    )  # no scale of scores
    model = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))

    found = describe_by_tracing(model)

    assert {"hidden", "ffn", "heads"} <= found.sizes.keys() - found.fixed.keys()


@pytest.mark.parametrize("large", [False, True], ids=["by values", "by shapes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_does_not_decide_what_a_number_is(dtype, large, monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 0 if large else 1 << 40)
    heads = dict(
        hidden_size=512, num_key_value_heads=2, head_dim=12
    )  # rounds nothing where it stays
    monkeypatch.setitem(zoo.ZOO, "gemma3", ("Gemma3ForCausalLM", "Gemma3Text", SIZES | heads))

    spec = describe_by_tracing(zoo.make("gemma3").to(dtype))

    assert "hidden" not in spec.fixed and "residual:scaled" in spec.activation_scales
    assert {name.rpartition(".")[2] for name in spec.attributes} >= {
        "embed_scale",
        "scalar_embed_scale",
    }


class Written(nn.Module):
    """Activations are written into a constant, whose values decide then."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.tokens, self.head, self.asks = nn.Embedding(97, 48), nn.Linear(48, 97), asks
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.zeros(*ids.shape, 48)
        x[:, :] = self.tokens(ids)
        if self.asks and not x.abs().sum() > 0:
            return x
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("asks", [False, True])
def test_values_that_are_asked_for_are_those_of_a_trace_with_values(asks, monkeypatch):
    monkeypatch.setattr(hollow, "LARGE", 0)
    model, ids = Written(asks), torch.arange(24).view(2, 12)

    found = trace_model(model, ids)

    assert found.tape.hollow is not asks
    assert 80 in found.spaces.sizes.values() and not found.tape.touched ^ found.weights.keys()


# ---- repeated descriptions


def n_traces(monkeypatch, *models: nn.Module) -> int:
    traces, own = [], traced.trace_model
    monkeypatch.setattr(traced, "trace_model", lambda *args: traces.append(1) or own(*args))
    for model in models:
        describe_by_tracing(model)
    return len(traces)


def test_models_of_one_class_and_config_are_traced_once(monkeypatch):
    first, second = phi(), phi(torch.float32)
    with torch.no_grad():
        second.lm_head.weight.add_(1)

    assert n_traces(monkeypatch, first, second, first, second) == 1
    growkern.expand_inplace(second, to={"ffn": 160})
    assert second.config.intermediate_size == 160


def changed(how: str, model: nn.Module, monkeypatch) -> nn.Module:
    block = model.model.layers[0]
    if how == "forward":
        own = type(block.mlp).forward
        block.mlp.forward = MethodType(lambda self, x: own(self, x), block.mlp)
    elif how == "class":
        block.mlp.activation_fn = nn.GELU()
    elif how == "attribute":
        block.self_attn.scaling = 0.5
    elif how == "constant":
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    elif how == "hook":
        block.register_forward_hook(lambda module, args, output: None)
    elif how == "tie":
        model.lm_head.weight = model.model.embed_tokens.weight
    elif how == "mode":
        model.eval()
    elif how == "class forward":
        own = type(block.mlp).forward
        monkeypatch.setattr(type(block.mlp), "forward", lambda self, x: own(self, x))
    return model


DIFFERENT = (
    "forward",
    "class",
    "attribute",
    "constant",
    "hook",
    "tie",
    "mode",
    "class forward",
    "config",
)


@pytest.mark.parametrize("how", DIFFERENT)
def test_model_that_differs_is_traced_by_itself(how, monkeypatch):
    models = [phi(), phi(partial_rotary_factor=1.0) if how == "config" else phi()]
    assert n_traces(monkeypatch, models[0]) == 1

    assert n_traces(monkeypatch, changed(how, models[1], monkeypatch)) == 1


def test_model_that_changed_is_traced_again(monkeypatch):
    model = phi()
    assert n_traces(monkeypatch, model) == 1

    assert n_traces(monkeypatch, changed("attribute", model, monkeypatch), model) == 1


# ---- bugs


def test_bug_in_a_rule_is_no_fixed_size_and_no_failed_forward(monkeypatch):
    def broken(tape: object, call: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(rules, "RULES", {**rules.RULES, "embedding": broken})

    with pytest.raises(
        TracingError, match=r"rule of embedding failed in model.embed_tokens \(KeyError"
    ):
        describe_by_tracing(phi())
