"""`slimkit compare`: what smaller models lost on held-out data."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session
from slimkit.core.jobs.options import CompareOptions


@options.spread
def compare(
    dense: Annotated[str, typer.Argument(help="The model that the others are compared with.", show_default=False)],
    small: Annotated[
        list[str],
        typer.Argument(
            help="Smaller models: FOLDER, FOLDER+DELTA, FILE.onnx, MODULE:FUNCTION or MODULE:FUNCTION=WEIGHTS.",
            show_default=False,
        ),
    ],
    asked: CompareOptions,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="Held-out texts: .jsonl, .txt or .parquet.", show_default=False, rich_help_panel="Data"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="MODULE:FUNCTION",
            help="Returns documents of token numbers, batches, or (batch, labels) pairs.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    text_key: options.TextKey = "text",
    documents: Annotated[
        int, typer.Option("--documents", min=1, help="Read at most so many texts.", rich_help_panel="Data")
    ] = 10_000,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="CONDITION",
            help="Exit code 1 where a smaller model meets it: 'perplexity > 1.05x', 'kl > 0.1', 'accuracy < 98%'.",
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the comparison as JSON.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write it as a page with charts.", show_default=False)
    ] = None,
    framework: options.Framework = "torch",
    device: options.Device = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Compare smaller models with a dense one on held-out data.

    Language models by perplexity, bits per byte, KL divergence and agreement over fixed windows of text; encoders by
    cosine and rank correlation; classifiers by accuracy, agreement and calibration. Parameters, bytes, MACs, speed and
    memory stand beside them, and each difference with its 95 % interval over documents.

    Exit codes: 0 done, 1 a condition of --fail-if is met, 2 something given is wrong.

    Example: slimkit compare llama llama-80 llama-24 --text held_out.jsonl --fail-if "perplexity > 1.2x"

    Example: slimkit compare llama llama.onnx --text held_out.jsonl --html lost.html
    """
    with session("compare", options.Output(as_json=as_json, quiet=quiet)) as talk:
        from slimkit.core.compare.conditions import Condition
        from slimkit.core.jobs import claim, comparing
        from slimkit.core.jobs.sources import DataPlace

        for condition in fail_if or ():
            Condition.parse(condition)
        face = places.framework(options.Network(framework=framework, device=device))
        place = None
        if text is not None:
            place = DataPlace(str(text), text_key, documents, asked.length)
            _ = place.kind
        with contextlib.ExitStack() as claims:
            for file, option in ((save, "--save"), (html, "--html")):
                if file is not None:
                    claims.enter_context(claim.claimed(file, file=True, force=force, option=option))
            found = comparing.compare(face, dense, small, asked, text=place, data=data, seed=seed)
            broken = found.broken(fail_if or ())
            if save is not None:
                found.save(save)
            if html is not None:
                found.save_html(html)
        head, *rows = found.rows()
        talk.table("Comparison", head, rows)
        talk.line(found.sentence())
        for sentence in broken:
            talk.line(f"Failed: {sentence}")
        talk.result({**found.to_dict(), "failed": broken})
    if broken:
        raise typer.Exit(1)
