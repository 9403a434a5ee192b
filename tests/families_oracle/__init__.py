"""Specs of the families as they were written by hand: the oracle of the specs that hints and tracing give."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from families_oracle import (
    bert,
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

if TYPE_CHECKING:
    from torch import nn

SPECS: dict[str, Callable[..., ModelSpec]] = {
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
    "ViTForImageClassification": vit.describe,
    "ViTModel": partial(vit.describe, base="", head=False),
}


def by_hand(model: "nn.Module") -> ModelSpec:
    """Return the spec of a model of transformers; transformers unties parameters for which a checkpoint has different values."""
    spec = SPECS[type(model).__name__](model.config)
    live = dict(model.named_parameters(remove_duplicate=False))
    ties = {a: b for a, b in spec.ties.items() if live.get(a) is live.get(b)}
    return replace(spec, ties=ties)
