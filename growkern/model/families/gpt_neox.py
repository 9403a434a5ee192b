"""GPT-NeoX of transformers: ``GPTNeoXForCausalLM``, ``GPTNeoXModel`` (e.g. Pythia). hidden = heads x head_dim, as the config says."""

from growkern.model.hints import Hint

GPT_NEOX = Hint(
    fields={
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "vocab_size": "vocab",
    },
    unread=("rotary_ndims",),
    eps="layer_norm_eps",
)
