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
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128, "image_size": 32, "patch_size": 8
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


def build(name: str):
    """(network in eval mode with weights that make every channel matter, example keyword arguments)."""
    import transformers

    model_class, config_class, fields, shapes = MODELS[name]
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
