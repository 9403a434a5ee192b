"""Llama-type decoders of transformers: Llama, Mistral, Qwen2, Qwen3, Gemma 2, as ``...ForCausalLM`` and ``...Model``.

The axis of query heads is kv_heads x group, so that growth keeps groups together. head_dim grows only if it is named; where a config
derives head_dim from hidden (Qwen2), growth writes head_dim into the config. Gemma 2 divides scores by
``sqrt(query_pre_attn_scalar)`` for any head_dim; growth does not change this field.
"""

from dataclasses import replace

from growkern.model.hints import Hint

MISTRAL = Hint(
    fields={
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_dim",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "vocab_size": "vocab",
    },
    lists=("layer_types",),
    eps="rms_norm_eps",
)
LLAMA = replace(MISTRAL, saves=("hidden", "heads"))
