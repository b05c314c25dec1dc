"""The sentence-encoder task in MindSpore: MiniLM's weights, converted, in a BERT written as a cell."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from docstring_text import agreement, licence_sentences, model_folder, split_pairs, tokenizer
from tokenizers import Tokenizer

import slimkit_ms

import mindspore as ms
from mindspore import nn, ops


class Attention(nn.Cell):
    """Self-attention over (batch, tokens, width); padding gets a score of minus ten thousand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = float((width // heads) ** -0.5)
        self.query, self.key, self.value = (nn.Dense(width, width) for _ in range(3))
        self.dense = nn.Dense(width, width)
        self.softmax = nn.Softmax(-1)

    def construct(self, x, away):
        n, tokens, width = x.shape
        q = self.query(x).reshape(n, tokens, self.heads, -1).transpose(0, 2, 1, 3)
        k = self.key(x).reshape(n, tokens, self.heads, -1).transpose(0, 2, 3, 1)
        v = self.value(x).reshape(n, tokens, self.heads, -1).transpose(0, 2, 1, 3)
        share = self.softmax(ops.matmul(q, k) * self.scale + away)
        return self.dense(ops.matmul(share, v).transpose(0, 2, 1, 3).reshape(n, tokens, width))


class Layer(nn.Cell):
    """One block of BERT: attention and a feed-forward, each added to its input and normed."""

    def __init__(self, width: int, heads: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm((width,), epsilon=epsilon)
        self.intermediate = nn.Dense(width, inner)
        self.gelu = nn.GELU()  # the tanh form: MindSpore 2.10 cannot write the exact one as ONNX
        self.output = nn.Dense(inner, width)
        self.output_norm = nn.LayerNorm((width,), epsilon=epsilon)

    def construct(self, x, away):
        x = self.attention_norm(x + self.attention(x, away))
        return self.output_norm(x + self.output(self.gelu(self.intermediate(x))))


class SentenceEncoder(nn.Cell):
    """BERT, the mean over the tokens that are not padding, and a length of one: (batch, tokens) -> (batch, width)."""

    def __init__(self, config: dict[str, Any], layers: int) -> None:
        super().__init__()
        width, epsilon = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.types = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm((width,), epsilon=epsilon)
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        self.layer = nn.CellList([Layer(width, heads, inner, epsilon) for _ in range(layers)])

    def construct(self, input_ids, attention_mask):
        mask = attention_mask.astype(ms.float32)
        away = (mask.expand_dims(1).expand_dims(1) - 1.0) * 10000.0
        places = ops.arange(input_ids.shape[1])
        x = self.words(input_ids) + self.positions(places) + self.types(ops.zeros_like(input_ids))
        x = self.norm(x)
        for layer in self.layer:
            x = layer(x, away)
        mask = mask.expand_dims(-1)
        mean = (x * mask).sum(1) / mask.sum(1)
        return mean / ops.sqrt((mean * mean).sum(-1, keepdims=True))


# How the file's names become the cell's, before the rules for layers (gamma, beta, embedding_table).
_NAMES = {
    "embeddings.word_embeddings.weight": "words.embedding_table",
    "embeddings.position_embeddings.weight": "positions.embedding_table",
    "embeddings.token_type_embeddings.weight": "types.embedding_table",
    r"re:^embeddings\.LayerNorm\.": "norm.",
    r"re:^encoder\.layer\.": "layer.",
    r"re:attention\.self\.": "attention.",
    r"re:attention\.output\.dense\.": "attention.dense.",
    r"re:attention\.output\.LayerNorm\.": "attention_norm.",
    r"re:intermediate\.dense\.": "intermediate.",
    r"re:(?<!attention\.)output\.dense\.": "output.",
    r"re:(?<!attention\.)output\.LayerNorm\.": "output_norm.",
}


def build(layers: int = 6) -> nn.Cell:
    """The pretrained encoder of 6 layers, or a fresh one of fewer layers for weights to be cut into."""
    folder = model_folder()
    cell = SentenceEncoder(json.loads((folder / "config.json").read_text()), layers)
    if layers == 6:
        with tempfile.TemporaryDirectory() as place:
            converted = Path(place, "minilm.safetensors")
            # Without the pooler, which mean pooling does without, and position numbers that the cell counts itself.
            slimkit_ms.convert_checkpoint(
                folder / "model.safetensors", converted, name_map=_NAMES, to="mindspore",
                choice_func=lambda name: not name.startswith(("pooler.", "embeddings.position_ids")),
            )  # fmt: skip
            slimkit_ms.load_checkpoint(converted, cell, strict_load=True)
    return cell.set_train(False)


def _batch(words: Tokenizer, texts: list[str]) -> tuple[ms.Tensor, ms.Tensor]:
    encoded = words.encode_batch(texts)
    return (
        ms.Tensor(np.array([e.ids for e in encoded], np.int32)),
        ms.Tensor(np.array([e.attention_mask for e in encoded], np.int32)),
    )


def data(pairs: int = 192, held_out: int = 64, batch_size: int = 16) -> dict[str, Any]:
    """Docstrings as pairs of summary and body; held-out pairs come from modules never trained on.

    A training batch holds `batch_size` summaries and then their bodies, so that distillation reads it as sentences
    and the contrastive loss as pairs.
    """
    train, held = split_pairs(pairs, held_out)
    words = tokenizer(fixed=True)
    groups = [train[i : i + batch_size] for i in range(0, len(train) - batch_size + 1, batch_size)]
    batches = [_batch(words, [s for s, _ in group] + [b for _, b in group]) for group in groups]
    sentences = [s for s, _ in held] + licence_sentences()[:16]
    return {
        "train": batches,
        "calibration": batches[:: max(1, len(batches) // 8)],
        "sentences": [_batch(words, sentences[i : i + 32]) for i in range(0, len(sentences), 32)],
        "summaries": [_batch(words, [s for s, _ in held[i : i + 32]]) for i in range(0, len(held), 32)],
        "bodies": [_batch(words, [b for _, b in held[i : i + 32]]) for i in range(0, len(held), 32)],
        "example": _batch(words, sentences[:8]),
    }


def embed(model: nn.Cell, batches: list[tuple[ms.Tensor, ms.Tensor]]) -> np.ndarray:
    """The embeddings of all sentences, (n, 384)."""
    modes = {cell: cell.training for _, cell in model.cells_and_names()}
    model.set_train(False)
    found = np.concatenate([model(*batch).asnumpy() for batch in batches])
    for cell, mode in modes.items():
        cell.training = mode
    return found


def similarity(model: nn.Cell, data: dict[str, Any], dense: nn.Cell) -> dict[str, float]:
    """Agreement with the dense encoder on held-out text, and how well a summary finds the body it belongs to."""
    mine = embed(model, data["sentences"])
    theirs = mine if model is dense else embed(dense, data["sentences"])
    return agreement(mine, theirs, embed(model, data["summaries"]), embed(model, data["bodies"]))


def contrastive(model: nn.Cell, batch: tuple[ms.Tensor, ms.Tensor]) -> ms.Tensor:
    """Each summary must be nearest to its own body among the bodies of the batch, and the other way round."""
    found = model(*batch)
    half = found.shape[0] // 2
    scores = ops.matmul(found[:half], found[half:].T) / 0.05
    own = ops.arange(half).astype(ms.int32)
    return (ops.cross_entropy(scores, own) + ops.cross_entropy(scores.T, own)) / 2
