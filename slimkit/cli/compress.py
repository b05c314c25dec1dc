"""`slimkit compress`: a fully fine-tuned model as a small delta on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session
from slimkit.core.jobs.command_options import CompressOptions


@options.spread
def compress(
    tuned: Annotated[
        Path,
        typer.Option(
            "--tuned",
            help="The fine-tuned model: a folder, or with --factory its weight file.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the delta.", show_default=False)],
    network: options.Network,
    output: options.Writing,
    asked: CompressOptions,
    calib: options.Calibration = None,
    text_key: options.TextKey = "text",
    samples: options.Samples = 32,
    max_length: options.MaxLength = 128,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
) -> None:
    """Compress a fully fine-tuned model: what it has learned since --model, as a small delta.

    The result is a bundle that `load_delta` puts on the base, in either framework; several lie on one base and take
    turns. With --calib, a few thousand tokens or rows without labels, the same bytes lose several times less.

    Example: slimkit compress --model llama --tuned llama-chat --calib text.jsonl --out chat-delta

    Example: slimkit compress --factory nets.py:net --model base.pt --tuned tuned.pt --calib x.npz --out small-delta

    Example: slimkit compress --model llama --tuned llama-chat --kind low_rank --exclude lm_head --out chat-delta
    """
    with session("compress", output) as talk:
        from slimkit.core.jobs import claim, compressing
        from slimkit.core.jobs.measurement import show
        from slimkit.core.jobs.sources import ModelPlace

        place = places.model(network)
        learned = ModelPlace(tuned, place.factory, place.arguments, option="--tuned")
        data = places.calibration(calib, text_key, samples, max_length, batch_size, seed)
        reads = (network.model, tuned)
        with claim.claimed(out, force=output.force, dry_run=output.dry_run, reads=reads) as target:
            face = places.framework(network)
            found = compressing.compress(face, place, learned, target, asked, calib=data, seed=seed)
        rows = [
            (path, str(row["rank"]), show(row["bytes"], "bytes"), f"{row['error']:.4f}")
            for path, row in found["layers"].items()
        ]
        if output.verbose:
            talk.table("Layers", ("layer", "rank", "bytes", "error"), rows)
        worst = sorted(found["layers"].items(), key=lambda pair: -pair[1]["error"])[:3]
        what = "of what it learned" if calib is None else "of what that answers"
        talk.line(f"Not said of each layer, as a share {what}: " + ", ".join(f"{p} {r['error']:.4f}" for p, r in worst))
        for note in found["notes"]:
            talk.line(f"  {note}")
        talk.line(f"would write {out}" if output.dry_run else f"Written: {out} ({show(found['delta_bytes'], 'bytes')})")
        talk.result({"model": places.say_where(place), "tuned": tuned, "out": out, **found}, dry_run=output.dry_run)
