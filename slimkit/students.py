"""A student out of its teacher: a smaller instance of the same model, with weights cut from the large one."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.distill.students import cut_config, keep_layers, size_names
from slimkit.core.errors import UnsupportedError
from slimkit.weights import measure_activations, prune_model_weight, suggest_layer_map

import torch


def make_student(
    teacher: torch.nn.Module,
    *,
    layers: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    build: Callable[..., torch.nn.Module] | None = None,
    pattern: str | None = None,
    selection: str = "importance",
    layer_map: Mapping[int, int] | Sequence[int] | None = None,
    activations: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a smaller instance of a transformer and fill it with the teacher's best weights, ready to distil.

    Args:
        teacher: a Hugging Face model, or any model when `build` and `pattern` are given; left alone.
        layers, ffn, heads, hidden: the student's sizes; None keeps the teacher's. Where a head's width is
            hidden / heads, both change together.
        build: f(**sizes given) -> the smaller instance; None: the teacher's class with its configuration changed.
        pattern: regular expression of a block's name with its number in group 1; None: found in the model.
        selection: "importance" or "first": which rows and columns stay.
        layer_map: the teacher's layers that stay, in order, or student layer -> teacher layer.
        activations: what `measure_activations` found on the teacher, for "importance".
        calibration: batches as the teacher takes them: what `layer_map` and `activations` do not say is measured on
            them. Without any of it layers are spread evenly, first and last included, rows and columns chosen by the
            weights alone, and a warning says so: a language model may lose nearly everything that way.

    Returns:
        The student (in the teacher's dtype, device and mode) and the report of `prune_model_weight`, with "layers":
        student layer -> teacher layer, which is also who should learn from whom.

    Raises:
        ConfigError: no size, or sizes that do not go together.
        UnsupportedError: the model does not say its sizes or its blocks.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> teacher = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=4, n_head=2))
        >>> student, report = make_student(teacher, layers=2, calibration=[{"input_ids": torch.arange(8)[None]}])
        >>> len(student.transformer.h), sorted(report["layers"])
        (2, [0, 1])
    """
    bridge.check_whole(teacher, "teacher")
    kept, path = None, None
    if layers is not None or layer_map is not None:
        path, count = _blocks(teacher) if pattern is None else (None, _count(teacher, pattern))
        pattern = pattern or re.escape(str(path)) + r"\.(\d+)\."
        measure = None
        if calibration is not None:

            def measure(keep: int) -> dict[int, int]:
                return suggest_layer_map(teacher, calibration, keep, path).layer_id_map

        kept = keep_layers(count, layers, layer_map, measure)
        layers = None if kept is None else len(kept)
    wanted = {"layers": layers, "ffn": ffn, "heads": heads, "hidden": hidden}
    given = {k: v for k, v in wanted.items() if v is not None}
    if build is None:
        config = getattr(teacher, "config", None)
        if config is None:
            raise UnsupportedError("teacher has no config: give build, a function of the sizes that makes the student")
        names = size_names(config, wanted)
        smaller = copy.deepcopy(config)
        for what, name in names.items():
            setattr(smaller, name, given[what])
        if isinstance(getattr(smaller, "layer_types", None), list) and kept is not None:
            smaller.layer_types = [smaller.layer_types[i] for i in kept.values()]
        with torch.random.fork_rng(devices=[]):
            student = type(teacher)(smaller, **_extra(teacher))
    else:
        student = bridge.check_model(check.function(build, "build")(**given), "build")
    seen = None if calibration is None else lambda: measure_activations(teacher, calibration)
    settings = cut_config(kept, pattern, wanted, selection, activations, seen)
    like = next(teacher.parameters())
    student = student.to(device=like.device, dtype=like.dtype)
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import save_file

        file = Path(folder) / "model.safetensors"
        # Copies: tied tensors share memory, which the format refuses.
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in teacher.state_dict().items()}, file)
        # A Hugging Face folder says how wide a head is; a bare file could not.
        if hasattr(teacher, "config"):
            teacher.config.save_pretrained(folder)
        report = prune_model_weight(student, settings, folder if hasattr(teacher, "config") else str(file))
    student.train(teacher.training)
    return student, {**report, "layers": kept or {}}


def _extra(teacher: torch.nn.Module) -> dict[str, Any]:
    # The one thing about a Hugging Face model's shape that its configuration does not say.
    if "add_pooling_layer" in inspect.signature(type(teacher).__init__).parameters:
        return {"add_pooling_layer": getattr(teacher, "pooler", None) is not None}
    return {}


def _blocks(model: torch.nn.Module) -> tuple[str, int]:
    lists = [(path, len(m)) for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    if not lists:
        raise UnsupportedError("teacher has no list of blocks: give pattern")
    outermost = min(path.count(".") for path, _ in lists)
    return max((entry for entry in lists if entry[0].count(".") == outermost), key=lambda entry: entry[1])


def _count(model: torch.nn.Module, pattern: str) -> int:
    from slimkit.core.match import bounded_regex

    found = [m.group(1) for name, _ in model.named_parameters() if (m := bounded_regex(pattern).search(name))]
    if not found:
        check.wrong_value("pattern", "a pattern that finds the teacher's blocks", pattern)
    return max(map(int, found)) + 1
