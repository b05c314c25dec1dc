"""A small BERT and a small Llama, from scratch, on the docstrings of the standard library as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from docstring_text import docstrings

import torch
from torch import nn

LENGTH = 64
# Modules with enough documented functions to tell apart.
_CLASSES = 6


def bert(width: int = 64, layers: int = 2) -> nn.Module:
    """A BERT that names the package a docstring comes from, out of six; bytes are its words."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=257, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width,
        max_position_embeddings=LENGTH, num_labels=_CLASSES, pad_token_id=256,
    )  # fmt: skip
    return Logits(BertForSequenceClassification(config))


def llama(width: int = 64, layers: int = 2) -> nn.Module:
    """A Llama with grouped queries that foretells the next byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=2 * width, max_position_embeddings=LENGTH, pad_token_id=256, use_cache=False,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config))


class Logits(nn.Module):
    """The logits alone of a Hugging Face model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(input_ids=ids).logits


def _bytes(texts: list[str]) -> torch.Tensor:
    rows = np.full((len(texts), LENGTH), 256, np.int64)
    for row, text in zip(rows, texts):
        found = np.frombuffer(text.encode("utf-8")[:LENGTH], np.uint8)
        row[: len(found)] = found
    return torch.from_numpy(rows)


def _packed(inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """A split of 7 to 1, batches for calibration, and an example."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(inputs)))
    test, train = order[: len(order) // 8], order[len(order) // 8 :]
    return {
        "train": torch.utils.data.TensorDataset(inputs[train], targets[train]),
        "test": (inputs[test], targets[test]),
        "calibration": list(inputs[train].split(32))[:16],
        "example": inputs[test][:8],
    }


def packages(limit: int = 1500) -> dict[str, Any]:
    """Docstrings of the six packages with most of them, and which package each is from."""
    found = docstrings()
    roots = [module.split("/")[0] for module, _, _ in found]
    names, counts = np.unique(roots, return_counts=True)
    chosen = list(names[np.argsort(-counts)[:_CLASSES]])
    kept = [(f"{s} {b}", chosen.index(r)) for (_, s, b), r in zip(found, roots) if r in chosen][:limit]
    return _packed(_bytes([t for t, _ in kept]), torch.tensor([c for _, c in kept]))


def next_bytes(limit: int = 1200) -> dict[str, Any]:
    """Docstrings, each with its own bytes as what to foretell."""
    inputs = _bytes([f"{s} {b}" for _, s, b in docstrings()[:limit]])
    return _packed(inputs, inputs)


def next_byte_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of each byte given those before it; padding does not count."""
    logits = model(batch[0])[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1][:, 1:].flatten(), ignore_index=256)


def accuracy(model: nn.Module, data: dict[str, Any], dense: nn.Module) -> dict[str, float]:
    """Share of held-out docstrings whose package is named."""
    return {"accuracy": _evaluated(model, lambda x, y: (model(x).argmax(1) == y).float().mean(), data)}


def bits(model: nn.Module, data: dict[str, Any], dense: nn.Module) -> dict[str, float]:
    """Bits for each byte of held-out docstrings."""
    return {"bits_per_byte": _evaluated(model, lambda x, y: next_byte_loss(model, (x, y)), data) / float(np.log(2))}


def _evaluated(model: nn.Module, measure: Any, data: dict[str, Any]) -> float:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with torch.no_grad():
        found = float(measure(*data["test"]))
    for module, mode in modes.items():
        module.training = mode
    return found
