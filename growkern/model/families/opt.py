"""OPT of transformers: ``OPTForCausalLM``, ``OPTModel``.

The config has no head_dim (hidden = heads x head_dim). An embedding of another width than hidden (``word_embed_proj_dim``) keeps its
width. OPT-350m's post-norm blocks (``do_layer_norm_before=False``), norms without gains, and a decoder without its last norm are refused.
"""

from growkern.model.hints import Hint

OPT = Hint(
    fields={
        "hidden_size": "hidden",
        "ffn_dim": "ffn",
        "num_attention_heads": "heads",
        "num_hidden_layers": "layers",
        "max_position_embeddings": "positions",
        "vocab_size": "vocab",
    },
    follows={"word_embed_proj_dim": "hidden"},
    apart={"word_embed_proj_dim": ("embedding", "the checkpoint's projections are for this width")},
    only={
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
)
