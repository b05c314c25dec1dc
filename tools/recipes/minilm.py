"""The sentence-encoder task: pretrained MiniLM, and English text that comes with every Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from docstring_text import agreement, licence_sentences, model_folder, split_pairs, tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer

import torch
from torch import nn


class SentenceEncoder(nn.Module):
    """BERT, the mean over the tokens that are not padding, and a length of one: (batch, tokens) -> (batch, 384)."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def build(layers: int = 6) -> nn.Module:
    """The pretrained encoder of 6 layers, or a fresh one of fewer layers for weights to be cut into."""
    from transformers import BertConfig, BertModel

    folder = model_folder()
    bert = BertModel(BertConfig.from_pretrained(folder, num_hidden_layers=layers), add_pooling_layer=False)
    if layers == 6:
        wanted = bert.state_dict()
        weights = load_file(folder / "model.safetensors")
        # The file also holds the pooler, which mean pooling does without, and position numbers that BERT counts itself.
        bert.load_state_dict({name: weights[name] for name in wanted})
    return SentenceEncoder(bert).eval()


def _batch(words: Tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    encoded = words.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


def data(pairs: int = 1280, held_out: int = 192, batch_size: int = 16) -> dict[str, Any]:
    """Docstrings as pairs of summary and body; held-out pairs come from modules never trained on.

    A training batch holds `batch_size` summaries and then their bodies, so that distillation reads it as sentences
    and the contrastive loss as pairs.
    """
    train, held = split_pairs(pairs, held_out)
    words = tokenizer()
    groups = [train[i : i + batch_size] for i in range(0, len(train) - batch_size + 1, batch_size)]
    batches = [_batch(words, [s for s, _ in group] + [b for _, b in group]) for group in groups]
    sentences = [s for s, _ in held] + licence_sentences()[:64]
    return {
        # batch_size=None: each element is a batch already; only their order is shuffled.
        "train": torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True),
        "calibration": batches[::10],
        "sentences": [_batch(words, sentences[i : i + 32]) for i in range(0, len(sentences), 32)],
        "summaries": [_batch(words, [s for s, _ in held[i : i + 32]]) for i in range(0, len(held), 32)],
        "bodies": [_batch(words, [b for _, b in held[i : i + 32]]) for i in range(0, len(held), 32)],
        "example": _batch(words, sentences[:8]),
    }


def embed(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """The embeddings of all sentences, (n, 384)."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(**batch) for batch in batches]).numpy()
    for module, mode in modes.items():
        module.training = mode
    return found


def similarity(model: nn.Module, data: dict[str, Any], dense: nn.Module) -> dict[str, float]:
    """Agreement with the dense encoder on held-out text, and how well a summary finds the body it belongs to."""
    mine = embed(model, data["sentences"])
    theirs = mine if model is dense else embed(dense, data["sentences"])
    return agreement(mine, theirs, embed(model, data["summaries"]), embed(model, data["bodies"]))


def contrastive(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each summary must be nearest to its own body among the bodies of the batch, and the other way round."""
    first, second = model(**batch).chunk(2)
    scores = first @ second.T / 0.05
    own = torch.arange(len(first))
    return (nn.functional.cross_entropy(scores, own) + nn.functional.cross_entropy(scores.T, own)) / 2
