"""`slimkit adapt`: a small delta on a frozen model."""

from __future__ import annotations

from typing import Annotated

import typer

from slimkit.cli import options, places, training
from slimkit.cli.session import session
from slimkit.core.jobs.options import AdaptOptions


@options.spread
def adapt(
    data: training.Data,
    out: training.Out,
    network: options.Network,
    texts: training.Texts,
    kept: training.Keeping,
    output: options.Writing,
    asked: AdaptOptions,
    task: training.Task = "auto",
    evaluation: training.Evaluation = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=options.words("slimkit", "peft"),
            help="slimkit or peft (Hugging Face PEFT's files).",
        ),
    ] = "slimkit",
    merge: Annotated[bool, typer.Option("--merge", help="Also write the merged model into OUT/merged.")] = False,
    label_key: training.LabelKey = "labels",
) -> None:
    """Adapt a model: train a small delta (LoRA and kin) on text or on labelled arrays.

    The base stays as it is; the result is a bundle that `load_delta` puts on it, or PEFT's files. Ctrl-C and SIGTERM
    save the state; the same command goes on.

    Example: slimkit adapt --model bert --data train.jsonl --eval test.jsonl --rank 8 --out my-lora

    Example: slimkit adapt --factory nets.py:net --model net.pt --data labelled.npz --target "fc*" --out my-lora

    Example: slimkit adapt --model llama --data text.txt --format peft --merge --out my-lora
    """
    with session("adapt", output) as talk:
        from slimkit.core.check import choice
        from slimkit.core.jobs import crew
        from slimkit.core.jobs import training as jobs

        choice(format, ("slimkit", "peft"), "--format")
        place = places.model(network)
        talk.go_on = training.GO_ON
        with training.claimed(out, output, network.model) as target:
            if training.is_silent(target):
                return
            face = places.framework(network)
            found = jobs.adapt(
                face,
                place,
                texts.place(data, asked.batch_size),
                target,
                asked,
                kept.run(),
                task=task,
                evaluation=None if evaluation is None else texts.place(evaluation, asked.batch_size),
                label_key=label_key,
                format=format,
                merge=merge,
            )
        if crew.rank() > 0:
            return
        talk.line(
            f"{'Would train' if output.dry_run else 'Trained'} {found['trained_parameters']:,} of "
            f"{found['parameters']:,} parameters ({found['trained_share']:.2%}) on {found['samples']} samples, "
            f"{found['task']}"
        )
        if found["fresh"]:
            talk.line(f"  fresh, trained whole: {', '.join(found['fresh'])}")
        if not output.dry_run:
            training.tell(talk, found, out)
        talk.result({"model": places.say_where(place), "out": out, "format": format, **found}, dry_run=output.dry_run)
