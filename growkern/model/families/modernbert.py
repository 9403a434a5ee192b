"""ModernBERT of transformers: ``ModernBertForMaskedLM``, ``ModernBertModel``.

The embedding is normalized, and the attention of block 0 reads the output of this norm without a norm of its own. Hence hidden grows
exactly by whole multiples only, and new blocks copy any block but the first. The config has no head_dim (hidden = heads x head_dim).
"""

from growkern.model.hints import Hint

MODERNBERT = Hint(
    fields={
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "vocab_size": "vocab",
    },
    lists=("layer_types",),
    eps="norm_eps",
)
