"""A growth that cannot be done is refused before any tensor changes; the error gives the numbers at fault and a way out."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
import torch
from models import Plain, batch, grow, make, train

import growkern
from growkern import width
from growkern.errors import GrowthError, PlanError, UnsupportedModelError, UnsupportedOptimizerError

SIZES = [
    ("llama", "0.5x", "smaller than the source"),
    ("llama", {"hidden": 12}, "hidden: the target 12 is smaller than the source 24"),
    ("llama", {"layers": 1}, "layers: the target 1 is smaller"),
    ("llama", "1.3x", "31.2, not whole; nearest: 31, 32"),
    ("llama", {"ffn": "1.01x"}, "40.4, not whole; nearest: 40, 41"),
    ("llama", {"hiden": 48}, "unknown size 'hiden': did you mean 'hidden'"),
    ("llama", {"foo": 48}, "unknown size 'foo': sizes of llama: hidden, heads"),
    ("llama", "twice", "cannot read to='twice'"),
    ("llama", {"hidden": "much"}, "cannot read 'much'"),
    ("llama", {"hidden": 48.0}, "cannot read 48.0; pass an int"),
    ("llama", None, "cannot read to=None"),
    ("llama", 2, "cannot read to=2"),
    ("llama", ["hidden"], "cannot read to="),
    ("llama", {"hidden": 0}, "hidden: the target 0 is smaller than the source 24"),
    ("llama", {"layers": 100_000}, "layers: the target 100,000 is above .*; name at most 4,096"),
    ("llama", {"hidden": True}, "cannot read True; pass an int"),
    ("llama", {"hidden": 24}, "every target equals its source"),
    ("llama", {"heads": 5}, "heads: 5 is not a multiple of kv_heads=2; nearest: 4, 6"),
    ("llama", {"head_dim": 9}, "whole multiples of 6 only"),
    ("llama", {"vocab": 100}, "vocab: Lossless does not grow it.*growkern.vocab grows vocab"),
    ("llama", {"hidden": 48, "vocab": 10}, "vocab: the target 10 is smaller"),
    (
        "llama",
        {"hidden": 10**10},
        "hidden: the target 10,000,000,000 is above .*; name at most 262,144",
    ),
    ("llama", {}, "every target equals its source"),
    (
        "gpt2",
        {"hidden": 31},
        "31 is not a multiple of head_dim=6.*hidden = heads x head_dim; nearest: 30, 36",
    ),
    ("gpt2", "1.1x", "not a multiple of head_dim=6.*nearest: 24, 30"),
    ("gpt2", {"hidden": 48, "heads": 4}, "48 is not 4 x 6; hidden=24 or heads=8"),
    ("bert", {"hidden": 50}, "50 is not a multiple of head_dim=6"),
    ("bert", "1.5x", "post-norm.*nearest whole multiples: 24, 48"),
]


@pytest.mark.parametrize(("family", "to", "match"), SIZES, ids=lambda v: str(v)[:40])
def test_sizes_that_cannot_be(family, to, match):
    model = make(family, tied=True)
    before = {n: p.clone() for n, p in model.named_parameters()}

    with pytest.raises(PlanError, match="(?s)" + match):
        grow(model, to=to)

    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_all_reasons_come_at_once():
    with pytest.raises(PlanError) as raised:
        grow(make("llama", tied=True), to={"hidden": 12, "layers": 1, "ffm": 3})

    assert all(word in str(raised.value) for word in ("hidden", "layers", "did you mean 'ffn'"))


METHODS = [
    (
        dict(width=width.Lossless(norms="mean_pad"), to="1.5x"),
        "mean_pad' is for layer norms; these are rms norms",
    ),
    (
        dict(width=width.Lossless(norms="fancy"), to="1.5x"),
        "norms='fancy' is unknown; pass 'isometric'",
    ),
    (dict(width=width.Lossless(noise=-1), to="2x"), "noise=-1"),
    (dict(width=width.Lossless(noise=float("nan")), to="2x"), "noise=nan"),
    (dict(width=width.Lossless), "expected a width method"),
    (dict(width=0), "expected a width method"),
    (dict(depth=[]), "expected a depth method"),
    (dict(width=width.Lossless(noise="a")), "noise='a'"),
    (dict(width=width.Lossless(norms=["isometric"]), to="1.5x"), "is unknown; pass"),
    (dict(scheduler="cosine"), "the optimizer of the scheduler is missing"),
    (dict(dynamics=[0]), "unknown dynamics"),
    (dict(state="keep"), "unknown state='keep'"),
    (dict(dynamics="muP"), "unknown dynamics='muP'"),
    (dict(to={"layers": 3}, plan=None, seed=-1), "seed"),
]


@pytest.mark.parametrize(("options", "match"), METHODS, ids=lambda v: str(v)[:50])
def test_options_that_cannot_be(options, match):
    with pytest.raises(PlanError, match=match):
        grow(make("llama", tied=False), **options)


def test_centring_a_tied_model_is_refused():
    with pytest.raises(PlanError, match="tied.*use norms='mean_pad'"):
        grow(make("gpt2", tied=True), to="1.5x", width=width.Lossless(norms="centre_pad"))


def test_an_unknown_model_is_told_the_ways_out():
    with pytest.raises(
        UnsupportedModelError,
        match="(?s)no family describes.*growkern families.*inputs=batch.*hints=.*spec=ModelSpec",
    ):
        growkern.expand_inplace(torch.nn.Linear(2, 2))


def test_a_class_that_only_shares_a_name_is_unknown():
    class LlamaForCausalLM(torch.nn.Module):
        pass

    with pytest.raises(UnsupportedModelError, match="no family describes"):
        growkern.expand_inplace(LlamaForCausalLM())


def changed(spec, **fields):
    return growkern.ModelSpec(**{k: getattr(spec, k) for k in spec.__dataclass_fields__} | fields)


def without(spec, name):
    return changed(spec, tensors={k: v for k, v in spec.tensors.items() if k != name})


SPECS = [
    (
        lambda s: without(s, "blocks.0.up.bias"),
        r"blocks\.0\.up\.bias: the spec does not cover this tensor",
    ),
    (
        lambda s: changed(
            s, tensors=s.tensors | growkern.linear("extra", reads="residual", writes="vocab")
        ),
        "extra.bias: the spec names this tensor, but the model does not",
    ),
    (
        lambda s: changed(s, sizes=dict(s.sizes) | {"ffn": 7}),
        r"up.weight: has shape \(96, 24\), the spec says \(7, 24\)",
    ),
    (
        lambda s: changed(s, sizes={k: v for k, v in s.sizes.items() if k != "ffn"}),
        "'ffn' is not in sizes",
    ),
    (
        lambda s: changed(
            s,
            tensors=s.tensors
            | growkern.linear("head", reads="residual:finl", writes="vocab", bias=False),
        ),
        "head.weight: reads the stream 'residual:finl', which no tensor of the spec writes",
    ),
    (
        lambda s: changed(s, ties={}),
        "head.weight: is the same parameter as wte.weight, and the spec declares no tie",
    ),
    (
        lambda s: changed(s, ties=dict(s.ties) | {"wpe.weight": "wte.weight"}),
        "wpe.weight: the spec ties it to wte.weight, but",
    ),
    (
        lambda s: changed(s, attributes={"blocks.0.attention.n_heads": "heads"}),
        "blocks.0.attention.n_heads: the spec names this attribute, but",
    ),
    (
        lambda s: changed(s, attributes={"blocks.0.attention.n_head": "width"}),
        "n_head.*'width' is not in sizes",
    ),
    (
        lambda s: changed(s, blocks=growkern.Blocks("layers")),
        "layers: the spec says that the blocks are here, but the model has no ModuleList",
    ),
    (
        lambda s: changed(s, blocks=growkern.Blocks("blocks", identity={"down.wait": 0.0})),
        "down.wait",
    ),
    (lambda s: changed(s, sizes=dict(s.sizes) | {"layers": 3}), "layers.*3.*2"),
]


@pytest.mark.parametrize(("change", "match"), SPECS, ids=lambda v: v if isinstance(v, str) else "")
def test_specs_that_do_not_fit_the_model(change, match):
    model = make("plain", tied=True)

    with pytest.raises(UnsupportedModelError, match=match):
        growkern.expand_inplace(model, spec=change(model.spec()), to={"hidden": 48, "layers": 3})


class MyAdam(torch.optim.AdamW):
    pass


def extra_key(model, optim):
    optim.state[model.model.norm.weight]["ema"] = torch.zeros(24)


def short_state(model, optim):
    optim.state[model.model.norm.weight]["exp_avg"] = torch.zeros(23)


OPTIMIZERS = [
    (
        MyAdam,
        None,
        r"law of .*MyAdam \(state exp_avg, exp_avg_sq, step\) is not known. Known: .*SGD.*state_rules=",
    ),
    (torch.optim.AdamW, extra_key, "norm.weight: unknown state 'ema'"),
    (
        torch.optim.AdamW,
        short_state,
        r"norm.weight: state 'exp_avg' has shape \(23,\), the parameter \(24,\)",
    ),
]


@pytest.mark.parametrize(
    ("kind", "damage", "match"), OPTIMIZERS, ids=lambda v: getattr(v, "__name__", "")
)
def test_optimizers_whose_state_cannot_be_grown(kind, damage, match):
    model = make("llama", tied=True)
    optim = kind(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    if damage:
        damage(model, optim)

    with pytest.raises(UnsupportedOptimizerError, match="(?s)" + match):
        grow(model, optim, to="2x")

    assert model.config.hidden_size == 24
    grow(model, optim, to="2x", state="drop")
    train(model, optim, 1)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(
        UnsupportedOptimizerError, match="has no parameter of this LlamaForCausalLM"
    ):
        grow(
            make("llama", tied=True),
            torch.optim.AdamW(make("llama", tied=True).parameters()),
            to="2x",
        )


def test_an_optimizer_that_was_not_handed_over_is_found():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optim, 1)

    with pytest.raises(
        UnsupportedOptimizerError,
        match="another live optimizer has state .*AdamW.*Pass that optimizer as optim",
    ):
        grow(model, to="2x")

    optim.state.clear()
    grow(model, to="2x")


def test_something_that_is_no_optimizer_or_model():
    model = make("llama", tied=True)

    with pytest.raises(GrowthError, match="optim: expected a torch.optim.Optimizer, got dict"):
        grow(model, {"lr": 1})
    with pytest.raises(GrowthError, match="model: expected a torch.nn.Module, got str"):
        growkern.expand_inplace("llama")
    with pytest.raises(PlanError, match="drives another optimizer"):
        optim = torch.optim.AdamW(model.parameters())
        other = torch.optim.lr_scheduler.StepLR(torch.optim.AdamW(model.parameters()), 1)
        grow(model, optim, to="2x", scheduler=other)
    with pytest.raises(PlanError, match="is not a learning-rate scheduler"):
        grow(model, torch.optim.AdamW(model.parameters()), to="2x", scheduler=object())
    with pytest.raises(PlanError, match="expected a width method"):
        grow(model, to="2x", width="Lossless")
    with pytest.raises(PlanError, match="expected a GrowthPlan"):
        grow(model, plan={})


def test_a_plan_of_another_model_is_refused():
    plan = growkern.plan(make("llama", tied=True), to="2x")

    for other in (
        make("llama", tied=True, intermediate_size=44),
        make("mistral", tied=False),
        make("gpt2", tied=True),
    ):
        with pytest.raises(PlanError, match="the plan is for a llama"):
            grow(other, plan=plan)


def broken(model, how):
    block = model.blocks[0]
    if how == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(block.up)
    elif how == "meta":
        block.up.to("meta")
    elif how == "complex":
        block.up.weight = torch.nn.Parameter(torch.zeros(96, 24, dtype=torch.complex64))
    elif how == "sparse":
        block.up.weight = torch.nn.Parameter(torch.zeros(96, 24).to_sparse())
    elif how == "integer":
        block.up.weight = torch.nn.Parameter(
            torch.zeros(96, 24, dtype=torch.int8), requires_grad=False
        )
    elif how == "quantized":
        block.up.weight = torch.nn.Parameter(
            torch.quantize_per_tensor(torch.zeros(96, 24), 1.0, 0, torch.qint8), requires_grad=False
        )
    elif how == "subclass":
        block.up.weight = type("Fancy", (torch.nn.Parameter,), {})(torch.zeros(96, 24))
    elif how == "shared":
        block.ln_2.weight = torch.nn.Parameter(block.ln_1.weight.data)
    elif how == "overlapping":
        block.up.weight = torch.nn.Parameter(torch.zeros(24).expand(96, 24))
    elif how == "view":
        flat = torch.zeros(48)
        block.ln_1.weight, block.ln_2.weight = (
            torch.nn.Parameter(flat[:24]),
            torch.nn.Parameter(flat[24:]),
        )
    elif how == "pruned":
        from torch.nn.utils import prune

        prune.random_unstructured(block.up, "weight", 0.5)
    return model


MODELS = {
    "parametrized": "up: is parametrized",
    "meta": "up.weight: is on the meta device",
    "complex": "up.weight: is torch.complex64",
    "sparse": "up.weight: is torch.sparse_coo",
    "integer": "up.weight: is torch.int8",
    "quantized": "up.weight: is quantized",
    "subclass": "up.weight: is a Fancy",
    "shared": "ln_2.weight: shares storage with blocks.0.ln_1.weight",
    "overlapping": r"up.weight: its elements overlap in memory \(strides \(0, 1\)\)",
    "view": "ln_2.weight: shares storage with blocks.0.ln_1.weight",
    "pruned": "up: is parametrized or pruned",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "match"), MODELS.items(), ids=MODELS)
def test_tensors_that_cannot_be_grown(how, match):
    model = make("plain", tied=True)
    spec = model.spec()

    with pytest.raises(UnsupportedModelError, match=match):
        growkern.expand_inplace(broken(model, how), spec=spec)


MAPS = {
    "beyond": dict(runs=[[0, 24, 0], [24, 24, 1]]),
    "gap": dict(runs=[[0, 24, 0], [25, 23, 0]]),
    "short": dict(runs=[[0, 24, 0]]),
    "before": dict(runs=[[0, 24, -2], [24, 24, 0]]),
    "empty": dict(runs=[[0, 48, 0], [48, 0, 0]]),
}


@pytest.mark.parametrize("change", MAPS.values(), ids=MAPS)
def test_a_plan_whose_maps_do_not_fit_is_not_read(change):
    plan = growkern.plan(make("llama", tied=True))
    data = json.loads(plan.to_json())
    key = next(key for key, axis in data["axes"].items() if axis["index_map"]["n_source"] == 24)
    data["axes"][key]["index_map"] |= change

    with pytest.raises(PlanError, match=r"index map.*(cannot have the run|end at)"):
        growkern.GrowthPlan.from_json(json.dumps(data))


def test_a_plan_whose_scales_do_not_fit_is_not_read():
    data = json.loads(growkern.plan(make("llama", tied=True)).to_json())
    next(iter(data["axes"].values()))["weight_scale"]["pieces"] = [[1.0, 3]]

    with pytest.raises(PlanError, match="has 3 weight scales and"):
        growkern.GrowthPlan.from_json(json.dumps(data))


def test_a_plan_for_tensors_of_other_shapes_changes_nothing():
    model = make("llama", tied=True)
    data = json.loads(growkern.plan(model).to_json())
    rows = {row["name"]: row for row in data["tensors"]}
    up, down = (rows[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    up["axes"], down["axes"] = down["axes"], up["axes"]
    before = {name: p.clone() for name, p in model.named_parameters()}

    with pytest.raises(
        PlanError, match=r"up_proj.weight: has shape \(48, 80\), the target needs \(80, 48\)"
    ):
        growkern.expand_inplace(model, plan=growkern.GrowthPlan.from_json(json.dumps(data)))

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def edit(path, value):
    """Return a function that sets one value in a plan's JSON; ``path`` is written like ``tensors/3/name``."""

    def edited(data):
        *parts, last = path.split("/")
        for part in parts:
            data = data[int(part) if isinstance(data, list) else part]
        data[int(last) if isinstance(data, list) else last] = value

    return edited


EDITS = {
    "a name": (edit("tensors/3/name", "model.norm.weight"), "rows are not the target's"),
    "an axis key": (edit("tensors/3/axes", ["no", "such"]), "has shape .*no.*such"),
    "a block": (edit("blocks/0/source", 7), "blocks are not the model's"),
    "the path": (edit("blocks_path", "model.nowhere"), "blocks are not the model's"),
    "an attribute": (edit("attributes/model.forward", 3), "attributes are not the sizes"),
    "a size": (edit("target_sizes/vocab", 70), "has shape|attributes"),
    "a tie": (edit("ties", {}), "ties or counters"),
    "the state": (edit("state", "maybe"), "state 'maybe' or dynamics"),
    "eps": (edit("eps", {"model.norm.variance_epsilon": -1.0}), "epsilon factors"),
    "another layer's shape": (
        edit("tensors/3/next_layer_source", "model.norm.weight"),
        "takes rows of model.norm",
    ),
    "another layer's name": (
        edit("tensors/3/next_layer_source", "no.such"),
        "takes rows of no.such",
    ),
}


@pytest.mark.parametrize(("change", "match"), EDITS.values(), ids=EDITS)
def test_a_plan_that_a_hand_has_edited_changes_nothing(change, match):
    model = make("llama", tied=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = json.loads(growkern.plan(model, to={"hidden": 48, "layers": 3}).to_json())
    change(data)

    with pytest.raises(PlanError, match=match):
        growkern.expand_inplace(model, plan=growkern.GrowthPlan.from_json(json.dumps(data)))

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["weight_scale", "grad_scale", "noise"])
def test_a_plan_with_numbers_that_are_none_is_not_read(key, value):
    data = json.loads(growkern.plan(make("llama", tied=True)).to_json())
    axis = next(iter(data["axes"].values()))
    n = axis["index_map"]["n_target"]
    axis[key] = value if key == "noise" else {"pieces": [[value, n]]}

    with pytest.raises(PlanError, match="scales or noise that are not numbers"):
        growkern.GrowthPlan.from_json(json.dumps(data))


def shared_blocks():
    model = make("plain", tied=True)
    model.blocks[1] = model.blocks[0]
    spec = model.spec()
    layers = {
        name: name.replace("blocks.1.", "blocks.0.")
        for name in spec.tensors
        if name.startswith("blocks.1.")
    }
    tensors = {name: spec.tensors[layers.get(name, name)] for name in spec.tensors}
    attributes = {name: size for name, size in spec.attributes.items() if name not in layers}
    return model, replace(
        spec, tensors=tensors, ties=dict(spec.ties) | layers, attributes=attributes
    )


def test_blocks_that_are_one_module_are_refused():
    model, spec = shared_blocks()

    with pytest.raises(UnsupportedModelError, match="blocks: layers share one module"):
        growkern.expand_inplace(model, spec=spec, to={"layers": 4})


def test_blocks_that_are_one_module_grow_in_width():
    model, spec = shared_blocks()
    before = model(batch())

    growkern.expand_inplace(model, spec=replace(spec, blocks=None))

    assert torch.allclose(model(batch()), before, atol=1e-5)


def test_tensors_on_several_devices_are_refused():
    model = make("plain", tied=True)
    spec = model.spec()
    model.wpe.to("meta")

    with pytest.raises(
        UnsupportedModelError, match="several devices .*wte.weight on cpu, wpe.weight on meta"
    ):
        growkern.expand_inplace(model, spec=spec)


def refused(what: str, log: Path) -> list[str]:
    """Return what the process of ``refused_worker.py`` prints."""
    processes.end([processes.start("refused_worker", what, log=log)], log)
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith(("REFUSED", "GREW"))]


@processes.together
@pytest.mark.slow
def test_live_wrappers_are_refused(tmp_path):
    found = refused("wrapped", tmp_path / "log")

    assert len(found) == 2
    for line, match in zip(
        found, ["FSDP1 keeps flat parameters: use fully_shard", "is a DataParallel"], strict=True
    ):
        assert match in line and "not supported yet" in line


@processes.together
@pytest.mark.slow
def test_models_with_adapters_are_refused_and_merged_ones_grow(tmp_path):
    *found, last = refused("adapters", tmp_path / "log")

    kinds = [
        "the model is a PeftModel",
        "the model is a BaseTuner",
        "is a BaseTunerLayer",
        "is a BaseTunerLayer",
    ]
    assert len(found) == 4 and last == "GREW 48"
    assert all(kind in line for kind, line in zip(kinds, found, strict=True)), found


@processes.together
@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")
def test_a_deepspeed_engine_is_refused_around_the_model_too(tmp_path):
    found = refused("engine", tmp_path / "log")

    assert "the model is a DeepSpeedEngine" in found[0]
    assert "a DeepSpeedEngine around the model" in found[1], found


def test_growth_during_the_capture_of_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    with pytest.raises(UnsupportedModelError, match="CUDA graph is being captured"):
        grow(make("llama", tied=True))


def test_depth_is_refused_where_a_block_depends_on_its_place():
    with pytest.raises(PlanError, match="scale_attn_by_inverse_layer_idx"):
        grow(make("gpt2", tied=True, scale_attn_by_inverse_layer_idx=True), to={"layers": 4})


def test_identity_blocks_need_to_know_what_makes_one():
    model = Plain()
    spec = changed(model.spec(), blocks=growkern.Blocks("blocks"))

    with pytest.raises(PlanError, match="does not list the tensors to zero"):
        growkern.expand_inplace(model, spec=spec, to={"layers": 3})


def test_a_plan_and_a_wish_are_one_too_many():
    model = make("llama", tied=True)

    with pytest.raises(
        PlanError, match="leave to=, width=, depth=, state=, dynamics= and seed= out"
    ):
        grow(model, plan=growkern.plan(model, to="1.5x"), to={"hidden": 48})
    for text in ("{}", "x", "[]"):
        with pytest.raises(PlanError, match="cannot read the plan"):
            growkern.GrowthPlan.from_json(text)


def test_a_block_with_a_patched_forward_is_not_copied():
    model = make("llama", tied=True)
    layer = model.model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)

    with pytest.raises(UnsupportedModelError, match="model.layers.0.mlp.*Remove the patch"):
        grow(model, to={"layers": 4})

    grow(model, to="2x")  # width copies no module


def test_a_backbone_whose_head_is_elsewhere_is_refused():
    model = make("llama", tied=True)

    with pytest.raises(
        UnsupportedModelError, match="Linear .embed_tokens.weight.*Pass the whole model"
    ):
        growkern.expand_inplace(model.model, to="2x")

    assert model.config.hidden_size == 24


def test_what_cannot_be_copied_and_sparse_gradients_are_named():
    import threading

    model = make("plain", tied=True)
    model.blocks[0].lock = threading.Lock()
    with pytest.raises(GrowthError, match="cannot copy block blocks.0"):
        grow(model, to={"layers": 4})
    assert len(model.blocks) == 2

    model.wpe.weight.grad = torch.zeros(64, 24).to_sparse()
    with pytest.raises(UnsupportedModelError, match="wpe.weight: has a sparse gradient"):
        grow(model, to="2x")
