"""ViT of transformers: ``ViTForImageClassification``, ``ViTModel``.

Patches, channels and labels are fixed sizes, because a model for other images has another function. The config has no head_dim
(hidden = heads x head_dim). The mask token of masked image modeling is not described.
"""

from growkern.model.hints import Hint

VIT = Hint(
    fields={
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
    },
    follows={"pooler_output_size": "hidden"},
    eps="layer_norm_eps",
)
