"""`slimkit sparsify`: set the weights that matter least to zero."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.cli.session import Session, session
from slimkit.core.jobs.options import SparsifyOptions

if TYPE_CHECKING:
    from slimkit.core.jobs.sources import ModelPlace


@options.spread
def sparsify(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the sparse model.", show_default=False)],
    network: options.Network,
    output: options.Writing,
    asked: SparsifyOptions,
    calib: options.Calibration = None,
    text_key: options.TextKey = "text",
    samples: options.Samples = 128,
    max_length: options.MaxLength = 512,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an unfinished run in --out away.")] = False,
) -> None:
    """Make a model sparse: set the weights that matter least to zero and refit the others.

    A Hugging Face directory is walked block by block, one in memory at a time. Stop it at any moment: the same command
    goes on from the last finished block, to the same bytes. torchrun spreads it over several processes, to the same
    bytes again.

    Example: slimkit sparsify --model llama --method par --sparsity 0.5 --calib text.jsonl --out llama-sparse

    Example: torchrun --nproc-per-node 8 -m slimkit sparsify --model llama --calib text.jsonl --out sparse --device cuda

    Example: slimkit sparsify --model llama --pattern 4:2 --calib text.jsonl --out llama-42 --dry-run
    """
    with session("sparsify", output) as talk:
        from slimkit.core.jobs import cards, claim, commands, crew
        from slimkit.core.jobs.work import sparse_goal, sparse_headline

        place = places.model(network)
        data = places.calibration(calib, text_key, samples, max_length, batch_size, seed)
        how: dict[str, Any] = {
            "force": output.force,
            "dry_run": output.dry_run,
            "states": claim.BLOCKS,
            "reads": (network.model,),
        }
        # Of several processes the first one holds the place for all.
        held = contextlib.nullcontext(None if output.dry_run else out.absolute())
        with claim.claimed(out, **how) if crew.rank() == 0 else held as folder:
            if folder is None and crew.rank() > 0:
                return
            face = places.framework(network)
            if folder is None:
                _plan(talk, commands.sparsify(face, place, out.absolute(), asked, calib=data, plan=True), asked, out)
                return
            talk.go_on = "the same command goes on from the last finished block, or begins again where there was none"
            report = commands.sparsify(face, place, folder, asked, calib=data, restart=restart)
        if crew.rank() > 0:
            return
        rows = [
            (n, row["method"], f"{row['ratio']:.3f}", f"{row['output_error']:.4f}" if "output_error" in row else "")
            for n, row in report["layers"].items()
        ]
        if output.verbose:
            talk.table("Layers", ("layer", "method", "zeros", "output error"), rows)
        talk.line(sparse_headline(report))
        for name in report["fallbacks"]:
            talk.line(f"  {name}: {report['fallbacks'][name]}; by magnitude")
        worst = cards.worst_layers(report, 3)
        blocks = [(name, f"{mean:.4f}", f"{most:.4f}") for name, mean, most in cards.errors_by_block(report)]
        if blocks:
            talk.table("Output error by block", ("block", "mean", "largest"), blocks, limit=40)
        if worst:
            talk.line("Worst layers: " + ", ".join(f"{name} {error:.4f}" for name, error in worst))
        goal = sparse_goal(report)
        if goal["missed"]:
            talk.line(f"Not reached: {goal['what']} {goal['reached']:.3f}, asked for {goal['asked']}")
        talk.line(f"Written: {out}")
        talk.line(_measure(place, out, report, network.framework))
        talk.result({"model": places.say_where(place), "out": out, **report})
    if goal["missed"]:
        raise typer.Exit(1)


def _measure(place: ModelPlace, out: Path, report: dict[str, Any], framework: str) -> str:
    """The line that measures what the model lost."""
    if report["written"] == "transformers" and place.model is not None:
        return f"Measure what it lost: slimkit compare {place.model} {out} --text HELD_OUT.jsonl"
    weights = "model.ckpt" if (out / "model.ckpt").exists() else "model.safetensors"
    made = place.factory or place.model
    dense = made if place.factory is None or place.model is None else f"{made}={place.model}"
    kind = "" if framework == "torch" else f" -f {framework}"
    return f"Measure what it lost: slimkit compare {dense} {made}={out / weights}{kind} --data MODULE:FUNCTION"


def _plan(talk: Session, plan: dict[str, Any], asked: SparsifyOptions, out: Path) -> None:
    talk.line(
        f"would set {plan['zeros']:,} of {plan['weights']:,} weights to zero in {len(plan['layers'])} layers by "
        f"{asked.method}, calibrated on {plan['batches']} batches, into {out}"
    )
    if plan["blocks_done"]:
        talk.line(f"would go on after block {plan['blocks_done']} of an earlier run")
    for name, reason in plan["skipped"].items():
        talk.line(f"  left alone: {name}: {reason}")
    talk.result({"out": out, "config": asked.build().to_dict(), **plan}, dry_run=True)
