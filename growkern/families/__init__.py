"""Architecture families: class name of a model -> the function that describes it from its config."""

from collections.abc import Callable
from functools import partial

from growkern.families import bert, gpt2, llama
from growkern.spaces import ModelSpec

FAMILIES: dict[str, Callable[..., ModelSpec]] = {
    "BertForMaskedLM": bert.describe,
    "BertForPreTraining": partial(bert.describe, pooler=True),
    "BertModel": partial(bert.describe, base="", mlm=False, pooler=True),
    "GPT2LMHeadModel": gpt2.describe,
    "GPT2Model": partial(gpt2.describe, base="", head=False),
    "LlamaForCausalLM": llama.describe,
    "LlamaModel": partial(llama.describe, base="", head=False),
    "MistralForCausalLM": llama.describe,
    "MistralModel": partial(llama.describe, base="", head=False),
    "Qwen2ForCausalLM": llama.describe,
    "Qwen2Model": partial(llama.describe, base="", head=False),
    "Qwen3ForCausalLM": llama.describe,
    "Qwen3Model": partial(llama.describe, base="", head=False),
}
