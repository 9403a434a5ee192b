"""``growkern grow --recipe``: a recipe makes the same checkpoint of the same source, bit for bit, and no other."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
import zoo
from models import make
from saved import contents, invoke, said, save

import growkern
from growkern import width
from growkern.checkpoints import grow as module
from growkern.checkpoints.grow import grow, plan_for
from growkern.checkpoints.load import load
from growkern.checkpoints.recipe import RECIPE, read_recipe
from growkern.errors import PlanError
from growkern.planning.growth_plan import GrowthPlan


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source")
    return tmp_path / "source"


GROWTHS = {
    "default": [],
    "noise and shards": [
        "--to", "hidden=36,layers=3", "--width", "Lossless(noise=0.5)", "--depth", "Stack", "--seed", 7, "--max-shard-size", "50KB",
    ],
    "drawn": ["--to", "2x", "--width", "ShrinkPerturb(std=0.1)"],
}  # fmt: skip


@pytest.mark.parametrize("options", GROWTHS.values(), ids=GROWTHS)
def test_the_recipe_of_a_growth_makes_the_same_checkpoint(options, source, tmp_path):
    assert invoke("grow", source, tmp_path / "one", *options).exit_code == 0

    again = invoke("grow", source, tmp_path / "two", "--recipe", tmp_path / "one" / RECIPE)

    assert again.exit_code == 0, again.output
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    fields = yaml.safe_load((tmp_path / "one" / RECIPE).read_text())
    assert "plan" not in fields and fields["source"] == "source" and fields["dtype"] == "float32"
    assert fields["growkern"] == growkern.__version__


def test_the_second_growth_of_a_model_that_is_traced_has_a_recipe_of_its_own(tmp_path):
    zoo.make("phi3").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "first")
    grow(tmp_path / "first", tmp_path / "one", width=width.HyperClone(noise_db=10))
    assert read_recipe(tmp_path / "one" / RECIPE).seed == 1

    grow(tmp_path / "first", tmp_path / "two", recipe=read_recipe(tmp_path / "one" / RECIPE))

    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert read_recipe(tmp_path / "one" / RECIPE).dtype == "bfloat16"


@pytest.mark.parametrize("asked", ["options", "recipe", "plan", "recipe with a plan"])
def test_a_growth_is_planned_once(asked, source, tmp_path, monkeypatch):
    plan = plan_for(load(source, mapped=True), to={"hidden": "2x", "ffn": 40})
    grow(source, tmp_path / "one", width=width.AKI())
    recipe, with_plan = read_recipe(tmp_path / "one" / RECIPE), tmp_path / "other"
    grow(source, with_plan, plan=plan)
    calls = list[object]()
    monkeypatch.setattr(module, "plan_growth", lambda *a, **k: calls.append(a) or growkern.plan(*a, **k))  # fmt: skip

    options = {
        "options": dict(width=width.AKI()), "recipe": dict(recipe=recipe), "plan": dict(plan=plan),
        "recipe with a plan": dict(recipe=read_recipe(with_plan / RECIPE)),
    }  # fmt: skip
    grow(source, tmp_path / "two", **options[asked])

    assert len(calls) == 1
    expected = with_plan if "plan" in asked else tmp_path / "one"
    assert read_recipe(with_plan / RECIPE).plan is not None
    assert contents(tmp_path / "two") == contents(expected)


def test_sizes_that_do_not_follow_are_in_the_recipe_as_a_plan(source, tmp_path):
    grow(source, tmp_path / "one", to={"hidden": "2x", "ffn": 40})  # ffn would follow hidden
    recipe = read_recipe(tmp_path / "one" / RECIPE)
    assert recipe.to == {"heads": 8, "hidden": 48, "kv_heads": 4} and recipe.plan is not None

    grow(source, tmp_path / "two", recipe=recipe)

    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@dataclass(frozen=True)
class Mine(width.HyperClone):
    """A method that no text names."""


def test_a_method_that_text_does_not_represent_is_in_the_recipe_as_a_plan(source, tmp_path):
    grow(source, tmp_path / "one", width=Mine(noise_db=5), seed=3)
    recipe = read_recipe(tmp_path / "one" / RECIPE)
    assert recipe.plan is not None and GrowthPlan.from_json(recipe.plan).width.startswith("Mine(")

    grow(source, tmp_path / "two", recipe=recipe)

    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_method_of_the_name_of_another_one_is_in_the_recipe_as_a_plan(source, tmp_path):
    other = dataclass(frozen=True)(type("HyperClone", (width.HyperClone,), {}))

    grow(source, tmp_path / "one", width=other(noise_db=5))

    recipe = read_recipe(tmp_path / "one" / RECIPE)
    assert recipe.plan is not None and recipe.width.startswith("HyperClone(")


def test_a_recipe_by_hand_is_the_options_of_the_command_line(source, tmp_path):
    (tmp_path / "grow.yaml").write_text(
        "to: {hidden: 36, ffn: 2x}\nwidth: Net2Wider(noise=0.1)\nseed: 5\n"
    )

    by_recipe = invoke("grow", source, tmp_path / "one", "--recipe", tmp_path / "grow.yaml")

    assert by_recipe.exit_code == 0, by_recipe.output
    options = ("--to", "hidden=36,ffn=2x", "--width", "Net2Wider(noise=0.1)", "--seed", 5)
    assert invoke("grow", source, tmp_path / "two", *options).exit_code == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_recipe_of_another_source_is_refused(source, tmp_path):
    grow(source, tmp_path / "one")
    save(tmp_path / "wider", intermediate_size=64)
    make("llama", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    recipe = tmp_path / "one" / RECIPE

    wider = invoke("grow", tmp_path / "wider", tmp_path / "two", "--recipe", recipe)
    narrow = invoke("grow", tmp_path / "narrow", tmp_path / "two", "--recipe", recipe)

    assert wider.exit_code == narrow.exit_code == 1 and not (tmp_path / "two").exists()
    assert "digest: is " in said(wider) and "the source is another one" in said(wider)
    assert "dtype: is float32, and the source stores bfloat16" in said(narrow)


WRONG = {
    "to: {hidden: 2.5}": "to is {'hidden': 2.5}; write 2x, or a mapping",
    "to: 3": "to is 3; write 2x",
    "to: [2x]": "to is ['2x']",
    "to: {hidden: true}": "to is {'hidden': True}",
    "seed: -1": "seed is -1; write an int",
    "seed: 2026-01-01": "seed is datetime.date(2026, 1, 1)",
    "depht: Stack": "'depht' is no field of a recipe; the fields are to, width, depth",
    "width: 3": "width is 3; write a text",
    "version: 2": "version is 2, and this growkern reads 1",
    "- to": "is no mapping",
    "": "is no mapping",
    "a: [": "is no YAML",
    "a: 2026-99-99": "is no YAML",
    "a: !!python/name:os.system": "is no YAML",
    "[" * 5000: "is no YAML",
}


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=[text[:20] for text in WRONG])
def test_what_is_no_recipe_is_refused(text, said, tmp_path):
    (tmp_path / "grow.yaml").write_text(text)

    with pytest.raises(PlanError) as caught:
        read_recipe(tmp_path / "grow.yaml")

    assert said in str(caught.value)


def test_a_recipe_takes_the_place_of_options_and_plans(source, tmp_path):
    (tmp_path / "grow.yaml").write_text("width: Nothing()\n")
    grown = "grow", source, tmp_path / "out", "--recipe", tmp_path / "grow.yaml"

    unknown = invoke(*grown)
    twice = invoke(*grown, "--to", "2x")
    (tmp_path / "plan.json").write_text("{}")
    both = invoke(*grown, "--plan", tmp_path / "plan.json")

    assert unknown.exit_code == 1 and "there is no method 'Nothing'" in said(unknown)
    assert twice.exit_code == 2 and "leave --to, --width" in said(twice)
    assert both.exit_code == 2 and "--recipe out" in said(both)
    assert not (tmp_path / "out").exists()
