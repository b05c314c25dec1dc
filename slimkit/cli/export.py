"""`slimkit export`: files for deployment, proven against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session
from slimkit.core.jobs.options import ExportOptions

FORMATS = ("onnx", "w16a16s", "w8a8s", "hf", "mindir")


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
            help="onnx, w16a16s, w8a8s (with --calib), hf (a Hugging Face folder with --delta merged), or mindir "
            "(MindSpore).",
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
    """Export a model as ONNX, MINDIR, a W16A16S or W8A8S folder, or a folder with a delta merged.

    An ONNX or MINDIR file is run beside the model and written only when they agree. `slimkit check` says what Ascend's
    tools will make of it. --format hf merges --delta into a folder of any size, one tensor in memory at a time; stop it
    at any moment: the same command goes on.

    Example: slimkit export --model bert-70 --length 128 --out bert.onnx

    Example: slimkit export --model bert --delta my-lora --out bert.onnx --opset 13

    Example: slimkit export --model llama --delta my-lora --format hf --out llama-merged

    Example: slimkit export --model llama-int8 --format w8a8s --calib text.jsonl --out llama-310p
    """
    with session("export", output) as talk:
        from slimkit.core import check
        from slimkit.core.errors import ConfigError
        from slimkit.core.jobs import claim, commands, streamed
        from slimkit.core.jobs.measurement import show

        check.choice(format, FORMATS, "--format")
        talk.go_on = "nothing was written; give the same command again"
        place = places.model(network)
        if delta is not None and not delta.is_dir():
            from slimkit.core import files

            raise ConfigError(f"--delta must be an existing folder. Received: {str(delta)!r}{files.meant(delta)}")
        how: dict[str, Any] = {"force": output.force, "dry_run": output.dry_run, "file": format not in commands.FOLDERS}
        if format == "hf":
            how["states"] = claim.SHARDS
            talk.go_on = "the same command goes on from the last finished file"
        with claim.claimed(out, reads=(network.model, delta), **how) as target:
            face = places.framework(network)
            found = (
                streamed.merge(face, place, delta, target)
                if format == "hf"
                else commands.export(
                    face,
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
            )
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found.get("shapes", {}).items())
        if output.dry_run:
            what = f" opset {asked.opset}" if format == "onnx" else ""
            inputs = "the delta merged" if format == "hf" else f"inputs {shapes or 'of its configuration'}"
            talk.line(f"would write {format}{what} with {inputs} to {out}")
        elif format == "hf":
            changed = f"{found['merged']} tensors changed, {found['copied']} copied"
            talk.line(f"Written: {out}: {changed} (loads with from_pretrained)")
            for note in found["notes"]:
                talk.line(f"  {note}")
        elif format == "w16a16s":
            talk.line(f"Written: {out}: {len(found['sparse'])} sparse tensors, {len(found['dense'])} others")
            for advice in found.get("advice", ()):
                talk.line(f"  {advice}")
        elif format == "w8a8s":
            talk.line(f"Written: {out}: {len(found['layers'])} int8 layers, {found['zero_ratio']:.1%} zeros")
            if found["kept_float"]:
                talk.line(
                    f"  {len(found['kept_float'])} more stay float16: rounding their inputs changes too much (up to "
                    f"{max(found['kept_float'].values()):.2g} of the answers)"
                )
        else:
            talk.line(
                f"Written: {out} ({show(found['file_bytes'], 'bytes')}, inputs {shapes}); largest difference from the "
                f"model {found['max_difference']:.2g}"
            )
        talk.result({"model": places.say_where(place), "out": out, **found}, dry_run=output.dry_run)
