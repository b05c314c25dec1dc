"""Folders in `slimkit check`, LoRA adapters in `slimkit convert`: the part of the two commands that talks of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slimkit.core.errors import ConfigError

if TYPE_CHECKING:
    from slimkit.cli import options
    from slimkit.cli.session import Session
    from slimkit.core.ascend import AdapterCheck, ServedCheck

# Words of --to that name the layout of an adapter, and not a framework.
LAYOUTS = ("peft", "mindformers", "megatron")
# Who may serve an adapter, words of --target.
SERVERS = ("vllm-ascend", "mindie-a2", "mindie-300i-duo")


def is_adapter(src: Path, to: str | None) -> bool:
    """Whether a command is about an adapter; ConfigError where the layout to convert it to is missing.

    Args:
        src: what is converted.
        to: the word of --to.
    """
    from slimkit.core.convert import adapters

    if to in LAYOUTS:
        return True
    if to is None and adapters.is_adapter(src):
        raise ConfigError(f"{src} holds an adapter: --to must be {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")
    return False


def convert(
    talk: Session, src: Path, dst: Path, asked: dict[str, Any], others: dict[str, Any], output: options.Writing
) -> None:
    """The command for an adapter, which becomes a folder."""
    from slimkit.core.convert.adapters import convert_adapter
    from slimkit.core.jobs import claim

    if given := [option for option, value in others.items() if value]:
        raise ConfigError(f"{given[0]} does not go with an adapter")
    with claim.claimed(dst, force=output.force, dry_run=output.dry_run, reads=(src,), option="DST") as folder:
        if folder is None:
            import tempfile

            # What would be written is small: it is made beside, looked at and thrown away.
            with tempfile.TemporaryDirectory() as place:
                report = convert_adapter(src, Path(place) / "adapter", **asked)
        else:
            report = convert_adapter(src, folder, **asked)
    what = f"{report.matrices} matrices of rank {report.rank} from {report.layout} to {report.to}"
    cut = f", in {report.tensor_parallel} shards" if report.tensor_parallel > 1 else ""
    talk.line(f"{'would write' if output.dry_run else 'Written:'} {dst}: {what}{cut}")
    for note in report.notes:
        talk.line(f"  {note}")
    if report.left:
        talk.line(f"  not taken along: {', '.join(report.left[:5])}{' ...' if len(report.left) > 5 else ''}")
    talk.result({"src": src, "dst": dst, **report.as_dict(), "path": str(dst)}, dry_run=output.dry_run)


def check(folder: Path, target: str, config: Path | None, tensor_parallel: int) -> AdapterCheck:
    """Check one adapter's folder."""
    from slimkit.core.ascend import check_adapter
    from slimkit.core.check import choice

    choice(target, SERVERS, "--target of an adapter")
    return check_adapter(folder, target, config=config, tensor_parallel=tensor_parallel)


def check_served(folder: Path, target: str) -> ServedCheck:
    """Check one folder of sparse weights."""
    from slimkit.core.ascend import check_served
    from slimkit.core.check import choice

    choice(target, SERVERS, "--target of a folder")
    return check_served(folder, target)


def show(found: AdapterCheck | ServedCheck, *, quiet: bool) -> None:
    """The findings by severity."""
    what = getattr(found, "kind", None) or f"rank {getattr(found, 'rank', 0)}"
    counts = f"{len(found.of('error'))} errors, {len(found.of('warning'))} warnings"
    typer.echo(f"{found.folder}: {what}, {found.target}, {counts}")
    for one in found.findings:
        if quiet and one.severity == "info":
            continue
        typer.echo(f"  {one.severity} [{one.rule}] {one.message}")
        for more in (one.remedy, one.source):
            if more:
                typer.echo(f"      {more}")
