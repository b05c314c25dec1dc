"""A student out of its teacher: a smaller instance of the same cell, with weights cut from the large one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.distill.students import cut_config, spread_layers
from slimkit.core.errors import ConfigError
from slimkit.core.match import bounded_regex
from slimkit_ms import bridge
from slimkit_ms.weights import prune_model_weight

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
) -> tuple[nn.Cell, dict[str, Any]]:
    """Build a smaller instance of a transformer and fill it with the teacher's best weights, ready to distil.

    Args:
        teacher: the large cell; left alone.
        layers, ffn, heads, hidden: the student's sizes, handed to `build`; None keeps the teacher's. Layers are spread
            evenly over the teacher's, first and last included.
        build: f(**sizes given) -> the smaller instance; needed, as cells have no common configuration.
        pattern: regular expression of a block's name with its number in group 1; needed for layers.
        selection: "importance" or "first": which rows and columns stay.

    Returns:
        The student and the report of `prune_model_weight`, with "layers": student layer -> teacher layer.

    Raises:
        ConfigError: no size, no build, or layers without a pattern.
    """
    bridge.check_model(teacher, "teacher")
    wanted = {"layers": layers, "ffn": ffn, "heads": heads, "hidden": hidden}
    given = {k: v for k, v in wanted.items() if v is not None}
    if not given:
        raise ConfigError("make_student needs a size to make smaller: layers, ffn, heads or hidden")
    if build is None:
        raise ConfigError("build must be a function of the sizes that makes the smaller cell. Received: None")
    student = bridge.check_model(check.function(build, "build")(**given), "build")
    kept = None
    if layers is not None:
        if pattern is None:
            raise ConfigError("pattern must be given with layers: the regular expression of a block's parameter name")
        names = [p.name for p in teacher.get_parameters()]
        found = [m.group(1) for name in names if (m := bounded_regex(pattern).search(name))]
        if not found:
            check.wrong_value("pattern", "a pattern that finds the teacher's blocks", pattern)
        kept = spread_layers(max(map(int, found)) + 1, layers)
    settings = cut_config(kept, pattern, any(wanted[k] is not None for k in ("ffn", "heads", "hidden")), selection)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.safetensors"
        files.write_tensors(file, {p.name: bridge.as_numpy(p) for p in teacher.get_parameters()})
        report = prune_model_weight(student, settings, str(file))
    student.set_train(teacher.training)
    return student, {**report, "layers": kept or {}}
