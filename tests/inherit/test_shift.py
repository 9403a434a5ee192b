"""Whether labels are those of the next position is asked of the model's own loss; the loss is the stock loss of each class."""

import pytest
import torch
import transformers
from models import VOCAB, batch, make

from growkern.errors import UnsupportedModelError
from growkern.inherit import KnowledgeInheritance
from growkern.inherit.head import shifts_labels

SMALL = dict(
    vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
XLM = dict(vocab_size=VOCAB, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=32)
T = dict(hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1)
KINDS = {  # class, sizes: the stock loss decides
    **{f"{name}ForCausalLM": (name, SMALL) for name in ("Bart", "MBart", "Pegasus", "Blenderbot", "BlenderbotSmall", "PLBart", "Mvp")},
    "MarianForCausalLM": ("Marian", SMALL | dict(decoder_start_token_id=0)),
    "BigBirdPegasusForCausalLM": ("BigBirdPegasus", SMALL),
    "XLMWithLMHeadModel": ("XLM", XLM),
    "FlaubertWithLMHeadModel": ("Flaubert", XLM),
}  # fmt: skip


def built(kind):
    name, sizes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, kind)(config)


def llava():
    vision = transformers.CLIPVisionConfig(**T, image_size=8, patch_size=4)
    text = make("llama", tied=False).config
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=VOCAB - 1
        )
    )


def is_stock_loss(model):
    ids = batch().clamp(3, VOCAB - 2)
    given = {"input_ids": ids, "labels": ids}
    loss = KnowledgeInheritance(lambda b: b, until=1, peak=0.0)
    loss.attach(model.eval(), torch.optim.SGD(model.parameters()))
    torch.testing.assert_close(loss(given), model(**given).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cross_entropy_is_the_stock_loss(kind):
    is_stock_loss(built(kind))


def test_a_decoder_for_conditional_generation_shifts_its_labels():
    is_stock_loss(llava())


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "gpt_neox", "bert", "modernbert", "t5"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_families_in_every_dtype(family, dtype):
    model = make(family, tied=True).to(dtype)
    assert shifts_labels(model) == (family not in ("bert", "modernbert", "t5"))


def test_a_name_decides_where_the_model_cannot_be_asked_and_the_log_says_so(caplog):
    model = llava()
    model.forward = None  # a forward that needs more inputs raises an error too
    assert shifts_labels(model)
    assert "not callable" in caplog.text and "by its class name, shift=True" in caplog.text


class OddForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else 2 * output.loss + 1
        return output


def test_a_loss_that_is_no_cross_entropy_of_the_logits_is_refused_and_shift_is_the_way_out():
    model = OddForCausalLM(make("llama", tied=False).config)
    with pytest.raises(UnsupportedModelError, match="Pass shift=True or shift=False"):
        shifts_labels(model)
    loss = KnowledgeInheritance(lambda b: b, until=1, peak=0.0)
    loss.attach(model, torch.optim.SGD(model.parameters()), shift=True)


def test_asking_leaves_gradients_and_the_random_state_alone():
    model, calls = make("gpt2", tied=True).train(), []
    model.transformer.drop.p = 0.5
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()

    assert shifts_labels(model)

    assert torch.equal(torch.get_rng_state(), state) and not calls
    assert all(p.grad is None for p in model.parameters())


def test_a_sparse_attention_stays_sparse():
    sizes = T | dict(vocab_size=VOCAB, max_position_embeddings=64, is_decoder=True, block_size=4)
    model = transformers.BigBirdForCausalLM(transformers.BigBirdConfig(**sizes))
    assert shifts_labels(model) and model.bert.attention_type == "block_sparse"
