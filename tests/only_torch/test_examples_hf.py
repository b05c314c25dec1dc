"""Pruning models of transformers without an example: each modality is described by the configuration."""

from __future__ import annotations

import pytest

from slimkit.prune import PruneTorch
from slimkit.trace.examples import first_layer
from slimkit.trace.passes import trace

import torch
import transformers as hf
from torch import nn

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEEN = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TWO = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
HEARD = {**TWO, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}


def _clip():
    text, seen = {**TEXT, "projection_dim": 16}, {**SEEN, "projection_dim": 16}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=seen, projection_dim=16))


def _images_and_decoder():
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**SEEN),
        hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2),
    )
    return hf.VisionEncoderDecoderModel(config)


def _images_in_text():
    seen = hf.CLIPVisionConfig(**{**SEEN, "num_hidden_layers": 2})  # the last but one is read
    config = hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=seen, image_token_index=98)
    return hf.LlavaForConditionalGeneration(config)


MODELS = {
    "text": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), "dummy_inputs: input_ids (3, 5)"),
    "image": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        ),
        "pixel_values (1, 3, 224, 224)",
    ),
    "image of one size": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SEEN)),
        "the model's configuration: pixel_values (1, 3, 32, 32)",
    ),
    "two towers": (_clip, "pixel_values (1, 3, 32, 32), input_ids (1, 11)"),
    "audio": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**HEARD)),
        "input_features (1, 8, 40), decoder_input_ids (1, 11)",
    ),
    "audio, encoder alone": (
        lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**HEARD)),
        "input_features (1, 8, 40)",
    ),
    "spectrogram": (
        lambda: hf.ASTForAudioClassification(
            hf.ASTConfig(**{k: SEEN[k] for k in list(SEEN)[:4]}, max_length=64, num_mel_bins=32)
        ),
        "input_values (1, 64, 32)",
    ),
    "encoder and decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        ),
        "decoder_input_ids (3, 5)",
    ),
    "encoder and decoder, one text": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**TWO)),
        "dummy_inputs: attention_mask (2, 5), input_ids (2, 5)",
    ),
    "image and decoder": (_images_and_decoder, "pixel_values (1, 3, 32, 32), decoder_input_ids (1, 11)"),
    "images in text": (_images_in_text, "pixel_values (1, 3, 32, 32), input_ids (1, 27)"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_modality_is_described(kind):
    make, words = MODELS[kind]
    report = PruneTorch(make()).report()
    assert [words in note for note in report["notes"]] == [True], report["notes"]
    assert report["variables"]


def test_a_model_of_two_towers_is_pruned_on_what_its_configuration_says():
    model = _clip()
    before = sum(p.numel() for p in model.parameters())
    left, _ = PruneTorch(model).analysis(0.75)
    PruneTorch(model).prune(0.75)
    assert sum(p.numel() for p in model.parameters()) == left < 0.9 * before


@pytest.mark.parametrize(
    ("net", "first"),
    [
        (nn.Sequential(nn.LSTM(5, 8)), ("0", "recurrent", 5, 0)),
        (nn.Sequential(nn.EmbeddingBag(7, 8)), ("0", "embedding", 7, 0)),
        (nn.Sequential(nn.ReLU(), nn.ConvTranspose3d(3, 8, 2)), ("1", "conv", 3, 3)),
        (nn.MultiheadAttention(8, 2), ("out_proj", "linear", 8, 0)),
        (nn.LazyLinear(4), None),
        (nn.LayerNorm(4), None),
    ],
)
def test_the_first_layer_says_what_it_takes(net, first):
    assert first_layer(net) == first


def test_the_example_has_the_dtype_of_the_model():
    net = nn.Sequential(nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Conv1d(16, 4, 3)).to(torch.bfloat16)
    assert "conv 0): (1, 3, 224)" in PruneTorch(net).report()["notes"][0]


def test_a_trace_is_not_made_twice(monkeypatch):
    made = []

    def counted(model, examples, real=None):
        made.append(real)
        return trace(model, examples, real)

    monkeypatch.setattr("slimkit.trace.examples.trace", counted)
    pruner = PruneTorch(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)))
    pruner.analysis(0.5)
    pruner.analysis(0.7)
    assert made == [False]
