"""`slimkit prune`: drop whole channels, heads and features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session
from slimkit.core.jobs.options import PruneOptions


@options.spread
def prune(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pruned model.", show_default=False)],
    network: options.Network,
    output: options.Writing,
    asked: PruneOptions,
    example: options.Example = None,
    calib: options.Calibration = None,
    text_key: options.TextKey = "text",
    samples: options.Samples = 128,
    max_length: options.MaxLength = 128,
    batch_size: options.BatchSize = 8,
    seed: options.Seed = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--whole",
            help="Tensor by tensor and block by block, or the whole model in memory; unset: the first where a model "
            "does not fit twice.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Prune a model: drop whole channels, heads and features, coupled layers together.

    Writes the pruned model, its plan (plan.json), a model card and prune_report.json. A Hugging Face model loses only
    what its configuration can say, and the folder loads with from_pretrained; with --form any the commands here and
    load_pruned read it. --stream never holds the model: it goes through the folder tensor by tensor, to the same bytes,
    and the same command goes on after a kill. Exit code 1: it keeps more than 1.05 times the ratio.

    Example: slimkit prune --model bert --keep-ratio 0.7 --out bert-70

    Example: slimkit prune --model llama-70b --keep-ratio 0.8 --calib text.jsonl --stream --out llama-56b

    Example: slimkit prune --factory nets.py:resnet --model resnet.pt --example 1,3,224,224 --keep-ratio 0.5 --out small
    """
    with session("prune", output) as talk:
        from slimkit.core.errors import ConfigError
        from slimkit.core.jobs import claim, commands, streamed
        from slimkit.core.jobs.measurement import MISSED, show

        talk.go_on = "nothing was written; give the same command again"
        place = places.model(network)
        data = places.calibration(calib, text_key, samples, max_length, batch_size, seed)
        pieces = streamed.prefers_stream(place, stream, network.framework == "torch")
        if pieces:
            talk.go_on = "the same command goes on from the last finished file"
        how: dict[str, Any] = {"force": output.force, "dry_run": output.dry_run, "reads": (network.model,)}
        with claim.claimed(out, states=claim.SHARDS if pieces else (), **how) as folder:
            face = places.framework(network)
            if pieces:
                if example is not None:
                    raise ConfigError("--example: a folder says what its model takes; leave it out, or give --whole")
                found = streamed.prune(face, place, folder, asked, calib=data, seed=seed)
            else:
                found = commands.prune(face, place, folder, asked, example=example, calib=data, seed=seed)
        before, after = found["parameters_before"], found["parameters"]
        widths = _widths(found["report"])
        talk.table("Widths", ("layers", "before", "after"), widths, limit=20)
        reached = "" if asked.budget == "params" else f"; of the {asked.budget} {found['report']['reached']:.3f}"
        talk.line(
            f"{'Would keep' if output.dry_run else 'Kept'} {show(after, 'count')} of {show(before, 'count')} "
            f"parameters: {after / before:.3f}{reached}, {asked.reserved_ratio} asked for"
        )
        if seconds := found["report"].get("seconds"):
            talk.line("Seconds: " + ", ".join(f"{stage} {took:.1f}" for stage, took in seconds.items()))
        if asked.budget == "latency":
            from slimkit.core.jobs.timing import told

            talk.line(f"Latency: {told(found['report']['latency'])}")
        for reason, where in found["report"]["whole"].items() if output.verbose else ():
            talk.line(f"  whole, {reason}: {', '.join(where[:5])}")
        missed = found["report"]["reached"] > MISSED * asked.reserved_ratio
        if missed:
            talk.line(f"Not reached: {_limits(found['report'], asked)}")
        if not output.dry_run:
            talk.line(f"Written: {folder} ({_readable(found['written'])})")
        talk.result(
            {"model": places.say_where(place), "out": folder, "asked": asked.reserved_ratio, **found},
            dry_run=output.dry_run,
        )
    if missed:
        raise typer.Exit(1)


def _limits(report: dict[str, Any], asked: PruneOptions) -> str:
    """What keeps the ratio from being reached, and the option that changes it."""
    held = [f"{', '.join(x['layers'][:3]) or x['variable']} at {x['keeps']}" for x in report.get("held_back", ())]
    named = "; ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
    if held and asked.node_reserved_ratio is not None:
        return f"--node-ratio {asked.node_reserved_ratio} holds {named}; a lower one lets them go on"
    if held:
        return f"already at the least that --alignment {asked.alignment} and --parallel {asked.parallel} allow: {named}"
    return "every other width stays whole; --verbose says why, and --form any allows more"


def _widths(report: dict[str, object]) -> list[tuple[str, str, str]]:
    """Rows of the table: what shrinks, from and to."""
    rows = []
    variables = report.get("variables", {})
    assert isinstance(variables, dict)
    for name, about in variables.items():
        size, kept = about["size"], about.get("keep", about["size"])
        if size != kept:
            layers = about.get("layers") or [name]
            rows.append((", ".join(layers[:3]) + (" ..." if len(layers) > 3 else ""), str(size), str(kept)))
    return rows


def _readable(written: str) -> str:
    return {
        "transformers": "loads with from_pretrained",
        "slimkit": "loads with load_pruned and the commands here",
        "weights": "weights of the factory's network",
    }[written]
