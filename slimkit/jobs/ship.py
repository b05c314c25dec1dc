"""Export and measurement as commands: a model named on the command line in, an ONNX file or figures out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimkit import ascend, bridge, delta, export
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.jobs.data import ModelPlace
from slimkit.core.run.measurement import Measurement
from slimkit.jobs import models
from slimkit.measurement import measure_model

FORMATS = ("onnx", "w16a16s")


def write(
    place: ModelPlace,
    out: Path | None,
    *,
    format: str,
    opset: int,
    example: str | None,
    length: int,
    dynamic_batch: bool,
    tolerance: float,
    delta_folder: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Write a model as ONNX (proven in onnxruntime) or as a W16A16S folder; with `out` None only prepare.

    Args:
        place: the model.
        out: the file, or the folder for "w16a16s".
        format: "onnx" or "w16a16s".
        opset, dynamic_batch, tolerance: as in `export_onnx`.
        example: one input, see `models.example_of`.
        length: tokens of a made-up text.
        delta_folder: a delta to put on and merge first; the model's files stay as they are.
        seed: of made-up inputs.

    Returns:
        What was written and how well it agrees, as plain values.

    Raises:
        UnsupportedError: the format is MindSpore's.
    """
    if format == "mindir":
        raise UnsupportedError("--format mindir is MindSpore's own: add --framework mindspore and a --factory")
    opened = models.open_model(place)
    if delta_folder is not None:
        delta.load_delta(opened.model, delta_folder)
        delta.merge_delta(opened.model, unload=True)
    if format == "w16a16s":
        if out is None:
            return {"format": format, "parameters": opened.parameters}
        config = opened.directory if opened.is_hf else None
        if config is None:
            raise ConfigError("--format w16a16s needs a Hugging Face directory, whose config.json goes along")
        return {"format": format, **ascend.save_w16a16s(out, opened.model, config).to_dict()}
    inputs = models.example_of(opened, example, length=length, seed=seed)
    shapes = {name: list(array.shape) for name, array in export.example_arrays(inputs).items()}
    facts: dict[str, Any] = {"format": format, "parameters": opened.parameters, "shapes": shapes}
    if out is None:
        return facts
    report = export.export_onnx(
        opened.model, inputs, out, opset=opset, dynamic_batch=dynamic_batch, tolerance=tolerance
    )
    return {**facts, **report.to_dict()}


def measure(
    place: ModelPlace, *, example: str | None, length: int, delta_folder: Path | None, seed: int
) -> Measurement:
    """Parameters, zeros, MACs, trainable share and latency of a model on one input."""
    opened = models.open_model(place)
    if delta_folder is not None:
        delta.load_delta(opened.model, delta_folder)
    inputs = models.example_of(opened, example, length=length, seed=seed)
    return measure_model(opened.model, bridge.to_device(inputs, bridge.device_of(opened.model)))
