"""Models of the zoo: those of transformers that no family describes, and those of other code, where it is installed."""

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import zoo
import zoo_models
from readme import README
from zoo_published import PUBLISHED

import growkern
from growkern.errors import PlanError, UnsupportedModelError
from growkern.model.size_values import Sum

HIDDEN, HEADS = {"hidden", "ffn", "heads"}, {"hidden", "ffn", "heads", "kv_heads"}
GROWS = {  # sizes that grow
    "deepseek_v3": {
        "hidden",
        "heads",
        "ffn",
        "ffn2",
        "ffn3",
        "ffn4",
    },  # head_dim of its config is no size of it
    "mamba2": {"hidden", "heads", "kv_heads"},
    "llama4_text": {*HEADS, "ffn2"},
    "gemma3n": {*HEADS, "ffn3"},
    "jamba": {*HEADS, "ffn2", "ffn3"},
    "whisper": {"hidden", "ffn", "ffn2", "heads"},
    "qwen3_next": HEADS,
    "lfm2": HEADS,
    "recurrent_gemma": {"hidden", "ffn", "ffn3", "heads"},
    "dinov2": HIDDEN,
    "qwen3_vl": {*HEADS, "hidden2", "ffn2", "ffn3"},
    "nanogpt": HIDDEN,
    "nanochat": {"ffn3", "heads", "kv_heads"},  # its forward slices hidden by a literal
    "litgpt_llama": HEADS,
    "litgpt_pythia": HIDDEN,
    "torchtune_llama3": HEADS,
    "x_transformers": {"hidden", "ffn"},  # a closure holds its heads
    "timm_vit": HIDDEN,
    "timm_eva02": {"hidden", "hidden2", "heads"},
    "torch_transformer": HIDDEN,
}
NO_CONFIG = "bloom", "stablelm", "lfm2", "swin"  # no config builds the grown model
TOGETHER = ("qwen3_vl",)  # a config grows some sizes with others only


@pytest.mark.parametrize("name", [n for n in [*zoo.ZOO, *PUBLISHED] if n != "wav2vec2"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # packages warn, such as torchtune of its norms in float64
def test_model_of_the_zoo_grows_exactly_and_loads_again(name):
    try:
        spec = zoo.describe(name, zoo.make(name))
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    deeper = {stack.size: spec.sizes[stack.size] + 1 for stack in spec.stacks}
    twice = zoo.targets(spec, 2.0)
    assert twice.keys() == GROWS.get(name, twice.keys())

    error, model, before, given = zoo.grown(name, twice | deeper)

    assert error < 1e-5  # norms of transformers round to float32, and post-norm blocks have epsilons  # fmt: skip
    assert bool(spec.reload_problem) == (name in NO_CONFIG + TOGETHER)
    if name not in PUBLISHED and name not in NO_CONFIG:
        again = type(model)(model.config).double().eval()
        again.load_state_dict(model.state_dict())
        assert zoo.difference(zoo.output(again, given), before) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "siglip_vision", "mamba"])
def test_state_after_a_growth_is_that_of_the_gradients_of_the_grown_model(name):
    spec = zoo.describe(name, zoo.make(name))

    assert zoo.state_error(name, zoo.targets(spec, 2.0)) < 1e-5


def test_an_attribute_that_is_a_sum_of_sizes_grows_as_the_sum():
    spec = growkern.describe(zoo.make("mamba2"))
    width = "backbone.layers.0.mixer.conv_dim"

    assert spec.attributes[width] == Sum((("heads", 12), ("kv_heads", 20)))
    plan = growkern.plan(zoo.make("mamba2"), to=zoo.targets(spec, 2.0))

    assert plan.attributes[width] == 16 * 12 + 4 * 20
    wrong = replace(spec, attributes={width: Sum((("heads", 12), ("states", 20)))})
    with pytest.raises(UnsupportedModelError, match="the size 'states' is not in sizes"):
        growkern.plan(zoo.make("mamba2"), spec=wrong, to="2x")


def test_entries_of_lists_in_a_config_are_sizes_of_the_model():
    model = zoo.make("gemma3n")
    spec = growkern.describe(model)
    assert {spec.config[f"intermediate_size[{i}]"] for i in (0, 1)} == {"ffn"}

    growkern.expand_inplace(model, to={"ffn": 120})

    assert model.config.intermediate_size == [120, 120]
    assert "a longer model other blocks or tensors" in spec.fixed["layers"]  # a tensor is as long as all blocks  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "fields"),
    [
        ("dinov2", "ffn", {"mlp_ratio": 3}),
        ("jamba", "ffn", {"mamba_expand": 3, "intermediate_size": 80}),
        ("gptj", "ffn", {"n_inner": 288}),
    ],
)
def test_a_size_that_a_config_computes_from_hidden_grows_alone_and_loads(name, size, fields):
    model = zoo.make(name)
    spec = growkern.describe(model)

    growkern.expand_inplace(model, to={size: 3 * spec.sizes[size] // 2})

    assert {field: getattr(model.config, field) for field in fields} == fields
    again = type(model)(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(zoo.output(again, spec.example), zoo.output(model, spec.example))


def test_a_ratio_that_an_int_of_a_config_cannot_hold_is_refused():
    model = zoo.make("dinov2")

    with pytest.raises(PlanError, match=r"config\.mlp_ratio: is the int 2, and would be 2\.5"):
        growkern.expand_inplace(model, to={"ffn": 120})


def test_sizes_that_a_config_grows_together_are_named():
    spec = growkern.describe(zoo.make("qwen3_vl"), inputs=zoo.example("qwen3_vl"))

    assert "where ffn2 alone grows" in spec.reload_problem
    assert f"may not load: {spec.reload_problem}" in str(spec)


@pytest.mark.parametrize(
    ("name", "to", "noted"),
    [
        ("bloom", {"layers": 4}, False),
        ("bloom", {"ffn": 288}, True),
        ("qwen3_vl", {"layers": 4, "ffn3": 160}, False),
        ("qwen3_vl", {"ffn2": 256}, True),
    ],
)
def test_a_report_says_that_a_checkpoint_may_not_load_where_sizes_grow_that_do_not(name, to, noted):
    model = zoo.make(name)
    spec = growkern.describe(model, inputs=zoo.example(name))
    assert spec.reload_problem

    report = growkern.expand_inplace(model, to=to, spec=spec)

    assert (f"may not load: {spec.reload_problem}" in str(report)) == noted
    again = type(model)(model.config).double().eval()
    with pytest.raises(RuntimeError, match="size mismatch") if noted else nullcontext():
        again.load_state_dict(model.state_dict())
        assert torch.equal(zoo.output(again, spec.example), zoo.output(model, spec.example))


def test_a_root_of_a_size_in_bfloat16_stays_one_after_a_growth():
    model = zoo.make("recurrent_gemma")
    before = zoo.output(model, growkern.describe(model).example)

    growkern.expand_inplace(model, to=zoo.targets(growkern.describe(model), 2.0))

    assert float(model.model.normalizer) == float(torch.tensor(96**0.5, dtype=torch.bfloat16))
    after = zoo.output(model, growkern.describe(model).example)
    assert zoo.difference(after, before) < 1e-6  # the root of 96 itself would be 1e-3 off


def test_a_parametrized_weight_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"pos_conv_embed\.conv: is parametrized"):
        growkern.describe(zoo.make("wav2vec2"))


def test_patches_are_masked_where_a_mask_token_would_not_be_reached():
    model = zoo.make("dinov2")
    spec = growkern.describe(model)

    assert 0 < int(spec.example["bool_masked_pos"].sum()) < spec.example["bool_masked_pos"].numel()
    with pytest.raises(UnsupportedModelError, match="mask_token: the forward does not use it"):
        growkern.describe(zoo.make("dinov2"), inputs={"pixel_values": torch.randn(2, 3, 32, 32).double()})  # fmt: skip


def test_readme_has_the_row_of_every_model():
    rows = re.findall(
        r"^\| (\w+) \| ([\w, ]*) \| \S* ?\| .*$",
        README.partition("51 models</summary>")[2],
        re.MULTILINE,
    )
    short = {name: {s.replace("kv_heads", "kv") for s in sizes} for name, sizes in GROWS.items()}

    assert [name for name, _ in rows] == ["model", *zoo_models.MODELS, *PUBLISHED]
    assert {name: {*sizes.split(", ")} for name, sizes in rows if name in short} == short
