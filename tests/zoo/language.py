"""Hugging Face architectures from small configurations; classes are imported when a network is built."""

from __future__ import annotations

import torch

TEXT = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    intermediate_size=128,
    max_position_embeddings=40,
    **TEXT,
)
LLAMA = dict(BERT, num_key_value_heads=4, num_attention_heads=8, head_dim=8)
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
IDS = {"input_ids": (2, 7)}
PIX = {"pixel_values": (2, 3, 32, 32)}
BIG = {"pixel_values": (2, 3, 64, 64)}

# name -> (class, config class, config, inputs)
# ruff: noqa: E501
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, IDS),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT, IDS),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", dict(dim=64, hidden_dim=128, n_heads=8, n_layers=2, max_position_embeddings=40, **TEXT), IDS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=64, n_layer=2, n_head=8, n_positions=40, **TEXT), IDS),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=8, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=40, **TEXT), IDS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, IDS),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, IDS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(LLAMA, tie_word_embeddings=True), IDS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA, IDS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA, IDS),
    "phi": ("PhiForCausalLM", "PhiConfig", dict(BERT), IDS),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=8, decoder_start_token_id=0, **{k: v for k, v in TEXT.items() if k != "bos_token_id"}), {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(LLAMA, num_local_experts=4, num_experts_per_tok=2), IDS),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, PIX),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT, PIX),
    "beit": ("BeitForImageClassification", "BeitConfig", dict(VIT, use_relative_position_bias=True), PIX),
    "swin": ("SwinForImageClassification", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4}, PIX),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [32, 64], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [4, 8], "mlp_ratios": [2, 2], "decoder_hidden_size": 64}, BIG),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [32, 64], "depths": [1, 2], "num_stages": 2, "image_size": 32}, PIX),
    "hf_resnet": ("ResNetForImageClassification", "ResNetConfig", {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 2]}, PIX),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 2], "groups_width": 8}, PIX),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"image_size": 32, "depth_multiplier": 0.25}, BIG),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.35}, BIG),
    "efficientnet": ("EfficientNetForImageClassification", "EfficientNetConfig", {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}, BIG),
}  # fmt: skip


# Families nobody tuned a rule for: what a user may bring.
SEQ = {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}
BART = dict(
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=8,
    decoder_attention_heads=8,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    max_position_embeddings=40,
    decoder_start_token_id=0,
    **TEXT,
)
MORE = {
    'albert':('AlbertForSequenceClassification','AlbertConfig',dict(BERT,embedding_size=32),IDS),
    'electra':('ElectraForSequenceClassification','ElectraConfig',dict(BERT,embedding_size=32),IDS),
    'deberta':('DebertaV2ForSequenceClassification','DebertaV2Config',dict(BERT,relative_attention=True,pos_att_type=['p2c','c2p'],position_buckets=8,norm_rel_ebd='layer_norm',share_att_key=True),IDS),
    'bart':('BartForConditionalGeneration','BartConfig',BART,SEQ),
    'neox':('GPTNeoXForCausalLM','GPTNeoXConfig',BERT,IDS),
    'gptj':('GPTJForCausalLM','GPTJConfig',dict(n_embd=64,n_layer=2,n_head=8,n_positions=40,rotary_dim=4,**TEXT),IDS),
    'bloom':('BloomForCausalLM','BloomConfig',dict(hidden_size=64,n_layer=2,n_head=8,**TEXT),IDS),
    'falcon':('FalconForCausalLM','FalconConfig',dict(hidden_size=64,num_hidden_layers=2,num_attention_heads=8,new_decoder_architecture=True,num_kv_heads=4,**TEXT),IDS),
    'mpt':('MptForCausalLM','MptConfig',dict(d_model=64,n_heads=8,n_layers=2,max_seq_len=40,**{k:v for k,v in TEXT.items() if k=='vocab_size'}),IDS),
    'phi3':('Phi3ForCausalLM','Phi3Config',dict(BERT,num_key_value_heads=4),IDS),
    'gemma2':('Gemma2ForCausalLM','Gemma2Config',LLAMA,IDS),
    'olmo':('OlmoForCausalLM','OlmoConfig',dict(BERT,num_key_value_heads=4),IDS),
    'starcoder2':('Starcoder2ForCausalLM','Starcoder2Config',dict(BERT,num_key_value_heads=4),IDS),
    'qwen2moe':('Qwen2MoeForCausalLM','Qwen2MoeConfig',dict(LLAMA,num_experts=4,num_experts_per_tok=2,moe_intermediate_size=32,shared_expert_intermediate_size=64),IDS),
    'deepseek3':('DeepseekV3ForCausalLM','DeepseekV3Config',dict(BERT,num_key_value_heads=8,n_routed_experts=4,num_experts_per_tok=2,n_group=2,topk_group=1,moe_intermediate_size=32,kv_lora_rank=16,q_lora_rank=32,qk_rope_head_dim=8,qk_nope_head_dim=8,v_head_dim=8,first_k_dense_replace=1,n_shared_experts=1),IDS),
    'mamba':('MambaForCausalLM','MambaConfig',dict(hidden_size=64,num_hidden_layers=2,state_size=8,**TEXT),IDS),
    'modernbert':('ModernBertForSequenceClassification','ModernBertConfig',dict(BERT,local_attention=8),IDS),
    'xlnet':('XLNetForSequenceClassification','XLNetConfig',dict(d_model=64,n_layer=2,n_head=8,d_inner=128,**TEXT),IDS),
    'dinov2':('Dinov2ForImageClassification','Dinov2Config',dict(VIT,mlp_ratio=2),PIX),
    'swinv2':('Swinv2ForImageClassification','Swinv2Config',{"image_size": 32,"patch_size": 2,"embed_dim": 32,"depths": [2,2],"num_heads": [4,8],"window_size": 4},PIX),
    'clip':('CLIPVisionModelWithProjection','CLIPVisionConfig',dict(VIT,projection_dim=32),PIX),
    'pvt':('PvtForImageClassification','PvtConfig',{"image_size": 64,"hidden_sizes": [16,32,64,64],"depths": [1,1,1,1],"num_attention_heads": [1,2,4,8]},BIG),
    'levit':('LevitForImageClassification','LevitConfig',{"image_size": 64,"hidden_sizes": [32,64,64],"num_attention_heads": [4,4,4],"depths": [1,1,1],"key_dim": [8,8,8]},BIG),
    'wav2vec2':('Wav2Vec2ForCTC','Wav2Vec2Config',dict(BERT,conv_dim=[32,32],conv_kernel=[10,3],conv_stride=[5,2],num_feat_extract_layers=2,num_conv_pos_embeddings=16,num_conv_pos_embedding_groups=4),{'input_values':(2,400)}),
    'whisper':('WhisperForConditionalGeneration','WhisperConfig',dict(BART,num_mel_bins=16,max_source_positions=20,max_target_positions=20),{'input_features':(2,16,40),'decoder_input_ids':(2,5)}),
}  # fmt: skip


def build(name: str):
    """(network in eval mode with weights that make every channel matter, example keyword arguments)."""
    import transformers

    model_class, config_class, fields, shapes = {**MODELS, **MORE}[name]
    config = getattr(transformers, config_class)(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Fresh biases and norms are all zero or one; a wrong cut would not show.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    inputs = {k: torch.randint(3, 90, s) if "ids" in k else torch.randn(s) for k, s in shapes.items()}
    return model.eval(), inputs
