"""`slimkit migrate`: scripts of msModelSlim and MindPet with their imports rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options
from slimkit.cli.session import session


def migrate(
    scripts: Annotated[list[Path], typer.Argument(help="Python files.", show_default=False)],
    write: Annotated[bool, typer.Option("--write", help="Change the files; otherwise the diff is shown.")] = False,
    framework: Annotated[
        str | None,
        typer.Option(
            "--framework", "-f", help="torch or mindspore, where a script leaves it open.", show_default=False
        ),
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Rewrite the imports of msModelSlim and MindPet in scripts to slimkit's.

    Shows the diff; --write changes the files. What slimkit has no counterpart for is listed and left as it was.

    Exit codes: 0 everything rewritten, 1 something was left for a person, 2 a file that is no Python script.

    Example: slimkit migrate train.py --write
    """
    with session("migrate", options.Output(as_json=as_json, quiet=quiet)) as talk:
        from slimkit.core import files
        from slimkit.core.jobs import migrate as jobs

        talk.go_on = "files named above are changed, the others are not"
        done = []
        for script in scripts:
            with open(files.readable_file(script, "the script"), encoding="utf-8", newline="") as handle:
                old = handle.read()
            made = jobs.migrate(old, framework, str(script))
            done.append((script, old, made))
        for script, old, made in done:
            if write and not dry_run and made.text != old:
                mode = script.stat().st_mode
                with files.atomic_file(script) as handle:
                    handle.write(made.text.encode())
                script.chmod(mode)
                talk.line(f"Written: {script}: {len(made.rewritten)} imports")
            else:
                talk.line(jobs.diff(old, made.text, str(script)) or f"{script}: nothing to rewrite")
            for line, name in made.unknown:
                talk.line(f"{script}:{line}: {name} has no counterpart here; it was left as it is")
            for line, note in made.notes:
                talk.line(f"{script}:{line}: {note}")
        rows = [
            {"script": s, "rewritten": m.rewritten, "unknown": m.unknown, "notes": m.notes, "changed": m.text != old}
            for s, old, m in done
        ]
        talk.result({"scripts": rows, "written": write and not dry_run}, dry_run=dry_run or not write)
        left = any(made.unknown for _, _, made in done)
    if left:
        raise typer.Exit(1)
