"""`slimkit adapt`: a small delta on a frozen model."""

from __future__ import annotations

from typing import Annotated

import typer

from slimkit.cli import options, places, training
from slimkit.cli.session import session


@options.spread
def adapt(
    data: training.Data,
    out: training.Out,
    network: options.Network,
    texts: training.Texts,
    trained: training.Training,
    output: options.Output,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            autocompletion=options.words("auto", "classification", "causal-lm"),
            help="Of text: classification (lines have a label), causal-lm, or auto: what the data says.",
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
    also_train: Annotated[
        list[str] | None,
        typer.Option(
            "--also-train", metavar="GLOB", help="Parameters of the model that train whole.", show_default=False
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
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Held-out data of the same form.",
            show_default=False,
            rich_help_panel="Data",
        ),
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
    loss: training.Loss = "auto",
    label_key: training.LabelKey = "labels",
    lr: training.Rate = 5e-4,
) -> None:
    """Adapt a model: train a small delta (LoRA and kin) on text or on labelled arrays.

    The base stays as it is; the result is a bundle that `load_delta` puts on it, or PEFT's files. Ctrl-C and SIGTERM
    save the state; the same command goes on.

    Example: slimkit adapt --model bert --data train.jsonl --eval test.jsonl --rank 8 --out my-lora

    Example: slimkit adapt --factory nets.py:net --model net.pt --data labelled.npz --target "fc*" --out my-lora

    Example: slimkit adapt --model llama --data text.txt --format peft --merge --out my-lora
    """
    with session("adapt", output) as talk:
        from slimkit.core.jobs.data import settings
        from slimkit.core.jobs.training import AdaptAims

        given = settings(setting or [], "--set")
        if kind == "lora":
            given = {"rank": rank, "alpha": alpha, "dropout": dropout, **given}
        aims = AdaptAims(
            task=task,
            kind=kind,
            targets=tuple(targets) if targets else None,
            also_train=tuple(also_train) if also_train else None,
            settings=given,
            evaluation=None if evaluation is None else texts.place(evaluation),
            format=format,
            merge=merge,
            loss=loss,
            label_key=label_key,
        )
        place = places.model(network)
        talk.go_on = training.GO_ON
        jobs = places.wing(network.framework, network.device)
        with places.alone(out, output.dry_run) as target:
            found = jobs.adapt(place, texts.place(data), target, trained.plan(lr, texts.batch_size), aims)
        talk.line(
            f"{'Would train' if output.dry_run else 'Trained'} {found['trained_parameters']:,} of "
            f"{found['parameters']:,} parameters ({found['trained_share']:.2%}) on {found['samples']} samples, "
            f"{found['task']}"
        )
        if found["fresh"]:
            talk.line(f"  fresh, trained whole: {', '.join(found['fresh'])}")
        if not output.dry_run:
            talk.line(f"Loss by epoch: {training.losses(found)}")
            for name, value in found.get("evaluation", {}).items():
                talk.line(f"  held-out {name}: {value:.4g}")
            talk.line(f"Written: {out}")
        talk.result({"model": places.say_where(place), "out": out, "format": format, **found}, dry_run=output.dry_run)
