"""In every family, growth preserves the function, every element trains, and differential probing agrees with the family's description."""

import copy
import dataclasses
from itertools import product

import pytest
import torch
import transformers
from models import (
    EAGER,
    FAMILIES,
    LLAMA_LIKE,
    POSITIONS,
    POST_NORM,
    batch,
    exact_norms,
    grow,
    inputs,
    logits,
    loss_of,
    make,
    run,
    spec_of,
    train,
)
from pairwise import pairwise

import growkern
from growkern import depth, width
from growkern.errors import PlanError
from growkern.model.describe import cached_sizes, describe

PRE_NORM = [f for f in FAMILIES if f not in POST_NORM]
OURS = ["plain", "encoder", "encoder_post"]  # modules without config and checkpoint
TARGETS = {
    "3x": "3x",
    "1.5x": "1.5x",
    "awkward": {"hidden": 42, "ffn": 101},
    "awkward-and-deeper": {"hidden": 30, "ffn": 99, "layers": 5},
    "2x-and-deeper": {"hidden": 48, "layers": 4},
    "deeper": {"layers": 5},
    "positions": {"positions": 100},
    "ffn": {"ffn": 131},
    "2.5x": "2.5x",
}
WHOLE = ["3x", "2x-and-deeper", "deeper", "ffn", "positions"]
CASES = [
    (f, t)
    for f in FAMILIES
    for t in TARGETS
    if (f in PRE_NORM or t in WHOLE) and (t != "positions" or f in POSITIONS)
]


# every family and every target meets tied and untied weights, padding and copies (noise 1); 2x is in the table of drifts
FLOAT64 = pairwise(
    [(*case, *rest) for case in CASES for rest in product((True, False), (None, 1.0))]
)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target", "tied", "noise"), FLOAT64)
def test_growth_preserves_the_function_in_float64(family, target, tied, noise, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=tied).double().eval()
    ids = batch()
    before = logits(model, ids).detach()

    report = grow(model, to=TARGETS[target], width=width.Lossless(noise=noise))

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

    grow(model, to={"hidden": 48, "layers": 4})

    error = (logits(model, ids) - before).abs().max()
    assert error < 1e-5 * max(1.0, before.abs().max())


RULES = [
    ("llama", "isometric"), ("llama", "zero_pad"), ("gpt2", "mean_pad"), ("gpt2", "centre_pad"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "norms", "noise"),
    [(*rule, noise) for rule in RULES for noise in (None, 1.0) if rule[1] != "isometric" or noise],
)
@pytest.mark.parametrize("hidden", [30, 42, 54])
def test_every_norm_rule_is_exact_at_awkward_widths(family, norms, noise, hidden, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=False).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": hidden}, width=width.Lossless(noise, norms))

    assert (logits(model, batch()) - before).abs().max() < 1e-10


@pytest.mark.parametrize("hidden", [30, 36, 60])
@pytest.mark.parametrize("family", POST_NORM)
def test_post_norm_hidden_is_refused_with_the_nearest_multiples(family, hidden):
    low = hidden // 24 * 24

    with pytest.raises(PlanError, match=f"nearest whole multiples: {low}, {low + 24}"):
        grow(make(family, tied=True), to={"hidden": hidden})


KEY_BIASES = (  # a key bias moves all scores of a query alike, which softmax does not see: its gradient is rounding, or 0
    "k_proj.bias",
    "key.bias",
    "in_proj_bias",  # from here on, fused biases: their queries and values are tested below
    "c_attn.bias",
    "query_key_value.bias",
)


TRAINED = [(f, t) for f in PRE_NORM for t in ("2x", "1.5x", "awkward-and-deeper")]
TRAINED += [(f, t) for f in POST_NORM for t in ("2x", "2x-and-deeper")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target"), TRAINED)
def test_every_element_trains_within_two_steps_and_the_optimizer_fits(family, target):
    model = make(family, tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)  # decay would move gains
    train(model, optim, 2)
    source = copy.deepcopy(model)

    grow(model, optim, to=TARGETS.get(target, target))
    found = growkern.verify(source, model, inputs(model, batch(n=16)), optim)

    dead = {name: n for name, n in found.dead.items() if not name.endswith(KEY_BIASES)}
    assert not (dead or found.copies or found.state or found.unheld), str(found)
    assert found.same_function, str(found)


@pytest.mark.parametrize("family", ["encoder", "gpt2", "gpt_neox"])
def test_biases_of_queries_and_values_in_a_fused_bias_train(family):
    model = make(family, tied=True).double()

    grow(model, to={"hidden": 30}, width=width.Lossless(noise=1))
    loss_of(model, batch(n=16)).backward()

    fused = [p for name, p in model.named_parameters() if name.endswith(KEY_BIASES[2:])]
    assert fused
    for p in fused:
        parts = p.grad.view(-1, 3, 6).unbind(1) if family == "gpt_neox" else p.grad.chunk(3)
        assert parts[0].ne(0).all() and parts[2].ne(0).all()


@pytest.mark.parametrize("norms", ["zero_pad", "centre_pad"])
def test_pads_train_within_two_steps(norms):
    model = make("llama" if norms == "zero_pad" else "gpt2", tied=False).double()
    source = copy.deepcopy(model)

    grow(model, to="1.5x", width=width.Lossless(norms=norms))
    found = growkern.verify(source, model, batch(n=16))

    assert found.ok, str(found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_copies_differ_after_twenty_steps_with_noise_and_never_without(family):
    def grown(noise: float) -> torch.nn.Module:
        model = make(family, tied=True)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        grow(model, optim, to="2x", width=width.Lossless(noise=noise))
        train(model, optim, 20)
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


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in OURS])
def test_a_saved_grown_model_loads_with_equal_logits(family, tmp_path):
    model = make(family, tied=True).eval()
    grow(model, to={"hidden": 48 if family in POST_NORM else 36, "layers": 5})

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation=EAGER
    )

    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if family in EPS_NOT_SAVED:
        for name, module in model.named_modules():
            eps = {k: v for k, v in vars(module).items() if k in ("eps", "variance_epsilon")}
            vars(loaded.get_submodule(name)).update(eps)
    assert torch.equal(logits(loaded.eval(), batch()), logits(model, batch()))


EPS_NOT_SAVED = {
    "qwen3": "rms_norm_eps feeds norms of several widths",
    "qwen3_moe": "rms_norm_eps feeds norms of several widths",
    "opt": "no field of the config holds the epsilon",
}


@pytest.mark.parametrize("family", EPS_NOT_SAVED)
def test_the_report_says_when_the_config_cannot_hold_the_epsilon_of_the_norms(family):
    one, two = (grow(make(family, tied=True), to=to) for to in ("1.5x", "2x"))

    assert any(EPS_NOT_SAVED[family] in note for note in one.notes)
    assert not two.notes


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_report_says_when_transformers_would_not_save_the_config(family, tmp_path):
    one, two = make(family, tied=True), make(family, tied=True)

    refused, saved = grow(one, to={"hidden": 30}), grow(two, to={"hidden": 32})

    assert "save_pretrained refuses" in str(refused) and "save_pretrained" not in str(saved)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(Exception, match="multiple"):
        one.save_pretrained(tmp_path / "one")


@pytest.mark.parametrize("family", [f for f in PRE_NORM if f not in ("vit", *OURS)])
def test_generation_with_a_cache_equals_generation_without(family):
    model = make(family, tied=True).eval()
    grow(model, to={"hidden": 36, "layers": 5})
    ids = batch(n=1)[:, :4]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)

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
    """In blocks like Gemma's, x + norm(attention(norm(x))), zeroed gains are exact and keep gradients of ordinary size."""
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
PROBES |= dict.fromkeys(["mistral", "qwen2", "qwen3", "gemma2"], PROBES["llama"])
PROBES |= {
    "t5": {"d_model": 48, "num_heads": 8, "d_ff": 60, "vocab_size": 70},
    "gpt_neox": {k: v for k, v in PROBES["bert"].items() if "position" not in k},
    "opt": {"num_attention_heads": 8, "ffn_dim": 60, "vocab_size": 70}
    | {"max_position_embeddings": 80},
    "roberta": PROBES["bert"],
    "modernbert": {k: v for k, v in PROBES["bert"].items() if "position" not in k},
    "vit": {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 60},
    "mixtral": PROBES["llama"] | {"num_local_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": {k: v for k, v in PROBES["llama"].items() if k != "intermediate_size"}
    | {"moe_intermediate_size": 60, "num_experts": 6, "num_experts_per_tok": 3},
}
UNUSED = {"rotary_ndims"}  # no module reads the attribute once the model is built


@pytest.mark.parametrize(
    ("family", "field"), [(f, field) for f, fields in PROBES.items() for field in fields]
)
def test_differential_probing_agrees_with_the_family(family, field):
    """Two meta models that differ in one config field show which axes the field sizes, and the family describes the same axes."""
    with torch.device("meta"):
        one = make(family, tied=False, n_inner=50) if family == "gpt2" else make(family, tied=False)
        other = type(one)(
            type(one.config)(**(one.config.to_dict() | {field: PROBES[family][field]}))
        )
    spec, spec_other = (describe(m, values=False) for m in (one, other))

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
                leaf = attribute in cached_sizes(type(module)) or attribute in UNUSED
                assert described in spec.attributes or leaf, f"{described} caches {field}"


def test_group_growth_stays_inside_its_kv_head(monkeypatch):
    """Where query heads double and kv heads stay, a copy must share the kv head of its source."""
    exact_norms(monkeypatch)
    model = make("llama", tied=True).double()
    before = logits(model, batch()).detach()

    grow(model, to={"heads": 8})

    assert (
        model.config.num_key_value_heads == 2
        and model.model.layers[0].self_attn.num_key_value_groups == 4
    )
    assert (logits(model, batch()) - before).abs().max() < 1e-12


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_kv_heads_alone_split_the_groups_of_their_queries(family, monkeypatch):
    """Kv heads are repeated one by one, not tiled, so that a copy serves the queries beside its source."""
    exact_norms(monkeypatch)
    model = make(family, tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    source = copy.deepcopy(model)
    key = model.model.layers[0].self_attn.k_proj.weight.detach().clone().view(2, 6, 24)
    query = model.model.layers[0].self_attn.q_proj.weight.detach().clone()

    report = grow(model, optim, to={"kv_heads": 4, "heads": 4})
    found = growkern.verify(source, model, batch(n=16), optim)

    assert report.preserves == "function" and model.config.num_key_value_heads == 4
    grown = model.model.layers[0].self_attn
    assert torch.equal(grown.k_proj.weight.view(4, 6, 24), key.repeat_interleave(2, 0))
    assert torch.equal(grown.q_proj.weight, query)
    routed = family in ("mixtral", "qwen3_moe")  # routers compute in float32
    assert found.logits_error < (1e-6 if routed else 1e-10)
    dead = {name for name in found.dead if not name.endswith(KEY_BIASES)}
    assert not (dead or found.state or found.unheld), str(found)


def test_copies_of_a_kv_head_share_its_gradient_by_their_queries(monkeypatch):
    """The gradients of the copies add up to the source's; no scale of the source's gradient gives them, as ``preserves`` says."""
    exact_norms(monkeypatch)
    model = make("llama", tied=True).double()
    loss_of(model, batch()).backward()
    key = model.model.layers[0].self_attn.k_proj.weight
    source = key.grad.view(2, 1, 6, 24).clone()

    report = grow(model, to={"kv_heads": 4, "heads": 4}, width=width.Lossless(noise=0))
    model.zero_grad()
    loss_of(model, batch()).backward()

    copies = key.grad.view(2, 2, 6, 24)
    torch.testing.assert_close(copies.sum(1, keepdim=True), source, rtol=1e-9, atol=1e-12)
    share = (copies * source).sum((2, 3)) / source.square().sum((2, 3))
    assert (copies - share[:, :, None, None] * source).abs().amax((2, 3)).min() > 1e-6
    assert report.preserves == "function"


def test_groups_split_otherwise_are_refused():
    with pytest.raises(PlanError, match="shrink the groups"):
        grow(make("llama", tied=True), to={"kv_heads": 6, "heads": 6})
    with pytest.raises(
        PlanError, match=r"FPI keeps groups of heads whole; .*width\.Lossless, which splits"
    ):
        grow(make("llama", tied=True), to={"kv_heads": 4, "heads": 4}, width=width.FPI())


def test_every_class_of_transformers_that_is_registered_can_be_described():
    for name in growkern.model.families.FAMILIES:
        if hasattr(torch.nn, name):
            continue
        kind = getattr(transformers, name)
        with torch.device("meta"):
            model = kind(kind.config_class(num_hidden_layers=1))
        described = describe(model, values=False)
        assert set(described.tensors) >= set(dict(model.named_parameters())), name


def test_spec_of_plain_covers_it():
    model = make("plain", tied=True)

    assert str(growkern.describe(model, spec_of(model))).startswith("plain: hidden 24")


BACKBONES = {
    "gpt2": "transformer",
    "gpt_neox": "gpt_neox",
    "bert": "bert",
    "roberta": "roberta",
    "vit": "vit",
} | dict.fromkeys(["opt", "llama", "mistral", "qwen2", "qwen3"], "model")
BACKBONES |= {"t5": "model"}
BACKBONES |= dict.fromkeys(["mixtral", "qwen3_moe", "modernbert", "gemma2"], "model")


@pytest.mark.parametrize("family", BACKBONES)
def test_a_backbone_by_itself_keeps_what_it_computes_in_its_first_coordinates(family, monkeypatch):
    exact_norms(monkeypatch)
    config = make(family, tied=False).config
    kind = getattr(
        transformers,
        type(make(family, tied=False)).__name__.split("For")[0].replace("LMHeadModel", "")
        + "Model",
    )
    torch.manual_seed(0)
    model = kind(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = run(model, batch()).last_hidden_state.detach()

    report = growkern.expand_inplace(model, to={"hidden": 48, "ffn": 99, "layers": 4})
    after = run(model, batch()).last_hidden_state

    assert report.function_preserving
    assert after.shape[-1] == 48 and (after[..., :24] - before).abs().max() < 1e-10


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gpt_neox_is_exact_whatever_its_residual_and_biases(parallel, bias):
    options = dict(use_parallel_residual=parallel, attention_bias=bias)
    model = make("gpt_neox", tied=False, **options).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": 30, "layers": 3})

    assert (logits(model, batch()) - before).abs().max() < 1e-10


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_opt_keeps_an_embedding_of_its_own_width(tied, tmp_path):
    model = make("opt", tied=tied, word_embed_proj_dim=16).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": 48, "layers": 3, "positions": 100})
    model.save_pretrained(tmp_path)
    loaded = transformers.OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()

    assert model.config.word_embed_proj_dim == 16
    assert (logits(model, batch()) - before).abs().max() < 1e-10
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))


def test_new_positions_of_opt_start_from_the_mean():
    model = make("opt", tied=True)
    table = model.model.decoder.embed_positions
    source = table.weight.detach().clone()

    grow(model, to={"positions": 100})

    assert table.weight.shape == (102, 24) and table.num_embeddings == 102
    assert torch.equal(table.weight[:66], source)
    torch.testing.assert_close(table.weight[66:], source.mean(0).expand(36, 24))


@pytest.mark.parametrize(
    ("family", "changes", "to", "match"),
    [
        (
            "opt",
            {"do_layer_norm_before": False},
            "2x",
            "do_layer_norm_before=False is not described",
        ),
        ("opt", {"layer_norm_elementwise_affine": False}, "2x", "layer_norm_elementwise_affine"),
        ("mixtral", {}, {"experts": 8}, "needs top_k=4"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, {"layers": 4}, "follows from their index"),
        ("opt", {"word_embed_proj_dim": 16}, {"embedding": 32}, "projections"),
        ("modernbert", {"num_hidden_layers": 1}, {"layers": 2}, "unlike all others"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_a_family_cannot_grow_is_refused_with_the_reason(family, changes, to, match):
    with pytest.raises(growkern.errors.GrowthError, match=match):
        grow(make(family, tied=True, **changes), to=to)


@pytest.mark.parametrize("layers", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}], ids=str)
def test_dense_blocks_between_experts_keep_their_ffn(layers, monkeypatch, tmp_path):
    exact_norms(monkeypatch)
    model = make("qwen3_moe", tied=False, **layers).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to="2x")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.float64, experts_implementation=EAGER
    )

    assert model.model.layers[0].mlp.gate_proj.out_features == 40
    assert model.model.layers[1].mlp.experts.intermediate_dim == 80
    assert (logits(model, batch()) - before).abs().max() < 1e-10
    assert torch.equal(logits(loaded.eval(), batch()), logits(model, batch()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_run_as_grouped_products_keep_their_function(family):
    model = make(family, tied=True).eval()
    model.set_experts_implementation("grouped_mm")
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": 48, "layers": 3})

    assert (logits(model, batch()) - before).abs().max() < 1e-5


def test_new_blocks_of_modernbert_are_no_copies_of_its_first():
    model = make("modernbert", tied=True).eval()
    first = model.model.layers[0]

    grow(model, to={"layers": 7})

    norms = [type(layer.attn_norm).__name__ for layer in model.model.layers]
    assert model.model.layers[0] is first and norms == ["Identity"] + ["LayerNorm"] * 6
    assert model.config.layer_types == [layer.attention_type for layer in model.model.layers]


@pytest.mark.parametrize("family", ["bert", "roberta", "encoder_post"])
def test_post_norm_blocks_with_a_large_epsilon_are_said_not_to_be_the_identity(family):
    own = {"eps": 1e-5} if family == "encoder_post" else {"layer_norm_eps": 1e-5}
    wide, deep = (make(family, tied=False, **own).double().eval() for _ in range(2))
    before = logits(deep, batch()).detach()

    wider, deeper = grow(wide, to="2x"), grow(deep, to={"layers": 4})

    assert wider.function_preserving and (logits(wide, batch()) - before).abs().max() < 1e-10
    assert not deeper.function_preserving and "epsilon of their norms, 1e-05" in str(deeper)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_bare_encoder_of_torch_grows_ffn_and_layers_and_keeps_its_fast_path(norm_first, bias):
    layer = torch.nn.TransformerEncoderLayer(
        24, 4, 40, 0.0, layer_norm_eps=1e-12, batch_first=True, norm_first=norm_first, bias=bias
    )
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and bias)
    encoder = encoder.double().eval()
    x = torch.randn(2, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) >= torch.tensor([[16], [11]])
    before = encoder(x, src_key_padding_mask=mask).detach()

    report = growkern.expand_inplace(encoder, to={"ffn": 99, "layers": 5})
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast = encoder(x, src_key_padding_mask=mask)
    slow = encoder(x, src_key_padding_mask=mask)

    called = {event.key for event in profile.key_averages()}
    assert report.function_preserving and encoder.num_layers == 5
    assert (
        "aten::_transformer_encoder_layer_fwd" in called
    ) == bias  # torch has no fast path without biases
    keep = ~mask
    assert (fast[keep] - before[keep]).abs().max() < 1e-10
    assert (slow[keep] - before[keep]).abs().max() < 1e-10


def test_a_bare_layer_of_torch_grows_its_ffn():
    layer = torch.nn.TransformerEncoderLayer(24, 4, 40, 0.0, batch_first=True).double().eval()
    x = torch.randn(2, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = layer(x).detach()

    growkern.expand_inplace(layer, to={"ffn": 99})

    assert layer.linear1.out_features == 99 and (layer(x) - before).abs().max() < 1e-10


def test_a_factor_grows_what_can_grow_and_the_plan_says_what_stays():
    layer = torch.nn.TransformerEncoderLayer(24, 4, 40, norm_first=True)

    plan = growkern.plan(layer, to="2x")

    assert plan.target_sizes == {**plan.source_sizes, "ffn": 80}
    for size in ("hidden 24", "heads 4"):
        assert "{} stays at {}: ".format(*size.split()) in str(plan)


@pytest.mark.parametrize("to", [{"hidden": 48}, {"heads": 8}], ids=str)
def test_what_a_bare_encoder_reads_cannot_grow(to):
    layer = torch.nn.TransformerEncoderLayer(24, 4, 40, norm_first=True)

    with pytest.raises(PlanError, match="what another module writes"):
        growkern.expand_inplace(layer, to=to)


@pytest.mark.parametrize("family", ["encoder", "encoder_post"])
def test_the_fast_path_of_a_grown_encoder_computes_what_the_slow_one_does(family):
    model = make(family, tied=False).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"hidden": 48, "layers": 3})
    attention = model.encoder.layers[2].self_attn
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast = logits(model, batch())

    sizes = [getattr(attention, name) for name in ("embed_dim", "kdim", "vdim", "num_heads")]
    assert sizes == [48, 48, 48, 8] and attention.out_proj.in_features == 48
    assert "aten::_transformer_encoder_layer_fwd" in {e.key for e in profile.key_averages()}
    assert (fast - before).abs().max() < 1e-10
    assert (logits(model, batch()) - before).abs().max() < 1e-10


@pytest.mark.parametrize(
    "family",
    [
        "gpt_neox",
        "opt",
        "mixtral",
        "qwen3_moe",
        "roberta",
        "modernbert",
        "vit",
        "encoder",
        "t5",
        "gemma2",
    ],
)
def test_the_grown_run_of_every_layout_is_the_source_run(family, monkeypatch):
    """State, learning rates, epsilon and decay follow the law in fused, interleaved, three- and four-dimensional tensors."""
    exact_norms(monkeypatch)
    model = make(family, tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.1)
    train(model, optim, 5)
    source, source_optim = copy.deepcopy((model, optim))

    grow(model, optim, to="2x", width=width.Lossless(noise=0), dynamics="exact")

    grown, expected = train(model, optim, 5, first=5), train(source, source_optim, 5, first=5)
    assert grown == pytest.approx(expected, abs=1e-9) and abs(grown[0] - grown[-1]) > 1e-4


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        (
            lambda own: torch.nn.TransformerEncoder(own(24, 4, 40), 2),
            "Own in place of a TransformerEncoderLayer",
        ),
        (
            lambda own: torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(24, 4, 40), 2, torch.nn.RMSNorm(24)
            ),
            "RMSNorm in place of a LayerNorm",
        ),
    ],
    ids=["layers", "norm"],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_an_encoder_of_torch_with_other_parts_is_refused(encoder, match):
    class Own(torch.nn.TransformerEncoderLayer):
        pass

    with pytest.raises(growkern.errors.UnsupportedModelError, match=match):
        growkern.describe(encoder(Own))
