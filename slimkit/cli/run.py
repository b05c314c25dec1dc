"""`slimkit run`: a whole recipe."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.cli.session import Session, session


@options.spread
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file, or run.json of an earlier run.")],
    asked: options.Writing,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/NAME by default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. stages.1.prune.reserved_ratio=0.6."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier run in the folder away.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Build every configuration, import every function, read one batch, and stop."),
    ] = False,
) -> None:
    """Run a recipe: load, prune, distil, sparsify, adapt, export, report.

    A run that was stopped goes on from the last finished stage when the same command is given again. Under torchrun
    stages that train or calibrate are done by all processes, the others by the first.

    Example: slimkit run tools/recipes/digits.yaml --set seed=3 --output runs/digits-3

    Example: torchrun --nproc-per-node 2 -m slimkit run tools/recipes/digits.yaml
    """
    from slimkit.core.jobs.sources import settings
    from slimkit.core.run.recipe import load_recipe, paths_begin

    with session("run", asked) as talk:
        from slimkit.core.jobs import crew

        checked = load_recipe(recipe, settings(set_ or [], "--set"))
        folder = output or Path(checked.output or f"runs/{checked.name}")
        if (check or asked.dry_run) and crew.rank() > 0:
            return  # the first process looks for all
        if check or asked.dry_run:
            steps = [kind for kind, _ in checked.steps()]
            if check:
                from slimkit.core.run.checking import check_recipe

                check_recipe(
                    checked, paths_begin(recipe), places.framework(options.Network(framework=checked.framework)).formats
                )
            found = "nothing wrong" if check else "well formed; --check looks at functions and data as well"
            talk.line(f"{recipe}: {len(steps)} stages, {found}")
            if asked.dry_run:
                talk.line(f"would run {', '.join(steps)} into {folder}")
            talk.result({"stages": steps, "folder": folder, "framework": checked.framework}, dry_run=True)
            return
        talk.go_on = "the same command goes on from the last finished stage"

        from slimkit.core.jobs import claim
        from slimkit.core.run.pipeline import run_recipe
        from slimkit.core.run.stages import Stages

        how: dict[str, Any] = {"force": asked.force, "states": claim.RUN, "reads": (recipe,), "option": "--output"}
        # Of several processes the first one holds the place for all.
        with claim.claimed(folder, **how) if crew.rank() == 0 else contextlib.nullcontext():
            wing = Stages(places.framework(options.Network(framework=checked.framework)))
            report = run_recipe(
                checked,
                paths_begin(recipe),
                wing,
                folder,
                restart=restart,
                command=_command(recipe, output, set_ or []),
            )
        missed = crew.rank() == 0 and _show(report, folder, talk)
    if missed:
        raise typer.Exit(1)


def _command(recipe: Path, output: Path | None, set_: list[str]) -> str:
    """What makes the same run again."""
    more = [word for one in set_ for word in ("--set", one)] + ([] if output is None else ["--output", str(output)])
    return shlex.join(["slimkit", "run", str(recipe), *more])


def _show(report: dict[str, Any], folder: Path, talk: Session) -> bool:
    """The summary: dense against final, what the stages say, and where the report is; whether a stage fell short."""
    from slimkit.core.jobs.measurement import goals, summary_rows
    from slimkit.core.run.report import headline

    rows = summary_rows(report)
    talk.table(report["title"], ("", "dense", "final", "change"), rows)
    for name, text in headline(report):
        talk.line(f"  {name}: {text}")
    missed = [(name, goal) for name, goal in goals(report) if goal["missed"]]
    for name, goal in missed:
        talk.line(f"Not reached: {name}: {goal['what']} {goal['reached']:.3f}, asked for {goal['asked']}")
    talk.line(f"Report: {folder / 'report.html'}")
    summary = [dict(zip(("what", "dense", "final", "change"), row)) for row in rows]
    asked = [{"stage": name, **goal} for name, goal in goals(report)]
    talk.result({"goals": asked, "summary": summary, "report": folder / "report.html"})
    return bool(missed)
