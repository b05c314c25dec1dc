"""What runs through a large transformer, measured for both wings: influence of blocks, squares of inputs."""

from __future__ import annotations

from typing import Any

from slimkit.core.batch import dataset
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.weights.activations import Energies
from slimkit.core.weights.framework import WeightsFramework
from slimkit.core.weights.influence import Influence, LayerSuggestion, find_stack


def layer_map(face: WeightsFramework, calibration: Any, keep: int, blocks: str | None) -> LayerSuggestion:
    """The blocks that change most what runs through them; see `suggest_layer_map` of the wings."""
    batches = dataset(calibration, "calibration")
    found = Influence(find_stack(face.classes(), face.sizes(), blocks), keep)
    face.watch(found.paths, batches, lambda path, x, out, mask: found.add(path, x, face.array(out), mask))
    return found.suggestion()


def activations(face: WeightsFramework, calibration: Any) -> dict[str, Array]:
    """The mean square of every input of every matrix; see `measure_activations` of the wings."""
    batches = dataset(calibration, "calibration")
    matrices = face.matrices()
    found = Energies(matrices)
    face.watch(list(matrices), batches, lambda path, x, _out, mask: found.add(path, x, mask))
    return found.mean()
