"""`slimkit export`: files for deployment, proven against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session
from slimkit.core.jobs.options import ExportOptions

FORMATS = ("onnx", "w16a16s", "w8a8s", "mindir")


@options.spread
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, or folder.", show_default=False)],
    network: options.Network,
    output: options.Writing,
    asked: ExportOptions,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=options.words(*FORMATS),
            help="onnx, w16a16s, w8a8s (with --calib), or mindir (MindSpore).",
        ),
    ] = "onnx",
    delta: Annotated[
        Path | None,
        typer.Option("--delta", help="A delta to merge first (slimkit's or PEFT's folder).", show_default=False),
    ] = None,
    length: options.Length = None,
    example: options.Example = None,
    calib: options.Calibration = None,
    text_key: options.TextKey = "text",
    samples: options.Samples = 128,
    max_length: options.MaxLength = 512,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
) -> None:
    """Export a model as ONNX, MINDIR, or a W16A16S or W8A8S folder.

    An ONNX or MINDIR file is run beside the model and written only when they agree. `slimkit check` says what Ascend's
    tools will make of it.

    Example: slimkit export --model bert-70 --length 128 --out bert.onnx

    Example: slimkit export --model bert --delta my-lora --out bert.onnx --opset 13

    Example: slimkit export --model llama-int8 --format w8a8s --calib text.jsonl --out llama-310p
    """
    with session("export", output) as talk:
        from slimkit.core import check
        from slimkit.core.errors import ConfigError
        from slimkit.core.jobs import claim, commands
        from slimkit.core.jobs.measurement import show

        check.choice(format, FORMATS, "--format")
        talk.go_on = "nothing was written; give the same command again"
        place = places.model(network)
        if delta is not None and not delta.is_dir():
            from slimkit.core import files

            raise ConfigError(f"--delta must be an existing folder. Received: {str(delta)!r}{files.meant(delta)}")
        how: dict[str, Any] = {"force": output.force, "dry_run": output.dry_run, "file": format not in commands.FOLDERS}
        with claim.claimed(out, reads=(network.model, delta), **how) as target:
            found = commands.export(
                places.framework(network),
                place,
                target,
                asked,
                format=format,
                example=example,
                length=length,
                delta_folder=delta,
                calib=places.calibration(calib, text_key, samples, max_length, batch_size, seed),
                seed=seed,
            )
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.get("shapes", {}).items())
        if output.dry_run:
            what = f" opset {asked.opset}" if format == "onnx" else ""
            talk.line(f"would write {format}{what} with inputs {shapes or 'of its configuration'} to {out}")
        elif format == "w16a16s":
            talk.line(f"Written: {out}: {len(found['sparse'])} sparse tensors, {len(found['dense'])} others")
            for advice in found.get("advice", ()):
                talk.line(f"  {advice}")
        elif format == "w8a8s":
            talk.line(f"Written: {out}: {len(found['layers'])} int8 layers, {found['zero_ratio']:.1%} zeros")
        else:
            talk.line(
                f"Written: {out} ({show(found['file_bytes'], 'bytes')}, inputs {shapes}); largest difference from the "
                f"model {found['max_difference']:.2g}"
            )
        talk.result({"model": places.say_where(place), "out": out, **found}, dry_run=output.dry_run)
