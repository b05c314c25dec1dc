"""A student out of its teacher: a smaller instance of the same cell, with weights cut from the large one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.distill.students import cut_config, keep_layers
from slimkit.core.errors import ConfigError
from slimkit.core.match import bounded_regex
from slimkit_ms import bridge
from slimkit_ms.weights import measure_activations, prune_model_weight, suggest_layer_map

from mindspore import nn


def make_student(
    teacher: nn.Cell,
    *,
    layers: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    build: Callable[..., nn.Cell] | None = None,
    pattern: str | None = None,
    selection: str = "importance",
    layer_map: Mapping[int, int] | Sequence[int] | None = None,
    activations: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
) -> tuple[nn.Cell, dict[str, Any]]:
    """Build a smaller instance of a transformer and fill it with the teacher's best weights, ready to distil.

    Args:
        teacher: the large cell; left alone.
        layers, ffn, heads, hidden: the student's sizes, handed to `build`; None keeps the teacher's.
        build: f(**sizes given) -> the smaller instance; needed, as cells have no common configuration.
        pattern: regular expression of a block's name with its number in group 1; needed for layers.
        selection: "importance" or "first": which rows and columns stay.
        layer_map: the teacher's layers that stay, in order, or student layer -> teacher layer.
        activations: what `measure_activations` found on the teacher, for "importance".
        calibration: batches as the teacher takes them: what `layer_map` and `activations` do not say is measured on
            them. Without any of it layers are spread evenly, first and last included, rows and columns chosen by the
            weights alone, and a warning says so: a language model may lose nearly everything that way.

    Returns:
        The student and the report of `prune_model_weight`, with "layers": student layer -> teacher layer.

    Raises:
        ConfigError: no size, no build, or layers without a pattern.
    """
    bridge.check_model(teacher, "teacher")
    wanted = {"layers": layers, "ffn": ffn, "heads": heads, "hidden": hidden}
    if layer_map is None and not any(wanted.values()):
        raise ConfigError("make_student needs a size to make smaller: layers, ffn, heads or hidden")
    if build is None:
        raise ConfigError("build must be a function of the sizes that makes the smaller cell. Received: None")
    kept = None
    if layers is not None or layer_map is not None:
        if pattern is None:
            raise ConfigError("pattern must be given with layers: the regular expression of a block's parameter name")
        names = [p.name for p in teacher.get_parameters()]
        found = [m.group(1) for name in names if (m := bounded_regex(pattern).search(name))]
        if not found:
            check.wrong_value("pattern", "a pattern that finds the teacher's blocks", pattern)
        measure = None
        if calibration is not None:

            def measure(keep: int) -> dict[int, int]:
                return suggest_layer_map(teacher, calibration, keep).layer_id_map

        kept = keep_layers(max(map(int, found)) + 1, layers, layer_map, measure)
        wanted["layers"] = None if kept is None else len(kept)
    given = {k: v for k, v in wanted.items() if v is not None}
    student = bridge.check_model(check.function(build, "build")(**given), "build")
    seen = None if calibration is None else lambda: measure_activations(teacher, calibration)
    settings = cut_config(kept, pattern, wanted, selection, activations, seen)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.safetensors"
        files.write_tensors(file, {p.name: bridge.as_numpy(p) for p in teacher.get_parameters()})
        report = prune_model_weight(student, settings, str(file))
    student.set_train(teacher.training)
    return student, {**report, "layers": kept or {}}
