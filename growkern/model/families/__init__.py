"""Architecture families: class name of a model -> function from the config (torch.nn: from the module) to the ModelSpec."""

from collections.abc import Callable
from functools import partial

from growkern.model.families import (
    bert,
    encoder,
    gemma2,
    gpt2,
    gpt_neox,
    llama,
    modernbert,
    moe,
    opt,
    t5,
    vit,
)
from growkern.model.spec import ModelSpec

FAMILIES: dict[str, Callable[..., ModelSpec]] = {
    "BertForMaskedLM": bert.describe,
    "BertForPreTraining": partial(bert.describe, pooler=True),
    "BertModel": partial(bert.describe, base="", mlm=None, pooler=True),
    "Gemma2ForCausalLM": gemma2.describe,
    "Gemma2Model": partial(gemma2.describe, base="", head=False),
    "GPT2LMHeadModel": gpt2.describe,
    "GPT2Model": partial(gpt2.describe, base="", head=False),
    "GPTNeoXForCausalLM": gpt_neox.describe,
    "GPTNeoXModel": partial(gpt_neox.describe, base="", head=False),
    "LlamaForCausalLM": llama.describe,
    "LlamaModel": partial(llama.describe, base="", head=False),
    "MistralForCausalLM": llama.describe,
    "MistralModel": partial(llama.describe, base="", head=False),
    "MixtralForCausalLM": moe.describe,
    "MixtralModel": partial(moe.describe, base="", head=False),
    "ModernBertForMaskedLM": modernbert.describe,
    "ModernBertModel": partial(modernbert.describe, base="", mlm=False),
    "OPTForCausalLM": opt.describe,
    "OPTModel": partial(opt.describe, base="decoder.", head=False),
    "Qwen2ForCausalLM": llama.describe,
    "Qwen2Model": partial(llama.describe, base="", head=False),
    "Qwen3ForCausalLM": llama.describe,
    "Qwen3Model": partial(llama.describe, base="", head=False),
    "Qwen3MoeForCausalLM": partial(moe.describe, ffn="moe_intermediate_size", qk_norms=True),
    "Qwen3MoeModel": partial(
        moe.describe, base="", head=False, ffn="moe_intermediate_size", qk_norms=True
    ),
    "RobertaForMaskedLM": partial(bert.describe, base="roberta.", mlm=bert.ROBERTA_HEAD),
    "RobertaModel": partial(bert.describe, base="", mlm=None, pooler=True),
    "T5EncoderModel": partial(t5.describe, decoder=False, head=False),
    "T5ForConditionalGeneration": t5.describe,
    "T5Model": partial(t5.describe, head=False),
    "TransformerEncoder": encoder.describe,
    "TransformerEncoderLayer": encoder.describe_layer,
    "ViTForImageClassification": vit.describe,
    "ViTModel": partial(vit.describe, base="", head=False),
}
