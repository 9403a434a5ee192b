"""Classes that no family names: heads on a known body, subclasses of known classes, bodies inside a user's module, and speech models."""

from pathlib import Path

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

import growkern
from growkern.errors import PlanError, UnsupportedModelError

TINY = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, intermediate_size=80, vocab_size=97, pad_token_id=0)  # fmt: skip
HEADS = ["llama_classifier", "bert_choice", "bart_classifier", "llava", "ast"]


@pytest.mark.parametrize("name", HEADS)
def test_inputs_of_a_head_are_made_from_the_config(name):
    spec = growkern.describe(zoo.make(name))
    to = zoo.targets(spec, 2.0)
    assert {"hidden", "ffn", "heads"} <= to.keys()

    error, *_ = zoo.grown(name, to)

    assert error < 2e-6  # norms of transformers round to float32
    assert not spec.reload_problem


class Judge(transformers.LlamaForCausalLM):
    """A user's subclass of a known class, with a second head and a forward of its own."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.value = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor, **options) -> tuple[Tensor, Tensor]:
        stream = self.model(input_ids, use_cache=False).last_hidden_state
        return self.lm_head(stream), self.value(stream)


class Reward(nn.Module):
    """A user's module around a known body: the reward is a linear map of the last token."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__()
        self.body, self.score = transformers.LlamaModel(config), nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.score(self.body(input_ids).last_hidden_state[:, -1])


class Renamed(transformers.LlamaForCausalLM):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("kind", [Judge, Reward, Renamed], ids=lambda kind: kind.__name__)
def test_a_subclass_or_a_wrapper_of_a_known_class_is_traced(kind):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**zoo.DECODER)).double().eval()
    ids = torch.randint(3, 97, (2, 12))
    with torch.no_grad():
        before = model(ids)

    report = growkern.expand_inplace(model, to="2x", spec=growkern.describe(model, inputs=ids))

    with torch.no_grad():
        after = model(ids)
    if kind is Renamed:
        before, after = before.logits, after.logits
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old, new, rtol=0, atol=1e-6 * float(old.abs().max()))
    sizes = {name: n for name, n in report.target_sizes.items() if name != "layers"}
    assert sizes == {"hidden": 96, "ffn": 160, "heads": 8, "kv_heads": 4}


def test_a_subclass_without_inputs_takes_those_of_its_config():
    spec = growkern.describe(Renamed(transformers.LlamaConfig(**zoo.DECODER)))

    assert {"hidden": 48, "ffn": 80, "heads": 4, "kv_heads": 2, "layers": 2}.items() <= spec.sizes.items()  # fmt: skip


class Caching(transformers.PhiForCausalLM):
    """Its forward on a cache depends on the width, and no other forward does."""

    def forward(self, input_ids=None, past_key_values=None, **options):
        out = super().forward(input_ids, past_key_values=past_key_values, **options)
        if past_key_values is not None and past_key_values.get_seq_length() > input_ids.shape[1]:
            out.logits = out.logits * (self.config.hidden_size / 48)
        return out


def test_a_size_on_which_generation_with_a_cache_depends_is_fixed():
    config = transformers.PhiConfig(**zoo.DECODER)

    assert "hidden" in growkern.describe(Caching(config).double()).fixed
    assert "hidden" not in growkern.describe(transformers.PhiForCausalLM(config).double()).fixed


def speech() -> nn.Module:
    torch.manual_seed(0)
    conv = dict(conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3])
    position = dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    config = transformers.Wav2Vec2Config(**zoo.ENCODER | conv | position | dict(vocab_size=32, feat_extract_norm="layer"))  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).double()


def test_a_speech_model_is_refused_with_its_weight_norm_and_grows_without():
    """One of its sizes is as long as its heads, whose scaling is then a power of it by chance."""
    model = speech()
    with pytest.raises(UnsupportedModelError, match="remove the parametrization first"):
        growkern.describe(model)
    nn.utils.parametrize.remove_parametrizations(model.wav2vec2.encoder.pos_conv_embed.conv, "weight")  # fmt: skip

    with pytest.raises(UnsupportedModelError, match="masked_spec_embed: the forward does not use"):
        growkern.describe(model.eval())
    spec = growkern.describe(model.train())  # training masks parts of the input
    before = zoo.output(model, spec.example)
    growkern.expand_inplace(model, spec=spec, to=zoo.targets(spec, 2.0))

    assert zoo.difference(zoo.output(model, spec.example), before) < 1e-12


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Phi", dict(eos_token_id=[2, 3])),  # several tokens end a text
        ("BigBird", dict(attention_type="original_full")),  # its pooler runs, and nothing reads it
    ],
)
def test_a_language_model_of_odd_config_grows_and_loads(kind, fields):
    torch.manual_seed(0)
    own = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, intermediate_size=80, vocab_size=97, pad_token_id=0)  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**own | fields)
    )
    model.double().eval()
    ids = torch.randint(4, 97, (2, 12))
    before = model(ids).logits

    growkern.expand_inplace(model, to={"hidden": 96, "heads": 8})

    again = type(model)(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert (model(ids).logits - before).abs().max() < 1e-6 * before.abs().max()
    assert torch.equal(again(ids).logits, model(ids).logits)


def saved(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).double().eval()


def test_a_field_that_counts_two_stacks_counts_none(tmp_path):
    torch.manual_seed(0)
    model = transformers.HrmTextForCausalLM(
        transformers.HrmTextConfig(**TINY, num_layers_per_stack=2)
    )
    model.double().eval()
    ids = torch.randint(4, 97, (2, 12))

    spec = growkern.describe(model)
    growkern.expand_inplace(model, to={"ffn": 160})

    assert {"layers", "layers2"} <= spec.fixed.keys() and "no field of the config" in spec.fixed[
        "layers2"
    ]
    with torch.no_grad():
        assert torch.equal(
            saved(model, tmp_path)(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        )


def test_an_epsilon_that_not_all_norms_have_from_the_config_stays(tmp_path):
    torch.manual_seed(0)
    sizes = dict(kv_channels=12, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = (
        transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**TINY, **sizes)).double().eval()
    )
    ids = torch.randint(4, 97, (2, 12))

    growkern.expand_inplace(model, to={"hidden": 96})

    assert model.config.rms_norm_eps == 1e-6
    with torch.no_grad():
        assert torch.equal(saved(model, tmp_path)(ids).logits, model(ids).logits)


class OneEpsilon(transformers.PhiConfig):
    """Takes one epsilon only."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "layer_norm_eps" and value != 1e-5:
            raise ValueError(f"layer_norm_eps is 1e-5, not {value}")
        super().__setattr__(name, value)


def test_an_epsilon_that_a_config_refuses_stays_in_the_config():
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(OneEpsilon(**TINY)).double().eval()
    ids = torch.randint(4, 97, (2, 12))
    before = model(ids).logits

    growkern.expand_inplace(model, to={"hidden": 96}, width=growkern.width.HyperClone())

    assert model.config.hidden_size == 96 and model.config.layer_norm_eps == 1e-5
    assert (model(ids).logits - before).abs().max() < 1e-6 * before.abs().max()


@pytest.mark.parametrize(
    ("kind", "to", "why"),
    [
        ("Esm", {"layers": 3}, "a longer model other blocks or tensors"),  # a head reads the attention of all layers
        ("Esm", {"heads": 8}, "a model built from the grown config computes another function"),
        ("IBert", {"ffn": 160}, "a model built from the grown config computes another function"),  # it has buffers like weights
    ],
)  # fmt: skip
def test_what_a_larger_checkpoint_would_hold_is_refused_by_name(kind, to, why):
    own = TINY | (dict(position_embedding_type="rotary", mask_token_id=3) if kind == "Esm" else {})
    model = getattr(transformers, f"{kind}ForMaskedLM")(
        getattr(transformers, f"{kind}Config")(**own)
    )

    with pytest.raises(PlanError, match=why):
        growkern.expand_inplace(model.double().eval(), to=to)
    if kind == "Esm":
        growkern.expand_inplace(model, to={"ffn": 160})


HYBRIDS = {
    "Lfm2": dict(layer_types=["conv", "full_attention"], num_key_value_heads=2, block_multiple_of=8),
    "Jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=6,
        num_experts=4, num_key_value_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_blocks_have_their_own_numbers_and_caches_after_a_growth(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY | HYBRIDS[kind])
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    ids = torch.randint(4, 97, (2, 12))
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    before = model.generate(ids, **options)

    growkern.expand_inplace(model, to={"layers": 4})

    numbers = {name: m.layer_idx for name, m in model.named_modules() if hasattr(m, "layer_idx")}
    assert len(numbers) >= 4 and all(f".{n}." in name for name, n in numbers.items())
    assert torch.equal(model.generate(ids, **options), before)


@pytest.mark.parametrize("hidden", [64, 48])
def test_a_number_that_a_config_holds_literally_stays(hidden, tmp_path):
    torch.manual_seed(0)
    own = TINY | dict(hidden_size=hidden, embedding_multiplier=hidden**0.5, num_key_value_heads=2)
    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**own)).double().eval()
    ids = torch.randint(4, 97, (2, 12))
    before = model(ids).logits

    growkern.expand_inplace(model, to={"hidden": 2 * hidden, "heads": 8, "kv_heads": 4})

    assert model.model.embedding_multiplier == model.config.embedding_multiplier == hidden**0.5
    with torch.no_grad():
        assert (saved(model, tmp_path)(ids).logits - before).abs().max() < 1e-6 * before.abs().max()


def test_blocks_whose_numbers_follow_from_the_depth_stay():
    ranks = dict(
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
        head_dim=4,
    )
    ranks |= dict(num_key_value_heads=4)
    model = transformers.MiniCPM3ForCausalLM(transformers.MiniCPM3Config(**TINY | ranks))

    assert (
        "a longer model other blocks or tensors"
        in growkern.describe(model.double()).fixed["layers"]
    )
