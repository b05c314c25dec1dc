"""`slimkit check`: ONNX files against an Ascend target, folders against a server, for people and for CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli import adapters
from slimkit.core.errors import ConfigError

if TYPE_CHECKING:
    from slimkit.core.ascend import OnnxCheck

# A table longer than this is read by nobody; --json holds everything.
_ROWS = 15


def check(
    files: Annotated[list[Path], typer.Argument(help="ONNX files; folders: LoRA, W16A16S, W8A8S.", show_default=False)],
    target: Annotated[
        str,
        typer.Option("--target", "-t", help="310P, A2 or A3; of a folder vllm-ascend, mindie-a2 or mindie-300i-duo."),
    ] = "310P",
    cann: Annotated[str, typer.Option("--cann", help="The CANN version that will convert it.")] = "8.0",
    soc_version: Annotated[
        str | None, typer.Option("--soc-version", help="The chip, as npu-smi info names it.", show_default=False)
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="fp16, as atc computes by default, or origin.")
    ] = "fp16",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="INPUT:1,3,224,224", help="Fix the open axes of an input.", show_default=False),
    ] = None,
    fail_on: Annotated[
        str, typer.Option("--fail-on", help="The mildest severity that makes the exit code 1: error, warning or info.")
    ] = "error",
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="RULE", help="Leave a rule out.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Of an adapter's base: config.json or its folder.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Devices that an adapter's base is cut over.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and warnings only.")] = False,
) -> None:
    """Check ONNX files for an Ascend target: operators, opset, types, shapes, padding, sparsity, and the atc line.

    Folders are checked for a server: LoRA adapters (ranks, matrices, types, scales, heads by devices), and W16A16S and
    W8A8S folders (every tensor's word, type and shape, the configuration, what is served as one layer).

    No device and no CANN is needed: everything is compared with public documents, which each finding names.

    Exit codes: 0 nothing found, 1 a finding as severe as --fail-on, 2 a file that cannot be read or a wrong option.

    Example: slimkit check model.onnx --target 310P --cann 8.0 --shape input:1,3,224,224

    Example: slimkit check lora --target vllm-ascend --config llama --tensor-parallel 4

    Example: slimkit check w8a8s --target mindie-300i-duo
    """
    import json

    from slimkit.core.ascend import OnnxCheck, check_onnx
    from slimkit.core.ascend.findings import SEVERITIES, without
    from slimkit.core.ascend.folder import DESCRIPTION
    from slimkit.core.check import choice

    counted = SEVERITIES[: SEVERITIES.index(choice(fail_on, SEVERITIES, "--fail-on")) + 1]
    shapes = _shapes(shape or [])
    folders = [file for file in files if file.is_dir()]
    if not folders and (config is not None or tensor_parallel > 1):
        raise ConfigError("--config and --tensor-parallel go with an adapter's folder")
    if len(folders) == len(files) and (soc_version is not None or shapes):
        raise ConfigError("--soc-version and --shape go with an ONNX file")
    found: list[Any] = []
    for file in files:
        if (file / DESCRIPTION).exists():
            one: Any = adapters.check_served(file, target)
        elif file in folders:
            one = adapters.check(file, target, config, tensor_parallel)
        else:
            one = check_onnx(file, target, cann, soc_version=soc_version, precision=precision, shapes=shapes)
        found.append(without(one, ignore or []))
    if as_json:
        plain = [one.to_dict() for one in found]
        typer.echo(json.dumps(plain[0] if len(plain) == 1 else plain, indent=1, ensure_ascii=False))
    else:
        for one in found:
            _show(one, quiet) if isinstance(one, OnnxCheck) else adapters.show(one, quiet=quiet)
    if any(one.of(severity) for one in found for severity in counted):
        raise typer.Exit(1)


def _shapes(texts: list[str]) -> dict[str, list[int]] | None:
    shapes = {}
    for text in texts:
        name, sign, sizes = text.rpartition(":")
        try:
            shapes[name] = [int(size) for size in sizes.split(",")]
        except ValueError:
            sign = ""
        if not name or not sign:
            raise ConfigError(f"--shape must be INPUT:SIZE,SIZE,... Received: {text!r}")
    return shapes or None


def _show(found: OnnxCheck, quiet: bool) -> None:
    """The findings by severity, the layers that waste most, and the command."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from slimkit.core.jobs.measurement import show

    console = Console(highlight=False, soft_wrap=True)
    head = f"{found.file}: opset {found.opset}, {found.target}, CANN {found.cann}"
    console.print(escape(f"{head}, {len(found.of('error'))} errors, {len(found.of('warning'))} warnings"))
    colours = {"error": "red", "warning": "yellow", "info": "cyan"}
    for one in found.findings:
        if quiet and one.severity == "info":
            continue
        where = f"{one.node}: " if one.node and one.node not in one.message else ""
        console.print(f"  [{colours[one.severity]}]{one.severity}[/] {escape(f'[{one.rule}] {where}{one.message}')}")
        if one.remedy:
            console.print(escape(f"      {one.remedy}"))
    if quiet:
        return
    worst = sorted((w for w in found.layers if w.wasted_bytes > 0), key=lambda w: w.weight_bytes - w.padded_bytes)
    if worst:
        table = Table("layer", "shape", "bytes", "in blocks", "padding", "padding of MACs", title_justify="left")
        for layer in worst[:_ROWS]:
            macs = "" if layer.wasted_macs is None else f"{layer.wasted_macs:.0%}"
            table.add_row(
                escape(layer.name), "x".join(map(str, layer.shape)), show(layer.weight_bytes, "bytes"),
                show(layer.padded_bytes, "bytes"), f"{layer.wasted_bytes:.0%}", macs,
            )  # fmt: skip
        console.print(table)
    waste = found.waste
    if waste["layers"]:
        macs = "" if waste["wasted_macs"] is None else f", {waste['wasted_macs']:.1%} of the multiply-accumulates"
        console.print(f"Padding on the cube unit: {waste['wasted_bytes']:.1%} of the weight bytes{macs}")
    console.print("Command" + ("" if found.command_ready else " (fix the open axes first)") + ":")
    console.print(escape(f"  {found.command}"))
