"""Architecture families: class name of a model -> hint; of ``torch.nn``, function from the module to the ModelSpec."""

from collections.abc import Callable

from growkern.model.families import encoder
from growkern.model.families.bert import BERT
from growkern.model.families.gpt2 import GPT2
from growkern.model.families.gpt_neox import GPT_NEOX
from growkern.model.families.llama import LLAMA, MISTRAL
from growkern.model.families.modernbert import MODERNBERT
from growkern.model.families.moe import MIXTRAL, QWEN3_MOE
from growkern.model.families.opt import OPT
from growkern.model.families.t5 import T5, T5_ENCODER
from growkern.model.families.vit import VIT
from growkern.model.hints import Hint
from growkern.model.spec import ModelSpec

FAMILIES: dict[str, Hint | Callable[..., ModelSpec]] = {
    "BertForMaskedLM": BERT,
    "BertForPreTraining": BERT,
    "BertModel": BERT,
    "Gemma2ForCausalLM": LLAMA,
    "Gemma2Model": LLAMA,
    "GPT2LMHeadModel": GPT2,
    "GPT2Model": GPT2,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "GPTNeoXModel": GPT_NEOX,
    "LlamaForCausalLM": LLAMA,
    "LlamaModel": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MistralModel": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "MixtralModel": MIXTRAL,
    "ModernBertForMaskedLM": MODERNBERT,
    "ModernBertModel": MODERNBERT,
    "OPTForCausalLM": OPT,
    "OPTModel": OPT,
    "Qwen2ForCausalLM": MISTRAL,
    "Qwen2Model": MISTRAL,
    "Qwen3ForCausalLM": MISTRAL,
    "Qwen3Model": MISTRAL,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3MoeModel": QWEN3_MOE,
    "RobertaForMaskedLM": BERT,
    "RobertaModel": BERT,
    "T5EncoderModel": T5_ENCODER,
    "T5ForConditionalGeneration": T5,
    "T5Model": T5,
    "TransformerEncoder": encoder.describe,
    "TransformerEncoderLayer": encoder.describe_layer,
    "ViTForImageClassification": VIT,
    "ViTModel": VIT,
}
