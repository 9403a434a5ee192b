"""Every family: the function is preserved, everything trains, and differential probing agrees with the description."""

import copy
import dataclasses

import pytest
import torch
import transformers
from models import FAMILIES, batch, exact_norms, grow, logits, loss_of, make, spec_of, train

import growkern
from growkern import depth, width
from growkern.errors import PlanError

DECODERS = [f for f in FAMILIES if f != "bert"]
TARGETS = {
    "2x": "2x",
    "3x": "3x",
    "1.5x": "1.5x",
    "awkward": {"hidden": 42, "ffn": 101},
    "awkward-and-deeper": {"hidden": 30, "ffn": 99, "layers": 5},
    "2x-and-deeper": {"hidden": 48, "layers": 3},
    "deeper": {"layers": 5},
    "positions": {"positions": 100},
    "ffn": {"ffn": 131},
    "2.5x": "2.5x",
}
BERT_TARGETS = ["2x", "3x", "2x-and-deeper", "deeper", "ffn", "positions"]
CASES = [
    (f, t) for f in DECODERS for t in TARGETS if t != "positions" or f in ("gpt2", "plain")
] + [("bert", t) for t in BERT_TARGETS]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "target"), CASES, ids=lambda v: v)
def test_growth_preserves_the_function_in_float64(family, target, tied, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=tied).double().eval()
    ids = batch()
    before = logits(model, ids).detach()

    report = grow(model, to=TARGETS[target])

    assert report.function_preserving
    assert (logits(model, ids) - before).abs().max() < 1e-10
    assert (
        sum(p.numel() for p in model.parameters())
        == report.n_params_target
        > report.n_params_source
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_preserves_the_function_in_float32(family):
    model = make(family, tied=True).eval()
    ids = batch()
    before = logits(model, ids).detach()

    grow(model, to={"hidden": 48, "layers": 3})

    error = (logits(model, ids) - before).abs().max()
    assert error < 1e-5 * max(1.0, before.abs().max())


@pytest.mark.parametrize(
    ("family", "norms"),
    [("llama", "isometric"), ("llama", "zero_pad"), ("gpt2", "mean_pad"), ("gpt2", "centre_pad")],
    ids=lambda v: v,
)
@pytest.mark.parametrize("hidden", [30, 42, 54])
def test_every_norm_rule_is_exact_at_awkward_widths(family, norms, hidden, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=False).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": hidden}, width=width.Lossless(norms=norms))

    assert (logits(model, batch()) - before).abs().max() < 1e-10


@pytest.mark.parametrize(("family", "hidden"), [("bert", 30), ("bert", 36), ("bert", 60)])
def test_post_norm_hidden_is_refused_with_the_nearest_multiples(family, hidden):
    low = hidden // 24 * 24

    with pytest.raises(PlanError, match=f"nearest whole multiples: {low}, {low + 24}"):
        grow(make(family, tied=True), to={"hidden": hidden})


@pytest.mark.parametrize("target", ["2x", "1.5x", "awkward-and-deeper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_trains_within_two_steps_and_the_optimizer_fits(family, target):
    if family == "bert" and target != "2x":
        target = "2x-and-deeper"
    model = make(family, tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    source = copy.deepcopy(model)

    grow(model, optim, to=TARGETS[target])
    found = growkern.verify(source, model, batch(n=16), optim)

    assert found.ok, str(found)
    assert not found.copies, str(found)


@pytest.mark.parametrize("norms", ["zero_pad", "centre_pad"])
def test_pads_train_within_two_steps(norms):
    model = make("llama" if norms == "zero_pad" else "gpt2", tied=False).double()
    source = copy.deepcopy(model)

    grow(model, to="1.5x", width=width.Lossless(norms=norms))
    found = growkern.verify(source, model, batch(n=16))

    assert found.ok, str(found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_copies_differ_after_fifty_steps_by_default_and_never_without_noise(family):
    def grown(noise: float) -> torch.nn.Module:
        model = make(family, tied=True)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        grow(model, optim, to="2x", width=width.Lossless(noise=noise))
        train(model, optim, 50)
        return model

    broken, equal = grown(1.0), grown(0.0)

    for name, p in broken.named_parameters():
        if (
            p.dim() == 2
            and "position" not in name
            and "wpe" not in name
            and "token_type" not in name
        ):
            assert not _has_equal_columns(p), name
    assert any(_has_equal_columns(p) for p in equal.parameters() if p.dim() == 2)


def _has_equal_columns(p: torch.Tensor) -> bool:
    return len(torch.unique(p.detach(), dim=1).T) < p.shape[1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "bert"])
def test_a_saved_grown_model_loads_with_equal_logits(family, tmp_path):
    model = make(family, tied=True).eval()
    grow(model, to={"hidden": 48, "layers": 3} if family == "bert" else {"hidden": 36, "layers": 3})

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)

    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    error = (logits(loaded.eval(), batch()) - logits(model, batch())).abs().max()
    assert (
        error == 0 if family != "qwen3" else error < 1e-4
    )  # qwen3: one eps in the config for norms of two widths


def test_the_report_says_when_a_config_field_feeds_norms_of_two_widths():
    report = grow(make("qwen3", tied=True), to="1.5x")

    assert any("rms_norm_eps" in note for note in report.notes)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_generation_with_a_cache_equals_generation_without(family):
    model = make(family, tied=True).eval()
    grow(model, to={"hidden": 36, "layers": 5})
    ids = batch(n=1)[:, :4]
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)

    with_cache, without = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **options)
        for c in (True, False)
    )

    assert torch.equal(with_cache, without)


def test_layer_types_follow_their_blocks():
    model = make(
        "qwen2",
        tied=True,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    ids = batch()
    before = logits(model, ids).detach()

    grow(model, to={"layers": 4})

    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert (logits(model, ids) - before).abs().max() < 1e-5


def test_stacking_is_said_not_to_preserve_the_function_and_copies_blocks():
    model = make("llama", tied=True)
    before = logits(model, batch()).detach()

    report = grow(model, to={"layers": 4}, depth=depth.Stack())

    assert not report.function_preserving and "stack" in str(report)
    assert (logits(model, batch()) - before).abs().max() > 1e-3
    for i in range(2):
        for (name, p), (_, q) in zip(
            model.model.layers[i].named_parameters(),
            model.model.layers[i + 2].named_parameters(),
            strict=True,
        ):
            assert torch.equal(p, q) and p is not q, name


def test_sandwich_norms_become_the_identity_through_their_gains():
    """Gemma-type blocks: x + norm(attention(norm(x))): zeroed gains are exact and keep gradients of ordinary size."""
    model = make("plain", tied=True).double()
    for block in model.blocks:
        block.down = torch.nn.Sequential(block.down, torch.nn.LayerNorm(24)).double()
        block.attention.out = torch.nn.Sequential(
            block.attention.out, torch.nn.LayerNorm(24)
        ).double()
    spec = model_spec_with_sandwich(model)
    before = logits(model, batch()).detach()
    loss_of(model, batch()).backward()
    largest = max(p.grad.norm() for p in model.parameters())

    growkern.expand_inplace(model, to={"layers": 4}, spec=spec)
    loss_of(model, batch()).backward()

    assert (logits(model, batch()) - before).abs().max() < 1e-12
    assert max(p.grad.norm() for p in model.parameters()) < 10 * largest


def model_spec_with_sandwich(model):
    plain = make("plain", tied=True).spec()
    tensors = {
        n.replace("attention.out.", "attention.out.0.").replace(".down.", ".down.0."): axes
        for n, axes in plain.tensors.items()
    }
    for i in range(2):
        for at, reads in (
            (f"blocks.{i}.attention.out", (f"heads.{i}", "head_dim")),
            (f"blocks.{i}.down", f"ffn.{i}"),
        ):
            tensors |= growkern.linear(f"{at}.0", reads=reads, writes="residual:branch")
            tensors |= growkern.norm(
                f"{at}.1", reads="residual:branch", writes="residual", kind="layer"
            )
    identity = dict.fromkeys(
        ["attention.out.1.weight", "attention.out.1.bias", "down.1.weight", "down.1.bias"], 0.0
    )
    return dataclasses.replace(
        plain,
        family="sandwich",
        tensors=tensors,
        blocks=growkern.Blocks("blocks", identity=identity),
    )


PROBES = {
    "gpt2": {"n_embd": 48, "n_head": 8, "n_inner": 60, "n_positions": 80, "vocab_size": 70},
    "llama": {
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 60,
        "vocab_size": 70,
    },
    "bert": {
        "hidden_size": 48,
        "num_attention_heads": 8,
        "intermediate_size": 60,
        "max_position_embeddings": 80,
        "vocab_size": 70,
    },
}
PROBES |= dict.fromkeys(["mistral", "qwen2", "qwen3"], PROBES["llama"])


@pytest.mark.parametrize(
    ("family", "field"), [(f, field) for f, fields in PROBES.items() for field in fields]
)
def test_differential_probing_agrees_with_the_family(family, field):
    """Two meta models that differ in one config field show which axes that field sizes: the family must say the same."""
    with torch.device("meta"):
        one = make(family, tied=False, n_inner=50) if family == "gpt2" else make(family, tied=False)
        other = type(one)(
            type(one.config)(**(one.config.to_dict() | {field: PROBES[family][field]}))
        )
    spec, spec_other = (
        growkern.families.FAMILIES[type(m).__name__](m.config) for m in (one, other)
    )

    for name, p in other.named_parameters():
        assert spec_other.shape(name) == tuple(p.shape), name
    for name, p in one.named_parameters():
        changed = [a != b for a, b in zip(p.shape, other.get_parameter(name).shape, strict=True)]
        claimed = [a != b for a, b in zip(spec.shape(name), spec_other.shape(name), strict=True)]
        assert changed == claimed, name
    for name, module in one.named_modules():
        for attribute, value in vars(module).items():
            after = vars(other.get_submodule(name)).get(attribute)
            if isinstance(value, int) and value != after and not attribute.startswith("_"):
                described = f"{name}.{attribute}" if name else attribute
                leaf = type(module).__name__ in growkern_leaves() or attribute in (
                    "head_dim",
                    "attention_head_size",
                )
                assert described in spec.attributes or leaf, f"{described} caches {field}"


def growkern_leaves():
    from growkern.describe import LEAVES

    return LEAVES


def test_group_growth_stays_inside_its_kv_head(monkeypatch):
    """Query heads x 2 with kv heads fixed: copies must share the kv head of their source."""
    exact_norms(monkeypatch)
    model = make("llama", tied=True).double()
    before = logits(model, batch()).detach()

    grow(model, to={"heads": 8})

    assert (
        model.config.num_key_value_heads == 2
        and model.model.layers[0].self_attn.num_key_value_groups == 4
    )
    assert (logits(model, batch()) - before).abs().max() < 1e-12


def test_kv_heads_alone_split_groups_is_refused():
    with pytest.raises(PlanError, match="shrink the groups"):
        grow(make("llama", tied=True), to={"kv_heads": 4, "heads": 4})


def test_every_class_of_transformers_that_is_registered_can_be_described():
    for name, describe in growkern.families.FAMILIES.items():
        kind = getattr(transformers, name)
        with torch.device("meta"):
            model = kind(kind.config_class(num_hidden_layers=1))
        assert set(describe(model.config).tensors) >= set(dict(model.named_parameters())), name


def test_spec_of_plain_covers_it():
    model = make("plain", tied=True)

    assert str(growkern.describe(model, spec_of(model))).startswith("plain: hidden 24")
