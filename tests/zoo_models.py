"""Tiny models of transformers that no family describes: class, class of the config, fields of the config.

Sizes that are different things are different numbers wherever the architecture lets them be.
"""

from typing import Any

VOCAB, LENGTH = 97, 12
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDTHS = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
BASE = WIDTHS | TOKENS | dict(vocab_size=VOCAB, max_position_embeddings=64)
DECODER = BASE | dict(num_key_value_heads=2, intermediate_size=80)
APART = DECODER | dict(head_dim=12)  # hidden is not heads x head_dim after a growth of one of them
ENCODER = BASE | dict(
    intermediate_size=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
VISION = WIDTHS | dict(intermediate_size=80, image_size=32, patch_size=16)
TEXT_TOWER = TOKENS | dict(
    hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=72, vocab_size=VOCAB, max_position_embeddings=64
)  # fmt: skip
GPT = TOKENS | dict(n_embd=48, n_head=4, n_layer=2, vocab_size=VOCAB, n_positions=64)
BOTH = TOKENS | dict(
    d_model=48, encoder_attention_heads=4, decoder_attention_heads=4, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=80,
    decoder_ffn_dim=88, vocab_size=VOCAB, max_position_embeddings=64, decoder_start_token_id=2, dropout=0.0,
)  # fmt: skip
SPEECH = BOTH | dict(num_mel_bins=8, max_source_positions=12, max_target_positions=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
Fields = dict[str, Any]

MODELS: dict[str, tuple[str, str, Fields]] = {
    "phi3": ("Phi3ForCausalLM", "Phi3", DECODER),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", APART | SLIDING),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", DECODER),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3", DECODER | dict(
        num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=28, first_k_dense_replace=1)),
    "gpt_oss": ("GptOssForCausalLM", "GptOss", APART | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "falcon": ("FalconForCausalLM", "Falcon", BASE | dict(num_kv_heads=2, new_decoder_architecture=True, alibi=False, bias=False)),
    "falcon_mqa": ("FalconForCausalLM", "Falcon", BASE | dict(multi_query=True, new_decoder_architecture=False, alibi=False, bias=False)),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3", DECODER | dict(no_rope_layers=[1, 0])),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoe",
                    DECODER | dict(num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5)),
    "nemotron": ("NemotronForCausalLM", "Nemotron", DECODER | dict(partial_rotary_factor=0.5)),
    "bloom": ("BloomForCausalLM", "Bloom", TOKENS | dict(hidden_size=48, n_head=4, n_layer=2, vocab_size=VOCAB)),
    "gptj": ("GPTJForCausalLM", "GPTJ", GPT | dict(rotary_dim=4)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCode", GPT | dict(multi_query=True)),
    "stablelm": ("StableLmForCausalLM", "StableLm", DECODER | dict(qk_layernorm=True, partial_rotary_factor=0.5)),
    "cohere": ("CohereForCausalLM", "Cohere", DECODER | dict(use_qk_norm=True)),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2", DECODER),
    "glm4": ("Glm4ForCausalLM", "Glm4", APART | dict(partial_rotary_factor=0.5)),
    "phi": ("PhiForCausalLM", "Phi", DECODER | dict(partial_rotary_factor=0.5)),
    "olmoe": ("OlmoeForCausalLM", "Olmoe", DECODER | EXPERTS),
    "llama4_text": ("Llama4ForCausalLM", "Llama4Text", APART | dict(
        num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=88, interleave_moe_layer_step=2, attention_chunk_size=8)),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nText", APART | SLIDING | dict(
        hidden_size_per_layer_input=10, vocab_size_per_layer_input=VOCAB, laurel_rank=6, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0], altup_num_inputs=3)),
    "mamba": ("MambaForCausalLM", "Mamba",
              TOKENS | dict(hidden_size=48, state_size=10, num_hidden_layers=2, vocab_size=VOCAB, time_step_rank=6)),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2", TOKENS | dict(
        hidden_size=48, num_heads=8, head_dim=12, state_size=10, n_groups=2, num_hidden_layers=2, vocab_size=VOCAB, chunk_size=4)),
    "jamba": ("JambaForCausalLM", "Jamba", DECODER | EXPERTS | dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=10, mamba_dt_rank=6,
        use_mamba_kernels=False)),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3Next", APART | EXPERTS | dict(
        linear_key_head_dim=8, linear_value_head_dim=10, linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=28,
        shared_expert_intermediate_size=28, layer_types=["linear_attention", "full_attention"])),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2", DECODER | dict(layer_types=["conv", "full_attention"], block_multiple_of=8)),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", "RecurrentGemma",
                        DECODER | dict(lru_width=56, num_hidden_layers=3, attention_window_size=8, num_key_value_heads=1)),
    "deberta_v2": ("DebertaV2ForMaskedLM", "DebertaV2",
                   ENCODER | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True)),
    "albert": ("AlbertForMaskedLM", "Albert", ENCODER | dict(embedding_size=20)),
    "electra": ("ElectraForMaskedLM", "Electra", ENCODER | dict(embedding_size=20)),
    "distilbert": ("DistilBertForMaskedLM", "DistilBert",
                   dict(dim=48, n_heads=4, n_layers=2, hidden_dim=80, vocab_size=VOCAB, dropout=0.0)),
    "bart": ("BartForConditionalGeneration", "Bart", BOTH),
    "marian": ("MarianMTModel", "Marian", BOTH),
    "whisper": ("WhisperForConditionalGeneration", "Whisper", SPEECH),
    "mt5": ("MT5ForConditionalGeneration", "MT5",
            dict(d_model=48, d_kv=10, d_ff=80, num_heads=4, num_layers=2, vocab_size=VOCAB, dropout_rate=0.0)),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2", VISION | dict(mlp_ratio=2, num_labels=11)),
    "beit": ("BeitForImageClassification", "Beit", VISION | dict(num_labels=11, use_relative_position_bias=True)),
    "swin": ("SwinForImageClassification", "Swin",
             dict(image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4)),
    "siglip_vision": ("SiglipVisionModel", "SiglipVision", VISION),
    "clip": ("CLIPModel", "CLIP", dict(text_config=TEXT_TOWER, vision_config=VISION, projection_dim=20)),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2", ENCODER | dict(
        conv_dim=[20, 20], conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4)),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VL", dict(
        text_config=APART | dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}),
        vision_config=dict(
            depth=2, hidden_size=32, num_heads=4, intermediate_size=56, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
            out_hidden_size=48, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)),
}  # fmt: skip

HEADS: dict[str, tuple[str, str, Fields]] = {
    "llama_classifier": ("LlamaForSequenceClassification", "Llama", DECODER | dict(num_labels=3)),
    "gpt2_heads": ("GPT2DoubleHeadsModel", "GPT2", GPT),
    "bert_choice": ("BertForMultipleChoice", "Bert", ENCODER),
    "bert_answers": ("BertForQuestionAnswering", "Bert", ENCODER),
    "roberta_tokens": ("RobertaForTokenClassification", "Roberta", ENCODER | dict(num_labels=3)),
    "bart_classifier": ("BartForSequenceClassification", "Bart", BOTH | dict(num_labels=3)),
    "llava": ("LlavaForConditionalGeneration", "Llava", dict(
        text_config=DECODER | dict(model_type="llama"), vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=20),
        image_token_index=90, image_seq_length=4)),
    "whisper_audio": ("WhisperForAudioClassification", "Whisper", SPEECH | dict(num_labels=3)),
    "ast": ("ASTForAudioClassification", "AST", WIDTHS | dict(
        intermediate_size=80, max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8, num_labels=5)),
}  # fmt: skip
