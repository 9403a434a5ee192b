"""A plan is data that can be printed, compared, stored and run later."""

import subprocess
import sys
from itertools import chain, product
from math import ceil
from pathlib import Path

import families_oracle
import pytest
import torch
from models import FAMILIES, grow, make, spec_of

import growkern
from growkern import GrowthPlan, depth, width
from growkern.errors import PlanError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["2x", {"layers": 5}, {"ffn": 101}], ids=str)
def test_a_plan_goes_through_json_unchanged(family, to):
    model = make(family, tied=True)
    plan = growkern.plan(model, to=to, spec=spec_of(model))

    again = GrowthPlan.from_json(plan.to_json())

    assert again == plan and hash(again) == hash(plan) and again.to_json() == plan.to_json()


def test_equal_inputs_give_equal_plans_and_equal_bits_and_another_seed_does_not():
    def grown(seed):
        model = make("llama", tied=True)
        plan = growkern.plan(model, to="2x", seed=seed)
        grow(model, plan=plan)
        return plan, torch.cat([p.detach().flatten() for p in model.parameters()])

    (plan, bits), (again, same), (other, differ) = grown(3), grown(3), grown(4)

    assert plan == again and torch.equal(bits, same)
    assert plan != other and not torch.equal(bits, differ)


def test_a_stored_plan_grows_to_the_same_bits():
    one, two = make("gpt2", tied=True), make("gpt2", tied=True)
    plan = growkern.plan(one, to={"hidden": 30, "layers": 3})

    grow(one, plan=plan)
    grow(two, plan=GrowthPlan.from_json(plan.to_json()))

    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_planning_changes_nothing_and_printing_tells_the_story():
    model = make("llama", tied=True)
    before = [p.clone() for p in model.parameters()]

    text = str(growkern.plan(model, to={"hidden": 48, "layers": 3}))

    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for part in (
        "hidden",
        "24",
        "48",
        "x 2",
        "0 1 +1",
        "model.layers.*.mlp.up_proj.weight",
        "preserves the function",
        "all 0",
    ):
        assert part in text


def test_what_is_not_named_follows_hidden_where_that_is_whole():
    def sizes(to, **changes):
        return dict(growkern.plan(make("llama", tied=True, **changes), to=to).target_sizes)

    assert sizes("2x") == dict(
        hidden=48, heads=8, kv_heads=4, head_dim=6, ffn=80, layers=2, vocab=66
    )
    assert sizes("1.5x") == dict(
        hidden=36, heads=6, kv_heads=3, head_dim=6, ffn=60, layers=2, vocab=66
    )
    assert sizes({"hidden": 30}) == dict(
        hidden=30, heads=4, kv_heads=2, head_dim=6, ffn=50, layers=2, vocab=66
    )
    assert sizes({"hidden": 48, "ffn": 41})["ffn"] == 41
    assert sizes({"hidden": "2x", "layers": "3x"})["layers"] == 6
    assert sizes({"heads": 8})["kv_heads"] == 2
    assert sizes("1.5x", num_key_value_heads=1)["heads"] == 4  # one kv head does not grow by half


@pytest.mark.parametrize(("n", "target"), [(4, 6), (4, 7), (4, 8), (3, 10), (12, 16), (32, 40)])
def test_identity_blocks_lie_where_llama_pro_puts_them(n, target):
    blocks = depth.IdentityBlocks().deepen(n, target).blocks

    assert len(blocks) == target and [b.source for b in blocks if not b.new] == list(range(n))
    assert not blocks[0].new and [b.source for b in blocks] == sorted(b.source for b in blocks)
    if n % (target - n) == 0:  # LLaMA Pro's rule needs equal groups of blocks
        every = n // (target - n)
        assert [b.source for b in blocks if b.new] == [i for i in range(n) if (i + 1) % every == 0]


def test_stack_is_l_mod_n():
    assert [b.source for b in depth.Stack().deepen(3, 7).blocks] == [0, 1, 2, 0, 1, 2, 0]


def test_middle_is_the_operator_of_midas():
    """f_n ... f_ceil(n/2) f_ceil(n/2) ... f_1, from a model f_n ... f_1 of blocks of equal size (arXiv:2409.19044), stage by stage."""
    for n, size, stages in product(range(1, 8), range(1, 4), range(4)):
        parts = [[*range(i * size, (i + 1) * size)] for i in range(n)]
        for _ in range(stages):
            half = ceil(len(parts) / 2)
            parts = parts[:half] + parts[half - 1 :]

        made = depth.Middle(size).deepen(n * size, (n + stages) * size)

        assert [block.source for block in made.blocks] == [*chain(*parts)]


@pytest.mark.parametrize(
    ("method", "n", "target", "expected"),
    [
        (depth.Stack(), 3, 6, "0 1 2 +0 +1 +2"),
        (depth.Stack(), 3, 8, "0 1 2 +0 +1 +2 +0 +1"),
        (depth.Stack(remainder="top"), 3, 8, "0 1 2 +0 +1 +2 +1 +2"),
        (depth.Stack(ignore_first=1, ignore_last=1), 4, 8, "0 1 2 +1 +2 +1 +2 3"),
        (depth.Interpose(), 3, 6, "0 +0 1 +1 2 +2"),
        (depth.Interpose(), 3, 4, "0 +0 1 2"),
        (depth.Interpose(ignore_first=1), 3, 5, "0 1 +1 2 +2"),
        (depth.DepthUpscale(), 4, 6, "0 1 2 +1 +2 3"),
        (depth.DepthUpscale(), 4, 8, "0 1 2 3 +0 +1 +2 +3"),
        (depth.TopCopies(), 4, 6, "0 1 2 3 +2 +3"),
        (depth.TopCopies(), 2, 5, "0 1 +0 +1 +0"),
        (depth.TopCopies(n=1), 4, 6, "0 1 2 3 +3 +3"),
        (depth.Layers((0, 1, 0, 1, 2)), 3, 5, "0 1 +0 +1 2"),
        (depth.Middle(), 1, 2, "0 +0"),
        (depth.Middle(), 4, 8, "0 1 2 3 +0 +1 +2 +3"),
        (depth.Middle(), 4, 6, "0 1 +0 +1 2 3"),
        (depth.Middle(), 6, 8, "0 1 2 3 +2 +3 4 5"),
        (depth.Middle(size=2), 4, 8, "0 1 +0 +1 +0 +1 2 3"),
        (depth.Middle(size=1), 3, 5, "0 1 +1 +1 2"),
    ],
    ids=str,
)
def test_depth_methods_order_layers_as_published(method, n, target, expected):
    found = method.deepen(n, target)

    assert " ".join("+" * b.new + str(b.source) for b in found.blocks) == expected
    unchanged = depth.Layers(range(n)) if isinstance(method, depth.Layers) else method
    assert found.reasons and not unchanged.deepen(n, n).reasons


@pytest.mark.parametrize(
    ("method", "n", "target", "match"),
    [
        (depth.Stack(remainder="middle"), 2, 4, "'bottom' or 'top'"),
        (depth.Stack(ignore_first=1, ignore_last=1), 2, 4, "leave none of the 2 layers"),
        (depth.Interpose(ignore_first=-1), 2, 4, "leave none"),
        (depth.DepthUpscale(), 4, 7, "an even number up to 8, not to 7; use Interpose"),
        (depth.DepthUpscale(), 4, 10, "an even number up to 8, not to 10"),
        (depth.TopCopies(n=5), 4, 6, "n=5 is not a number of layers of this model; pass 1 to 4"),
        (
            depth.Middle(),
            3,
            5,
            "size=2 is not the size of equal blocks of 3 layers that reach 5; pass 1",
        ),
        (depth.Middle(size=4), 6, 8, "pass 1, 2"),
        (depth.Middle(size=2), 4, 7, "pass 1"),
        (depth.Layers((0, 1)), 2, 3, "the order has 2 layers, and the target 3"),
        (depth.Layers((0, 0, 1)), 3, 3, "layers 2 are left out"),
        (depth.Layers((1, 0, 2)), 3, 3, "not in ascending order"),
        (depth.Layers((0, 1, 3)), 2, 3, "layers 3 are left out, or not in"),
    ],
    ids=str,
)
def test_depth_methods_say_what_they_cannot(method, n, target, match):
    with pytest.raises(PlanError, match=match):
        method.deepen(n, target)


def test_plans_need_neither_torch_nor_triton():
    code = """
import sys
for name in ("torch", "triton", "transformers"):
    sys.modules[name] = None
import types
package = types.ModuleType("growkern")
package.__path__ = [sys.argv[1]]
sys.modules["growkern"] = package
sys.path.append(sys.argv[2])
import families_oracle
from growkern import width, depth
from growkern.optimizer import state_rules as state
from growkern.planning import build as law
from growkern.planning import index_map
from growkern.planning import sizes
from growkern.model import families
from growkern.model import spec as spaces
config = types.SimpleNamespace(model_type="llama", hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, vocab_size=66, tie_word_embeddings=True, head_dim=6)
assert "LlamaForCausalLM" in families.FAMILIES
spec = families_oracle.SPECS["LlamaForCausalLM"](config)
made = law.build(spec, sizes.resolve_sizes(spec, "2x"), width=width.Lossless(), depth=depth.IdentityBlocks())
print(made.target_sizes["hidden"])
"""
    folder, oracle = growkern.__path__[0], families_oracle.__path__[0]

    done = subprocess.run(
        [sys.executable, "-c", code, folder, str(Path(oracle).parent)],
        capture_output=True,
        text=True,
        cwd="/",
    )

    assert done.stdout.strip() == "48", done.stderr


def test_methods_say_what_they_are():
    assert repr(width.Lossless(noise=0)) == "Lossless(noise=0, norms=None)"
    assert width.Lossless() == width.Lossless() and hash(depth.Stack()) == hash(depth.Stack())
