"""T5 of transformers: ``T5ForConditionalGeneration``, ``T5Model``, ``T5EncoderModel``.

All blocks of a stack add the table of relative positions of its first block to their scores, so the self-attentions of a stack share
one space of heads. head_dim (``d_kv``) grows only if it is named. ``layers`` and ``decoder_layers`` are independent sizes. If the decoder
is deeper than the encoder, ``generate()`` of transformers 5.23 needs a cache made from ``model.decoder.config``, because its default cache
has ``num_layers`` layers.
"""

from dataclasses import replace

from growkern.model.hints import Hint

T5_ENCODER = Hint(
    fields={
        "d_model": "hidden",
        "d_kv": "head_dim",
        "d_ff": "ffn",
        "num_heads": "heads",
        "num_layers": "layers",
        "vocab_size": "vocab",
    },
    unused=("shared.weight",),
    by_stack=True,
    eps="layer_norm_epsilon",
)
T5 = replace(
    T5_ENCODER,
    fields={**T5_ENCODER.fields, "num_decoder_layers": "decoder_layers"},
    config={"decoder.num_layers": "decoder_layers"},
)
