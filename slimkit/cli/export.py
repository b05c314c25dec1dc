"""`slimkit export`: files for deployment, proven against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session


@options.spread
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file; a folder for w16a16s.", show_default=False)],
    network: options.Network,
    output: options.Output,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=options.words("onnx", "w16a16s", "mindir"),
            help="onnx, w16a16s, or mindir (MindSpore).",
        ),
    ] = "onnx",
    opset: Annotated[int, typer.Option("--opset", help="ONNX opset; 13 suits Ascend's ATC.")] = 13,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")] = False,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            "--dynamic",
            metavar="[INPUT=]AXIS:NAME,...",
            help="Leave axes open, proven at a second size: 0:batch,1:sequence, or input_ids=1:sequence.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference accepted between file and model.")
    ] = 1e-4,
    delta: Annotated[
        Path | None,
        typer.Option("--delta", help="A delta to merge first (slimkit's or PEFT's folder).", show_default=False),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of the example text.")] = 128,
    example: options.Example = None,
    seed: options.Seed = 0,
) -> None:
    """Export a model as ONNX, MINDIR or a W16A16S folder.

    An ONNX or MINDIR file is run beside the model and written only when they agree. `slimkit check` says what Ascend's
    tools will make of it.

    Example: slimkit export --model bert-70 --length 128 --out bert.onnx

    Example: slimkit export --model bert --delta my-lora --out bert.onnx --opset 13
    """
    with session("export", output) as talk:
        from slimkit.core import check
        from slimkit.core.errors import ConfigError
        from slimkit.core.onnxaxes import parse_axes
        from slimkit.core.run.measurement import show

        check.choice(format, ("onnx", "w16a16s", "mindir"), "--format")
        talk.go_on = "nothing was written; give the same command again"
        place = places.model(network)
        if delta is not None and not delta.is_dir():
            raise ConfigError(f"--delta must be an existing folder. Received: {str(delta)!r}")
        if format != "w16a16s" and out.is_dir():
            raise ConfigError(f"--out must be a file, and {str(out)!r} is a folder")
        found = places.wing(network.framework, network.device).write(
            place,
            None if output.dry_run else out.absolute(),
            format=format,
            opset=opset,
            example=example,
            length=length,
            dynamic_batch=dynamic_batch,
            dynamic=parse_axes(dynamic or []),
            tolerance=tolerance,
            delta_folder=delta,
            seed=seed,
        )
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.get("shapes", {}).items())
        if output.dry_run:
            what = f" opset {opset}" if format == "onnx" else ""
            talk.line(f"would write {format}{what} with inputs {shapes or 'of its configuration'} to {out}")
        elif format == "w16a16s":
            talk.line(f"Written: {out}: {len(found['sparse'])} sparse tensors, {len(found['dense'])} others")
            for advice in found.get("advice", ()):
                talk.line(f"  {advice}")
        else:
            talk.line(
                f"Written: {out} ({show(found['file_bytes'], 'bytes')}, inputs {shapes}); largest difference from the "
                f"model {found['max_difference']:.2g}"
            )
        talk.result({"model": places.say_where(place), "out": out, **found}, dry_run=output.dry_run)
