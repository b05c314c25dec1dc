"""What a file or folder holds, read from the file itself: weights, plans, deltas, W16A16S folders, ONNX, reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.ascend import folder as ascend
from slimkit.core.checkpoint.openweights import INDEXES, WHOLE, open_weights, source_config
from slimkit.core.checkpoint.torchfile import TorchFile
from slimkit.core.checkpoint.weightfile import Entry, Weights
from slimkit.core.errors import FileFormatError
from slimkit.core.jobs import folders
from slimkit.core.jobs.measurement import show, summary_rows
from slimkit.core.log import progress

Array = np.ndarray[Any, Any]

# Folders that hold no model's weights alone: the file that tells them -> what they are.
OTHERS = {"trainer.json": "trainer checkpoint", "cache.json": "teacher cache"}

# Bits of a number's sign, which make no difference to whether it is zero.
_SIGNLESS = {"BF16": 0x7FFF, "F8_E4M3": 0x7F, "F8_E5M2": 0x7F}


@dataclass(frozen=True)
class Look:
    """What was found.

    Args:
        path: the file or folder.
        kind: weights, model, pruned, desc, bundle, peft, w16a16s, w8a8s, onnx, run, trainer checkpoint or teacher
            cache.
        facts: label -> value, for the lines above the table.
        columns: the table's columns.
        rows: the table, plain values; None is "not known".
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; each row as an object."""
        plain = asdict(self)
        plain["rows"] = [dict(zip(self.columns, row)) for row in self.rows]
        del plain["columns"]
        return plain


def kind_of(path: Path) -> str:
    """What a path is, by the files it consists of.

    Raises:
        FileFormatError: nothing that slimkit knows.
    """
    if path.is_file():
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            return "desc"
        return "onnx" if path.suffix == ".onnx" else "weights"
    if not path.is_dir():
        raise FileFormatError(f"path must be an existing file or folder. Received: {str(path)!r}{files.meant(path)}")
    if (path / "report.json").exists() or (path / "run.json").exists():
        return "run"
    for name, kind in OTHERS.items():
        if (path / name).exists():
            return kind
    if (path / ascend.DESCRIPTION).exists():
        return ascend.kind_of(path).lower()
    if (path / "manifest.json").exists():
        return "bundle"
    if (path / "adapter_config.json").exists():
        return "peft"
    if (path / folders.PLAN).exists():
        return "pruned"
    if any((path / name).exists() for name in (*INDEXES, *WHOLE[:-1])):
        return "model"
    if (path / WHOLE[-1]).exists():
        return "weights"
    raise FileFormatError(
        f"{path} holds neither weights ({', '.join(WHOLE)} or an index) nor a delta, a W16A16S or W8A8S model, a run, "
        "a trainer's checkpoint or a teacher cache"
    )


def look(path: Path, torch: Callable[[], Any], *, values: bool = True) -> Look:
    """Look at a file or folder; nothing in it is executed, and no model is built.

    Args:
        path: the file or folder.
        torch: imports PyTorch, called for .pt .pth .pkl .bin files alone (they are read with weights_only=True).
        values: also read the values, to count zeros; False reads headers only.

    Returns:
        What was found.

    Raises:
        FileFormatError: damaged, or of a kind that is not known.
    """
    kind = kind_of(path)
    if kind in ("weights", "model", "pruned"):
        return _weights(path, kind, torch, values)
    readers = {
        "desc": _desc, "bundle": _bundle, "peft": _peft, "w16a16s": _w16a16s, "w8a8s": _w8a8s, "onnx": _onnx,
        "run": _run, "trainer checkpoint": _trainer, "teacher cache": _cache,
    }  # fmt: skip
    return readers[kind](path)


def _weights(path: Path, kind: str, torch: Callable[[], Any], values: bool) -> Look:
    with open_weights(path, lambda p: TorchFile(p, torch()), "path") as weights:
        rows: list[tuple[Any, ...]] = []
        zeros_of: dict[str, int | None] = {}
        names = list(weights.entries)
        for name in progress(names, "tensors"):
            entry = weights.entries[name]
            # A sparse bias or norm would say nothing: zeros are counted where they save work.
            zeros_of[name] = _zeros(weights, name, entry) if values and len(entry.shape) >= 2 else None
            rows.append(
                (name, list(entry.shape), entry.dtype, entry.size, zeros_of[name], _share(zeros_of[name], entry))
            )
        entries = weights.entries
    counted = {n: z for n, z in zeros_of.items() if z is not None}
    matrices = sum(entries[n].size for n in counted)
    config = source_config(path) or (source_config(path / folders.BASE) if kind == "pruned" else {})
    facts: dict[str, Any] = {
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "model_type": config.get("model_type"),
        "tensors": len(rows),
        "parameters": sum(e.size for e in entries.values()),
        "bytes": sum(e.nbytes for e in entries.values()),
        "dtypes": dict(Counter(e.dtype for e in entries.values())),
        "sparsity": sum(counted.values()) / matrices if matrices else None,
    }
    if kind == "pruned":
        facts["plan"] = _made(files.read_json(path / folders.PLAN))
    return Look(
        str(path), kind, {k: v for k, v in facts.items() if v is not None},
        ("tensor", "shape", "dtype", "parameters", "zeros", "sparsity"), rows,
    )  # fmt: skip


def _zeros(weights: Weights, name: str, entry: Entry) -> int:
    stored = weights.raw(name)
    if entry.dtype in _SIGNLESS:
        stored = stored & np.array(_SIGNLESS[entry.dtype], stored.dtype)
    return int(stored.size - np.count_nonzero(stored))


def _share(zeros: int | None, entry: Entry) -> float | None:
    return None if zeros is None or not entry.size else round(zeros / entry.size, 6)


def _made(desc: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in desc.get("made", {}).items() if not isinstance(v, (dict, list))}


def _desc(path: Path) -> Look:
    from slimkit.core.prune.plan import PrunePlan

    plan = PrunePlan(files.read_json(path, "path"))
    sizes = plan.sizes()
    layers: dict[str, list[str]] = {name: [] for name in plan.keep}
    for tensor, axes in plan.axes.items():
        for name in plan.keep:
            if f"'{name}'" in repr(axes):
                layers[name].append(tensor)
    rows = [
        (name, len(touched), touched[0] if touched else "", plan.full[name], len(plan.keep[name]))
        for name, touched in layers.items()
    ]
    removed = sum(int(np.prod(plan.shapes[p])) - int(np.prod(s)) for p, s in sizes.items())
    facts = {
        **_made(dict(plan.desc)),
        "tensors": len(plan.shapes),
        "tensors_cut": len(sizes),
        "entries_removed": removed,
    }
    return Look(str(path), "desc", facts, ("variable", "tensors", "first", "before", "after"), rows)


def _bundle(path: Path) -> Look:
    from slimkit.core.delta.bundle import read_bundle

    manifest, tensors = read_bundle(path)
    rows = []
    for one in manifest["deltas"]:
        for layer, record in one["layers"].items():
            size = _numbers(t for n, t in tensors.items() if n.startswith(f"{layer}." if layer else ""))
            record = record if isinstance(record, dict) else {}
            # What is off or empty says nothing about this layer.
            said = ", ".join(f"{k}={v}" for k, v in record.items() if k != "rank" and v not in (None, False, 0, "", []))
            shape = manifest["base"].get("layers", {}).get(layer)
            rows.append((layer, one["kind"], one["name"], record.get("rank"), said, shape, size))
    base = sum(int(np.prod(shape)) for shape in manifest["base"].get("layers", {}).values())
    own = _numbers(tensors.values())
    facts = {
        "deltas": {one["name"]: one["kind"] for one in manifest["deltas"]},
        "parameters": own,
        "bytes": sum(t.nbytes for t in tensors.values()),
        "share_of_base_layers": own / base if base else None,
        "base_tensors_trained": list(manifest["extra"]),
        "base_fingerprint": manifest["base"].get("fingerprint"),
    }
    return Look(
        str(path), "bundle", facts, ("layer", "kind", "name", "rank", "options", "base shape", "parameters"), rows
    )


def _numbers(tensors: Iterable[Any]) -> int:
    """How many parameters tensors hold: whole numbers are places, and none."""
    return sum(t.size for t in tensors if t.dtype.kind not in "iu")


def _peft(path: Path) -> Look:
    from slimkit.core.delta import peft

    config, tensors = peft.read_files(path)
    facts = {
        "peft_type": config["peft_type"],
        "task_type": config.get("task_type"),
        "base_model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "start": config.get("init_lora_weights", config.get("init_weights", config.get("mask_type"))),
        "parameters": _numbers(tensors.values()),
        "bytes": sum(t.nbytes for t in tensors.values()),
    }
    rows = [(name, list(t.shape), t.dtype.name, t.size) for name, t in tensors.items()]
    kept = {k: v for k, v in facts.items() if v is not None}
    return Look(str(path), "peft", kept, ("tensor", "shape", "dtype", "parameters"), rows)


def _w16a16s(path: Path) -> Look:
    from slimkit.core.ascend.w16a16s import load_w16a16s

    return _described(path, "w16a16s", load_w16a16s(path))


def _w8a8s(path: Path) -> Look:
    from slimkit.core.ascend.w8a8s import load_w8a8s

    return _described(path, "w8a8s", load_w8a8s(path))


def _described(path: Path, kind: str, model: Any) -> Look:
    rows = []
    for name, value in model.tensors.items():
        zeros = int(value.size - np.count_nonzero(value))
        rows.append(
            (
                name,
                list(value.shape),
                value.dtype.name,
                model.kinds[name],
                value.size,
                round(zeros / max(value.size, 1), 6),
            )
        )
    sparse = [
        (value.size, value.size - np.count_nonzero(value))
        for n, value in model.tensors.items()
        if model.kinds[n] != ascend.DENSE and value.ndim == 2
    ]
    facts = {
        "architecture": ", ".join(model.config.get("architectures") or []),
        "tensors": len(rows),
        "sparse_tensors": len(sparse),
        "parameters": sum(t.size for t in model.tensors.values()),
        "bytes": sum(t.nbytes for t in model.tensors.values()),
        "sparsity_of_sparse_tensors": float(sum(z for _, z in sparse) / sum(n for n, _ in sparse)) if sparse else 0.0,
    }
    return Look(str(path), kind, facts, ("tensor", "shape", "dtype", "kind", "parameters", "sparsity"), rows)


def _onnx(path: Path) -> Look:
    from slimkit.core.ascend.onnxgraph import read_onnx

    graph = read_onnx(path)
    rows = []
    for name, weight in graph.weights.items():
        size = int(np.prod(weight.shape))
        nonzero = weight.nonzero() if len(weight.shape) >= 2 else None
        share = None if nonzero is None or not size else round(1 - float(nonzero.sum()) / size, 6)
        rows.append((name, list(weight.shape), weight.dtype, size, share))
    facts = {
        "opsets": {domain or "ai.onnx": version for domain, version in graph.opsets.items()},
        "inputs": {value.name: list(value.shape or ()) for value in graph.inputs},
        "outputs": list(graph.outputs),
        "operators": dict(Counter(node.operator for node in graph.nodes).most_common()),
        "parameters": sum(row[3] for row in rows),
        "bytes": path.stat().st_size,
    }
    return Look(str(path), "onnx", facts, ("tensor", "shape", "dtype", "parameters", "sparsity"), rows)


def _trainer(path: Path) -> Look:
    kept = files.read_json(path / "trainer.json", "path")
    if not isinstance(kept, dict) or not isinstance(kept.get("history"), dict):
        raise FileFormatError(f"{path / 'trainer.json'} is no state of a trainer.")
    facts = {key: kept.get(key) for key in ("framework", "epoch", "step_in_epoch", "global_step", "seed")}
    rows = [(name, len(values), values[-1] if values else None) for name, values in kept["history"].items()]
    return Look(str(path), "trainer checkpoint", facts, ("metric", "values", "last"), rows)


def _cache(path: Path) -> Look:
    from slimkit.core.distill.cache_facts import read_facts

    facts = read_facts(path)
    samples = [len(keys) for shard in facts["shards"] for keys in shard["keys"]]
    told = {"samples": sum(samples), "shards": len(facts["shards"]), "targets": len(facts["targets"])}
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Look(str(path), "teacher cache", {**told, "bytes": size})


def _run(path: Path) -> Look:
    if not (path / "report.json").exists():
        recipe = files.read_json(path / "run.json", "run.json")
        name = recipe.get("recipe", {}).get("name") if isinstance(recipe, dict) else None
        return Look(str(path), "run", {"name": name, "complete": False, "stages": []})
    report = files.read_json(path / "report.json", "report.json")
    if not isinstance(report, dict) or report.get("format") != "slimkit-report":
        raise FileFormatError(f"{path / 'report.json'} is not the report of a slimkit run.")
    facts = {"name": report["name"], "complete": report["complete"], "stages": [s["name"] for s in report["stages"]]}
    return Look(str(path), "run", facts, ("", "dense", "final", "change"), list(summary_rows(report)))


def shown(value: Any, label: str) -> str:
    """A value of a fact or a cell as people read it.

    Example:
        >>> shown([3, 4], "shape"), shown(0.5, "sparsity"), shown(None, "zeros")
        ('3x4', '50.0%', '')
    """
    if value is None:
        return ""
    if label in ("shape", "base shape"):
        return "x".join(map(str, value)) or "scalar"
    if label in ("sparsity", "share_of_base_layers", "sparsity_of_sparse_tensors"):
        return f"{value:.1%}" if value >= 0.001 or not value else f"{value:.2g}"
    if label in ("parameters", "macs", "MACs"):
        return show(value, "count")
    if label == "bytes":
        return show(value, "bytes")
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v, '')}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value[:8])) + (" ..." if len(value) > 8 else "")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
