"""`slimkit inspect`: what a model, a weight file, a plan or a delta holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.cli.session import Session, session

_ROWS = 30


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(help="A model, weight file, plan, delta, W16A16S folder, ONNX file or run.", show_default=False),
    ] = None,
    macs: Annotated[
        bool, typer.Option("--macs", help="Build the model and run it: MACs, trainable share, latency, by layer.")
    ] = False,
    no_values: Annotated[bool, typer.Option("--no-values", help="Read headers only: fast, and no sparsity.")] = False,
    delta: Annotated[
        Path | None, typer.Option("--delta", help="With --macs: a delta to put on first.", show_default=False)
    ] = None,
    factory: options.Factory = None,
    arguments: options.FactoryArguments = None,
    framework: options.Framework = "torch",
    device: options.Device = None,
    example: options.Example = None,
    length: options.Length = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every row of the table.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a model or file holds: tensors, parameters, types, sparsity; with --macs also MACs and what trains.

    Reads Hugging Face directories, .safetensors, MindSpore's .ckpt, .pt/.bin (weights_only), pruning plans, delta
    bundles and PEFT adapters, W16A16S folders, ONNX files and runs. Nothing in them is executed.

    Example: slimkit inspect bert-70

    Example: slimkit inspect --factory nets.py:resnet --example 1,3,224,224 --macs
    """
    with session("inspect", options.Output(as_json=as_json, quiet=quiet)) as talk:
        from slimkit.core.errors import ConfigError
        from slimkit.core.jobs import commands
        from slimkit.core.jobs.inspecting import look
        from slimkit.core.lazy import imported

        if path is None and factory is None:
            raise ConfigError("give a PATH, or --factory MODULE:FUNCTION")
        if macs or factory is not None:
            place = places.model(options.Network(path, factory, arguments))
            face = places.framework(options.Network(framework=framework, device=device))
            measured = commands.measure(
                face, place, example=example, length=length, delta_folder=delta, seed=0
            ).to_dict()
            _measured(talk, measured, places.say_where(place), None if show_all else _ROWS)
            talk.result({"path": path, "kind": "measured", "facts": measured})
            return
        assert path is not None
        found = look(path, lambda: imported("torch"), values=not no_values)
        from slimkit.core.jobs.inspecting import shown

        talk.line(f"{path}: {found.kind}")
        for label, value in found.facts.items():
            talk.line(f"  {label}: {shown(value, label)}")
        rows = [tuple(shown(cell, column) for cell, column in zip(row, found.columns)) for row in found.rows]
        talk.table("", found.columns, rows, limit=None if show_all else _ROWS)
        talk.result(found.to_dict())


def _measured(talk: Session, measured: dict[str, Any], name: str, limit: int | None) -> None:
    from slimkit.core.jobs.measurement import show

    talk.line(
        f"{name}: {show(measured['parameters'], 'count')} parameters ({show(measured['parameter_bytes'], 'bytes')}), "
        f"{measured['trainable'] / max(measured['parameters'], 1):.2%} of them train, "
        f"{measured['zeros']:,} zeros, {show(measured['macs'], 'count')} MACs, {measured['latency_ms']:.2f} ms eager"
    )
    rows = [
        (
            layer["name"], layer["kind"], "x".join(map(str, layer["shape"])), show(layer["parameters"], "count"),
            "" if layer["macs"] is None else show(layer["macs"], "count"), f"{layer['sparsity']:.1%}",
        )
        for layer in measured["layers"]
    ]  # fmt: skip
    talk.table("", ("layer", "kind", "shape", "parameters", "MACs", "sparsity"), rows, limit=limit)
