"""`slimkit distill` and `slimkit adapt`: training on a text file, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options, places
from slimkit.cli.session import session

Text = Annotated[
    str,
    typer.Option(
        "--data", "-d", metavar="FILE", help="Text: .jsonl (a JSON object a line) or .txt.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.", show_default=False)]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate of AdamW.")]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule", autocompletion=options.words("cosine", "linear", "constant"), help="cosine, linear or constant."
    ),
]
Warmup = Annotated[int, typer.Option("--warmup", min=0, help="Updates until the full rate.")]
Steps = Annotated[int | None, typer.Option("--max-steps", min=1, help="Bound on the updates.", show_default=False)]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Updates between two checkpoints.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an unfinished run in --out away.")]
TrainSamples = Annotated[int, typer.Option("--samples", min=1, help="Take at most so many samples of the data.")]
_EVERY = 1_000_000_000
_GO_ON = "the state is saved; the same command goes on from there"


def distill(
    model: Annotated[
        Path, typer.Option("--model", "-m", help="The teacher, a Hugging Face directory.", show_default=False)
    ],
    data: Text,
    out: Out,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Blocks of the student.", show_default=False)
    ] = None,
    ffn: Annotated[
        int | None, typer.Option("--ffn", min=1, help="Width of its feed-forward.", show_default=False)
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Its attention heads.", show_default=False)
    ] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", min=1, help="Its hidden width.", show_default=False)] = None,
    selection: Annotated[
        str,
        typer.Option(
            "--selection",
            autocompletion=options.words("importance", "first"),
            help="Which of the teacher's rows and columns stay: importance or first.",
        ),
    ] = "importance",
    temperature: Annotated[float, typer.Option("--temperature", help="Softening of logits.")] = 2.0,
    hidden_weight: Annotated[float, typer.Option("--hidden-weight", min=0, help="Weight of each block's term.")] = 1.0,
    output_weight: Annotated[float, typer.Option("--output-weight", min=0, help="Weight of the outputs' term.")] = 1.0,
    epochs: Epochs = 1,
    lr: Rate = 2e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0,
    max_steps: Steps = None,
    text_key: options.TextKey = "text",
    samples: TrainSamples = _EVERY,
    max_length: options.MaxLength = 128,
    batch_size: options.BatchSize = 16,
    seed: options.Seed = 0,
    save_every: SaveEvery = 100,
    restart: Restart = False,
    framework: options.Framework = "torch",
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Distil a teacher into a smaller student, on plain text.

    The student is cut out of the teacher's own weights and trained to give the teacher's outputs and hidden states.
    Ctrl-C saves the state; the same command goes on.

    Example: slimkit distill --model minilm --layers 3 --data text.jsonl --epochs 3 --out minilm-3
    """
    with session("distill", as_json=as_json, quiet=quiet, verbose=verbose) as talk:
        from slimkit.core.errors import ConfigError
        from slimkit.core.jobs.training import TrainingPlan
        from slimkit.core.run.measurement import show

        asked = {"layers": layers, "ffn": ffn, "heads": heads, "hidden": hidden}
        sizes = {k: v for k, v in asked.items() if v is not None}
        if not sizes:
            raise ConfigError(
                "give at least one of --layers, --ffn, --heads and --hidden: what makes the student smaller"
            )
        plan = TrainingPlan(epochs, lr, batch_size, 0.0, schedule, warmup, 1.0, max_steps, seed, save_every, restart)
        talk.go_on = _GO_ON
        text = places.data(data, text_key, samples, max_length, batch_size)
        found = places.wing(framework, "distill")(
            places.model(model, None, None),
            text,
            None if dry_run else out.absolute(),
            plan,
            sizes=sizes,
            selection=selection,
            temperature=temperature,
            hidden_weight=hidden_weight,
            output_weight=output_weight,
        )
        talk.line(
            f"{'Would train' if dry_run else 'Trained'} a student of {show(found['parameters'], 'count')} parameters "
            f"({found['parameters'] / found['teacher_parameters']:.3f} of the teacher) on {found['samples']} texts"
        )
        if not dry_run:
            talk.line(f"Loss by epoch: {_losses(found)}")
            talk.line(f"Written: {out}")
        talk.result({"model": model, "out": out, "sizes": sizes, **found}, dry_run=dry_run)


def adapt(
    model: Annotated[
        Path, typer.Option("--model", "-m", help="The base, a Hugging Face directory.", show_default=False)
    ],
    data: Text,
    out: Out,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            autocompletion=options.words("auto", "classification", "causal-lm"),
            help="classification (lines have a label), causal-lm, or auto: what the data says.",
        ),
    ] = "auto",
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            autocompletion=options.words("lora", "adapter", "low_rank_adapter", "prefix", "prompt"),
            help="lora, adapter, low_rank_adapter, prefix or prompt.",
        ),
    ] = "lora",
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target", metavar="GLOB", help="Layers that get a delta; default: all linear ones.", show_default=False
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of a LoRA.")] = 8,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="A LoRA is scaled by alpha / rank; default 2.", show_default=False)
    ] = None,
    dropout: Annotated[float, typer.Option("--dropout", min=0, help="Dropout before a LoRA.")] = 0.0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another option of the kind: dora=true.", show_default=False),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="FILE", help="Held-out data of the same form.", show_default=False)
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=options.words("slimkit", "peft"),
            help="slimkit or peft (Hugging Face PEFT's files).",
        ),
    ] = "slimkit",
    merge: Annotated[bool, typer.Option("--merge", help="Also write the merged model into OUT/merged.")] = False,
    epochs: Epochs = 1,
    lr: Rate = 5e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0,
    max_steps: Steps = None,
    text_key: options.TextKey = "text",
    samples: TrainSamples = _EVERY,
    max_length: options.MaxLength = 128,
    batch_size: options.BatchSize = 16,
    seed: options.Seed = 0,
    save_every: SaveEvery = 100,
    restart: Restart = False,
    framework: options.Framework = "torch",
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Adapt a model: train a small delta (LoRA and kin) on a text file.

    The base stays as it is; the result is a bundle that `load_delta` puts on it, or PEFT's files. Ctrl-C saves the
    state; the same command goes on.

    Example: slimkit adapt --model bert --data train.jsonl --eval test.jsonl --rank 8 --out my-lora

    Example: slimkit adapt --model llama --data text.txt --format peft --merge --out my-lora
    """
    with session("adapt", as_json=as_json, quiet=quiet, verbose=verbose) as talk:
        from slimkit.core import check
        from slimkit.core.jobs.data import settings
        from slimkit.core.jobs.training import TrainingPlan

        check.choice(format, ("slimkit", "peft"), "--format")
        plan = TrainingPlan(epochs, lr, batch_size, 0.0, schedule, warmup, 1.0, max_steps, seed, save_every, restart)
        given = settings(setting or [], "--set")
        if kind == "lora":
            given = {"rank": rank, "alpha": alpha, "dropout": dropout, **given}
        talk.go_on = _GO_ON
        found = places.wing(framework, "adapt")(
            places.model(model, None, None),
            places.data(data, text_key, samples, max_length, batch_size),
            None if dry_run else out.absolute(),
            plan,
            task=task,
            kind=kind,
            targets=targets or None,
            settings=given,
            evaluation=places.data(evaluation, text_key, samples, max_length, batch_size),
            format=format,
            merge=merge,
        )
        talk.line(
            f"{'Would train' if dry_run else 'Trained'} {found['trained_parameters']:,} of {found['parameters']:,} "
            f"parameters ({found['trained_share']:.2%}) on {found['samples']} samples, {found['task']}"
        )
        if found["fresh"]:
            talk.line(f"  fresh, trained whole: {', '.join(found['fresh'])}")
        if not dry_run:
            talk.line(f"Loss by epoch: {_losses(found)}")
            for name, value in found.get("evaluation", {}).items():
                talk.line(f"  held-out {name}: {value:.4g}")
            talk.line(f"Written: {out}")
        talk.result({"model": model, "out": out, "format": format, **found}, dry_run=dry_run)


def _losses(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{value:.4g}" for value in found["loss_by_epoch"])
