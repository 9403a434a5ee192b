"""Specs of the families, by the trace of a small model of the class: the specs by hand are the oracle."""

import copy
from dataclasses import dataclass, fields

import families_oracle
import pytest
import torch
import transformers
from models import LLAMA, SIZES, Plain, batch, make
from torch import nn

import growkern
from growkern.errors import PlanError, UnsupportedModelError
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.model.tracing import template

SMALL = {
    "GPTNeoX": SIZES["gpt_neox"],
    "GPT2": SIZES["gpt2"],
    "ModernBert": SIZES["modernbert"],
    "Bert": SIZES["bert"],
    "Roberta": SIZES["roberta"],
    "OPT": SIZES["opt"],
    "ViT": SIZES["vit"],
    "T5": SIZES["t5"],
    "Gemma2": SIZES["gemma2"],
    "Qwen2": LLAMA,
    "Qwen3Moe": SIZES["qwen3_moe"],
    "Mixtral": SIZES["mixtral"],
} | dict.fromkeys(("Llama", "Mistral", "Qwen3"), LLAMA | {"head_dim": 6})
YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, rope_theta=1e4)
LONG = YARN | dict(rope_type="longrope", short_factor=[1.0] * 3, long_factor=[2.0] * 3)
CHANGES = {  # class -> changes of its config
    "GPT2LMHeadModel": [
        dict(n_layer=0),
        dict(n_layer=5, n_inner=50),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False),
        dict(reorder_and_upcast_attn=True),
        dict(vocab_size=50257, n_positions=1024, bos_token_id=50256, eos_token_id=50256),
    ],
    "LlamaForCausalLM": [
        dict(num_hidden_layers=0),
        dict(num_hidden_layers=5, attention_bias=True, mlp_bias=True),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, head_dim=10),
        dict(rope_parameters=YARN),
        dict(rope_parameters=LONG),
    ],
    "Qwen2ForCausalLM": [dict(use_sliding_window=True, max_window_layers=1, sliding_window=4)],
    "Qwen3ForCausalLM": [dict(attention_bias=True, num_hidden_layers=3)],
    "MistralForCausalLM": [dict(sliding_window=4, num_hidden_layers=0)],
    "GPTNeoXForCausalLM": [
        dict(attention_bias=False, num_hidden_layers=0),
        dict(use_parallel_residual=False),
    ],
    "BertForMaskedLM": [dict(num_hidden_layers=0), dict(type_vocab_size=5, num_hidden_layers=3)],
    "RobertaForMaskedLM": [dict(type_vocab_size=1, pad_token_id=1)],
    "ModernBertForMaskedLM": [
        dict(num_hidden_layers=1),
        dict(num_hidden_layers=2),
        dict(num_hidden_layers=5, norm_bias=True, attention_bias=True, mlp_bias=True),
        dict(classifier_bias=True, decoder_bias=False),
    ],
    "OPTForCausalLM": [
        dict(num_hidden_layers=0),
        dict(enable_bias=False),
        dict(word_embed_proj_dim=16),
    ],
    "ViTModel": [dict(pooler_output_size=10), dict(pooler_output_size=26, num_hidden_layers=0)],
    # numbers that are small sizes of the trace too
    "ViTForImageClassification": [
        *(dict(num_labels=n) for n in (2, 8, 26, 48)),
        dict(num_labels=6, num_channels=6, qkv_bias=False),
        dict(image_size=(8, 16), patch_size=(4, 8)),
    ],
    "Gemma2ForCausalLM": [
        dict(attention_bias=True, num_hidden_layers=3),
        dict(query_pre_attn_scalar=6, attn_logit_softcapping=None, final_logit_softcapping=None),
    ],
    "MixtralForCausalLM": [dict(num_experts_per_tok=1, sliding_window=4, num_hidden_layers=3)],
    "Qwen3MoeForCausalLM": [
        dict(mlp_only_layers=[0]),
        dict(mlp_only_layers=[1], num_hidden_layers=5),
        dict(decoder_sparse_step=2, num_hidden_layers=6),
        dict(norm_topk_prob=True, attention_bias=True, num_experts=6, num_experts_per_tok=3),
    ],
    "T5ForConditionalGeneration": [
        dict(feed_forward_proj="relu", num_layers=1, num_decoder_layers=3),
        dict(scale_decoder_outputs=False),
    ],
}
CASES = [pytest.param(name, {}, True, id=name) for name in families_oracle.SPECS]
CASES += [
    pytest.param(name, changes, tied, id=f"{name}-{tied}-{changes}", marks=pytest.mark.slow)
    for name in families_oracle.SPECS
    for changes, tied in (({}, False), *((changes, True) for changes in CHANGES.get(name, ())))
]


def live(name: str, changes: dict, tied: bool = True) -> nn.Module:
    """Build a model of a class on the meta device."""
    family = max((f for f in SMALL if name.startswith(f)), key=len)
    kind = getattr(transformers, name)
    config = kind.config_class(**SMALL[family] | changes, tie_word_embeddings=tied)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        return kind(config)


def differences(expected: ModelSpec, found: ModelSpec) -> list[object]:
    """Return where a spec differs from the one by hand."""
    result = list[object]()
    for field in fields(ModelSpec):
        a, b = getattr(expected, field.name), getattr(found, field.name)
        if field.name in ("attributes", "config") and expected.hidden_is_heads:
            # hidden is their product
            a, b = ({k: "hidden" if v == ("heads", "head_dim") else v for k, v in own.items()} for own in (a, b))  # fmt: skip
        if field.name == "config":  # which no method grows
            b = {k: v for k, v in b.items() if k != "type_vocab_size"}
        if field.name != "cached_sizes" and a != b and isinstance(a, dict):
            result += [(field.name, k, _text(a.get(k)), _text(b.get(k))) for k in {**a, **b} if a.get(k) != b.get(k)]  # fmt: skip
        elif field.name != "cached_sizes" and a != b:
            result.append((field.name, a, b))
    return result


def _text(value: object) -> object:
    return [*map(str, value)] if isinstance(value, tuple) else value


@pytest.mark.parametrize(("name", "changes", "tied"), CASES)
def test_spec_by_a_hint_equals_the_spec_by_hand(name, changes, tied):
    model = live(name, changes, tied)
    first = {}
    for stack in families_oracle.by_hand(model).stacks:
        if not len(model.get_submodule(stack.path)):
            with torch.device("meta"):
                first[stack.path] = _block(model, stack.path)

    found = describe(model, values=False, first=first)

    expected = describe(model, families_oracle.by_hand(model), values=False, first=first)
    assert differences(expected, found) == []
    assert len(found.tensors) > 10


def _block(model: nn.Module, path: str) -> nn.Module:
    """Return block 0 of a model like this one that has a block."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None) == []:
        config.layer_types = ["full_attention"]
    return type(model)(config).get_submodule(path)[0]


def test_one_trace_serves_models_of_every_size_depth_and_dtype(monkeypatch):
    describe(make("llama", tied=True))
    monkeypatch.setattr(template, "_Traced", None)  # a second trace would fail

    config = transformers.LlamaConfig(
        **LLAMA
        | dict(hidden_size=512, num_hidden_layers=30, num_attention_heads=16, head_dim=32)
        | dict(num_key_value_heads=16, intermediate_size=1000, vocab_size=50_000),
        tie_word_embeddings=True,
    )
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)

    assert differences(families_oracle.by_hand(model), describe(model, values=False)) == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_trace_serves_all_growths_of_a_model(family, monkeypatch):
    model = make(family, tied=True)
    describe(model)
    monkeypatch.setattr(template, "_Traced", None)  # a second trace would fail

    for to in ({"ffn": "2x"}, {"layers": 4}, {"layers": 5}):
        growkern.expand_inplace(model, to=to)

    assert len(model.config.growkern_history) == 3


BERT = dict(
    hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, vocab_size=64, max_position_embeddings=32
)  # fmt: skip


@pytest.mark.parametrize("first", [1e-12, 1.0])
def test_a_description_is_of_the_models_own_epsilon(first):
    """A new block of BERT is the identity up to the epsilon of its norms."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT, layer_norm_eps=first))
    describe(model)
    for eps in (1e-12, 1.0):
        config = transformers.BertConfig(**BERT, layer_norm_eps=eps)
        spec = describe(transformers.BertForMaskedLM(config))
        assert bool(spec.blocks.reasons) == (eps == 1.0)


def test_description_leaves_random_state_and_defaults_as_they_are(monkeypatch):
    monkeypatch.setattr(template, "_KNOWN", {})
    model = make("gpt2", tied=True)
    state = torch.get_rng_state()

    with torch.device("meta"):
        growkern.describe(model)

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32 and len(template._KNOWN) == 1


def test_tensors_that_the_forward_does_not_reach_are_refused_by_name():
    changes = dict(is_decoder=True, add_cross_attention=True)

    with pytest.raises(UnsupportedModelError, match=r"encoder\.layer\.\*\.crossattention"):
        describe(live("BertModel", changes), values=False)


def test_a_block_unlike_the_others_is_refused_by_name():
    model = make("llama", tied=True)
    model.model.layers[1].mlp.extra = nn.Linear(24, 24)

    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.extra\.weight"):
        growkern.describe(model)


# ---- hints of a user


@dataclass
class Config:
    """Config of a user's decoder: ffn has no field."""

    width: int = 24
    n_head: int = 4
    n_layer: int = 2


class Own(Plain):
    """A user's decoder that is built from its config alone."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.width, config.n_head, config.n_layer)
        self.config = config


FIELDS = {"width": "hidden", "n_head": "heads", "n_layer": "layers"}
OWN = growkern.Hint(FIELDS, derived={"ffn": ("hidden", 4)})
LLAMA_FIELDS = {
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_hidden_layers": "layers",
    "intermediate_size": "ffn",
    "vocab_size": "vocab",
}
PHI = growkern.Hint(LLAMA_FIELDS, eps="layer_norm_eps")


def own(config: Config | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Own(config or Config()).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def of(kind: str, **changes: object) -> nn.Module:
    """Make a model of a class that no family describes."""
    torch.manual_seed(0)
    kind_of = getattr(transformers, f"{kind}ForCausalLM")
    model = kind_of(kind_of.config_class(**LLAMA | dict(pad_token_id=0) | changes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    "to", [{"hidden": 48, "heads": 8, "ffn": 192}, {"hidden": 48, "head_dim": 12}, {"layers": 3}, {"ffn": 101}], ids=str
)  # fmt: skip
def test_own_model_grows_by_hints(to):
    model = own()
    before = model(batch()).detach()

    growkern.expand_inplace(
        model, to=to, spec=growkern.describe(model, inputs=batch(), hints=OWN), dynamics=None
    )

    assert torch.allclose(model(batch()), before, rtol=0, atol=1e-12)
    assert {model.config.width, model.config.n_layer} == {to.get("hidden", 24), to.get("layers", 2)}


def test_hints_describe_a_model_without_values():
    with torch.device("meta"):
        model = Own(Config(width=4096, n_head=32, n_layer=0))
        block = Own(Config(width=4096, n_head=32, n_layer=1)).blocks[0]

    spec = describe(model, inputs=batch(), hints=OWN, values=False, first={"blocks": block})

    assert spec.sizes == {"hidden": 4096, "heads": 32, "head_dim": 128, "ffn": 16384, "layers": 0}
    assert spec.shape("blocks.0.attention.qkv.weight") == (3 * 4096, 4096)


def test_hints_name_head_dim_of_a_transformers_model():
    """Partial RoPE, LayerNorm, biases: no family describes Phi."""
    model = of("Phi", partial_rotary_factor=0.5, hidden_size=48)
    before = model(batch()).logits.detach()

    growkern.expand_inplace(
        model, to={"hidden": 96, "head_dim": 24}, spec=growkern.describe(model, hints=PHI)
    )

    assert torch.allclose(model(batch()).logits, before, rtol=0, atol=1e-12)
    again = transformers.PhiForCausalLM(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.allclose(again(batch()).logits, before, rtol=0, atol=1e-12)


def test_head_dim_that_is_rotated_in_pairs_is_fixed():
    """GLM rotates neighbors, not the halves of a head: copies of coordinates would meet other angles."""
    model = of("Glm", head_dim=12, hidden_size=48)
    spec = growkern.describe(model, hints=growkern.Hint({**LLAMA_FIELDS, "head_dim": "head_dim"}))

    with pytest.raises(PlanError, match="attention splits it in another way than into halves"):
        growkern.plan(model, spec=spec, to={"head_dim": 24})


def no_value() -> nn.Module:
    model = own()
    model.config.extra_layers = [1, 2]
    return model


class Literal(Own):
    """The width of a layer is a literal at one width."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.width != 96:
            self.bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, ids):
        return super().forward(ids) + (self.bias.sum() if hasattr(self, "bias") else 0)


class Cached(Own):
    """A number that follows from the width in no way that a size or a power has."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.odd = config.width + 1


class Leaving(Own):
    """The logits leave torch and come back, so that the trace does not see what they are."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, self.head.out_features, bias=False)

    def forward(self, ids):
        return torch.from_numpy(super().forward(ids).detach().numpy().copy())


HINTS = {
    "no hint": (own, {"hidden": "width"}, "expected a growkern.Hint, got dict"),
    "no config": (lambda: Plain(), OWN, "has no config; pass inputs= in place of hints"),
    "no heads": (own, growkern.Hint({"width": "hidden", "n_layer": "layers"}), "no field holds heads"),
    "an unknown size": (own, growkern.Hint({**FIELDS, "width2": "girth"}), "'girth' is no size that a hint can name"),
    "no such field": (own, growkern.Hint({**FIELDS, "wide": "ffn"}), "the config has no value of 'wide'"),
    "a wrong type": (own, growkern.Hint(3), "fields"),  # pyright: ignore
    "a length without a size": (own, growkern.Hint(FIELDS), r"up.weight with an axis of \d+, and of \d+ with other sizes"),
    "a list": (no_value, OWN, "extra_layers: the config has a list with an entry per block"),
    "a tensor at some sizes": (lambda: Literal(Config()), OWN, "has bias at some sizes only"),
    "no field of follows": (own, growkern.Hint(FIELDS, follows={"wide": "hidden"}), "wide: the config has no such field"),
    "a forward that leaves torch": (lambda: Leaving(Config()), OWN, r"a small model of its config moves its output by .* permuted"),
    "an odd attribute": (lambda: Cached(Config()), OWN, "has odd, which follows from its sizes in an unknown way"),
}  # fmt: skip


@pytest.mark.parametrize(("make_model", "hints", "match"), HINTS.values(), ids=HINTS)
def test_hints_that_do_not_fit_are_refused_with_the_reason(make_model, hints, match):
    with pytest.raises(UnsupportedModelError, match=match):
        growkern.describe(make_model(), inputs=batch(), hints=hints)
