"""BERT and RoBERTa of transformers: ``BertForMaskedLM``, ``BertForPreTraining``, ``BertModel``, ``RobertaForMaskedLM``, ``RobertaModel``.

Post-norm: every sum is normalized before a layer reads it, so hidden grows exactly by whole multiples only, and a new block takes over
the last LayerNorm of the block before it. The config has no head_dim (hidden = heads x head_dim).
"""

from growkern.model.hints import Hint

BERT = Hint(
    fields={
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "max_position_embeddings": "positions",
        "vocab_size": "vocab",
        "type_vocab_size": "token_types",
    },
    unused=("cls.predictions.bias", "lm_head.bias"),
    eps="layer_norm_eps",
)
