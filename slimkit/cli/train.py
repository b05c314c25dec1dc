"""`slimkit train`: all parameters, after a model was made smaller."""

from __future__ import annotations

from slimkit.cli import options, places, training
from slimkit.cli.session import session
from slimkit.core.jobs.options import TrainOptions


@options.spread
def train(
    data: training.Data,
    out: training.Out,
    network: options.Network,
    texts: training.Texts,
    kept: training.Keeping,
    output: options.Writing,
    asked: TrainOptions,
    task: training.Task = "auto",
    evaluation: training.Evaluation = None,
    label_key: training.LabelKey = "labels",
) -> None:
    """Train all parameters of a model, such as one that was pruned or made sparse.

    The zeros that sparsify made stay zero. Text and arrays are read as by adapt, and the folder that is written is of
    the kind that was read. Ctrl-C and SIGTERM save the state; the same command goes on.

    Example: slimkit train --model llama-sparse --data text.jsonl --learning-rate 1e-5 --out llama-tuned

    Example: torchrun --nproc-per-node 8 -m slimkit train --model llama-sparse --data text.jsonl --out llama-tuned

    Example: slimkit train --factory nets.py:net --model small --data labelled.npz --epochs 3 --out tuned
    """
    with session("train", output) as talk:
        from slimkit.core.jobs import crew
        from slimkit.core.jobs import training as jobs

        place = places.model(network)
        talk.go_on = training.GO_ON
        with training.claimed(out, output, network.model) as target:
            if training.is_silent(target):
                return
            face = places.framework(network)
            read = texts.place(data, asked.batch_size)
            held = None if evaluation is None else texts.place(evaluation, asked.batch_size)
            found = jobs.train(
                face, place, read, target, asked, kept.run(), task=task, evaluation=held, label_key=label_key
            )
        if crew.rank() > 0:
            return
        talk.line(
            f"{'Would train' if output.dry_run else 'Trained'} {found['parameters']:,} parameters on "
            f"{found['samples']} samples, {found['task']}"
            + (f"; the zeros of {found['zero_layers']} layers stay" if found["zero_layers"] else "")
        )
        if not output.dry_run:
            training.tell(talk, found, out)
        talk.result({"model": places.say_where(place), "out": out, **found}, dry_run=output.dry_run)
