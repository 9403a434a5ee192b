"""GPT-2 of transformers: ``GPT2LMHeadModel``, ``GPT2Model``.

The config has no head_dim (hidden = heads x head_dim). Blocks cannot be added under ``scale_attn_by_inverse_layer_idx``, because
the function of a block depends on the depth of the block. Cross attention is not described.
"""

from growkern.model.hints import Hint

GPT2 = Hint(
    fields={
        "n_embd": "hidden",
        "n_head": "heads",
        "n_inner": "ffn",
        "n_layer": "layers",
        "n_positions": "positions",
        "vocab_size": "vocab",
    },
    derived={"ffn": ("hidden", 4)},
    eps="layer_norm_epsilon",
    fixed_by={
        "scale_attn_by_inverse_layer_idx": (
            False,
            ("layers", "head_dim"),
            "scale_attn_by_inverse_layer_idx makes a block depend on its depth",
        )
    },
)
