"""Scripts written for msModelSlim or MindPet, with their imports rewritten to slimkit's."""

from __future__ import annotations

import ast
import difflib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

from slimkit.core import check, public
from slimkit.core.errors import FileFormatError

# The packages whose imports are read, under the names they were published by.
PEERS = {"msmodelslim": "msModelSlim", "modelslim": "msModelSlim", "mindpet": "MindPet", "tk": "MindPet"}

# name in the peer -> name in slimkit; each is imported from whichever of its modules the script chose.
NAMES: dict[str, dict[str, str]] = {
    "msModelSlim": {
        "set_logger_level": "set_logger_level",
        "PruneTorch": "PruneTorch",
        "PruneMindSpore": "PruneMindSpore",
        "PruneConfig": "PruneConfig",
        "prune_model_weight": "prune_model_weight",
        "SparseConfig": "SparseConfig",
        "Compressor": "Compressor",
        "KnowledgeDistillConfig": "KnowledgeDistillConfig",
        "get_distill_model": "get_distill_model",
        "DistillDualModels": "DistillDualModels",
    },
    "MindPet": {
        "LoRADense": "LoRADense",
        "AdapterDense": "AdapterDense",
        "AdapterLayer": "AdapterLayer",
        "LowRankAdapterDense": "LowRankAdapterDense",
        "LowRankAdapterLayer": "LowRankAdapterLayer",
        "PrefixLayer": "PrefixLayer",
        "PrefixEncoder": "PrefixEncoder",
        "PromptTuning": "PromptTuning",
        "RDropLoss": "RDropLoss",
        "rdrop_repeat": "rdrop_repeat",
        "freeze_modules": "freeze_modules",
        "freeze_delta": "freeze_delta",
        "freeze_from_config": "freeze_from_config",
        "TrainableParamsCheckPoint": "TrainableParamsCheckPoint",
        "LinkPathError": "LinkPathError",
        "AbsolutePathError": "AbsolutePathError",
        "ReadYamlFileError": "ReadYamlFileError",
        "ModelConfigFreezeInfoError": "ModelConfigFreezeInfoError",
    },
}

# Where the same name means something else here, and what to look at.
NOTES = {
    "set_node_reserved_ratio": "here it is the least share each node keeps; msModelSlim reads the largest share cut",
    "magnitude": "here |w| alone; what msModelSlim calls magnitude is method='wanda'",
}


@dataclass
class Migration:
    """What became of a script.

    Args:
        text: the script with its imports rewritten.
        rewritten: (line, before, after) of each import.
        unknown: (line, name) of what slimkit has no counterpart for; left as it was.
        notes: (line, text): places where the same name means something else.
    """

    text: str
    rewritten: list[tuple[int, str, str]] = field(default_factory=list)
    unknown: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)


def migrate(text: str, framework: str | None = None, name: str = "script") -> Migration:
    """Rewrite the imports of msModelSlim and MindPet in a script to slimkit's; everything else stays byte for byte.

    Args:
        text: the script.
        framework: "torch" or "mindspore"; None: what the module's name says (MindPet is MindSpore's), then the
            script's other imports.
        name: the script's name, for messages.

    Returns:
        The new text, and what could not be rewritten.

    Raises:
        FileFormatError: the text is not Python.

    Example:
        >>> print(migrate("from msmodelslim.pytorch.prune.prune_torch import PruneTorch as P\\n").text, end="")
        from slimkit import PruneTorch as P
    """
    if framework is not None:
        check.choice(framework, ("torch", "mindspore"), "--framework")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{name} is not a Python script: {error}") from None
    lines = list(io.StringIO(text, newline=""))  # the line ends of Python's own reader; splitlines knows more
    made = Migration(text)
    default = framework or _framework(tree)
    for node in sorted(_imports(tree), key=lambda n: n.lineno, reverse=True):
        _rewrite(node, lines, default, framework, made)
    made.text = "".join(lines)
    for part in ast.walk(tree):
        if isinstance(part, (ast.Attribute, ast.Constant)):
            word = part.attr if isinstance(part, ast.Attribute) else part.value
            if isinstance(word, str) and word in NOTES and (made.rewritten or made.unknown):
                made.notes.append((part.lineno, f"{word}: {NOTES[word]}"))
    for found in (made.rewritten, made.unknown, made.notes):
        found.sort()
    return made


def diff(old: str, new: str, name: str) -> str:
    """The change of a script as a unified diff; empty when there is none."""
    return "".join(
        difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), name, f"{name} (migrated)")
    )


def markdown() -> str:
    """The table of names as docs/migrate.md shows it."""
    rows = ["| Package | Its name | slimkit's name | In |", "|---|---|---|---|"]
    for peer, names in NAMES.items():
        for theirs, ours in names.items():
            rows.append(f"| {peer} | `{theirs}` | `{ours}` | {' and '.join(f'`{w}`' for w in _wings(ours))} |")
    return "\n".join(rows) + "\n"


def _wings(name: str) -> list[str]:
    return [w for w in ("slimkit", "slimkit_ms") if name in public.homes(w)]


def _peer(module: str | None) -> str | None:
    return PEERS.get((module or "").partition(".")[0])


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(tree):
        named = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        named = [a.name for a in node.names] if isinstance(node, ast.Import) else named
        if isinstance(node, (ast.Import, ast.ImportFrom)) and any(_peer(name) for name in named):
            yield node


def _framework(tree: ast.AST) -> str:
    """What a script works with, by its other imports; msModelSlim's and MindPet's names decide nothing here."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    if "mindspore" in roots and "torch" not in roots:
        return "mindspore"
    return "torch"


def _rewrite(
    node: ast.Import | ast.ImportFrom, lines: list[str], default: str, framework: str | None, made: Migration
) -> None:
    """One import statement, in place in `lines`; what slimkit lacks stays behind in a statement of its own."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before = "".join(lines[first : last + 1])
    head = before[: node.col_offset]
    if isinstance(node, ast.Import) or head.strip() or ";" in before:
        # `import msmodelslim.x` is used by its dotted name further down, which only a person can follow.
        names = node.names if isinstance(node, ast.Import) else [ast.alias(f"{node.module}.*")]
        made.unknown += [(node.lineno, f"import {a.name}") for a in names if _peer(a.name)]
        return
    module, peer = node.module or "", _peer(node.module)
    assert peer is not None
    parts = module.split(".")
    spoken = "torch" if "pytorch" in parts else "mindspore" if "mindspore" in parts or peer == "MindPet" else None
    wanted = framework or spoken or default
    package = {"torch": "slimkit", "mindspore": "slimkit_ms"}[wanted]
    known: list[ast.alias] = []
    left: list[ast.alias] = []
    for alias in node.names:
        ours = NAMES[peer].get(alias.name)
        (known if ours is not None and _wings(ours) else left).append(alias)
    made.unknown += [(node.lineno, f"{module}.{alias.name}") for alias in left]
    if not known:
        return
    statements: dict[str, list[str]] = {}
    for alias in known:
        ours = NAMES[peer][alias.name]
        home = package if package in _wings(ours) else _wings(ours)[0]
        called = alias.asname or (alias.name if alias.name != ours else None)
        statements.setdefault(home, []).append(ours if called in (None, ours) else f"{ours} as {called}")
    new = [f"{head}from {home} import {', '.join(names)}" for home, names in statements.items()]
    if left:
        rest = ", ".join(a.name if a.asname is None else f"{a.name} as {a.asname}" for a in left)
        new.append(f"{head}from {module} import {rest}")
    tail = lines[last][_after(node, lines[last]) :]
    ending = before[len(before.rstrip("\r\n")) :]
    after = (ending or "\n").join(new) + (tail if tail.strip() else ending)
    lines[first : last + 1] = [after]
    made.rewritten.append((node.lineno, before.strip(), after.strip()))


def _after(node: ast.Import | ast.ImportFrom, line: str) -> int:
    """Where a statement ends in its last line, in characters: ast counts UTF-8 bytes."""
    return len(line.encode()[: node.end_col_offset or 0].decode(errors="ignore"))
