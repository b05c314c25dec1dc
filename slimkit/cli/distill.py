"""`slimkit distill`: a smaller student that answers like its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options, places, training
from slimkit.cli.session import session


@options.spread
def distill(
    data: training.Data,
    out: training.Out,
    network: options.Network,
    texts: training.Texts,
    trained: training.Training,
    output: options.Output,
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
    student_factory: Annotated[
        str | None,
        typer.Option(
            "--student-factory",
            metavar="MODULE:FUNCTION",
            help="Makes the student of a factory's teacher; by default the teacher's own factory.",
            show_default=False,
        ),
    ] = None,
    student_arguments: Annotated[
        list[str] | None,
        typer.Option(
            "--student-arg", metavar="KEY=VALUE", help="An argument of the student's factory.", show_default=False
        ),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option("--student", help="Weights or a pruned folder to begin the student with.", show_default=False),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(
            "--match",
            metavar="TEACHER=STUDENT",
            help="Two layers whose outputs are compared, by their paths; for factories.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Softening of logits.")] = 2.0,
    hidden_weight: Annotated[
        float, typer.Option("--hidden-weight", min=0, help="Weight of each pair of layers.")
    ] = 1.0,
    output_weight: Annotated[float, typer.Option("--output-weight", min=0, help="Weight of the outputs' term.")] = 1.0,
    output_loss: Annotated[
        str,
        typer.Option(
            "--output-loss",
            autocompletion=options.words("auto", "KDKLDiv", "KDCrossEntropy", "KDMse", "HiddenMse", "HiddenCosine"),
            help="The outputs' term, for factories: KDKLDiv for logits, HiddenMse for other outputs, or another name.",
        ),
    ] = "auto",
    hard_weight: Annotated[
        float, typer.Option("--hard-weight", min=0, help="Weight of the loss on labels, for factories.")
    ] = 0.0,
    loss: training.Loss = "auto",
    label_key: training.LabelKey = "labels",
    lr: training.Rate = 2e-4,
) -> None:
    """Distil a teacher into a smaller student.

    The student of a Hugging Face directory is cut out of the teacher's own weights and trained on plain text to give
    the teacher's outputs and hidden states. A factory's network learns from the teacher's answers to arrays, in PyTorch
    and MindSpore. Ctrl-C and SIGTERM save the state; the same command goes on.

    Example: slimkit distill --model minilm --layers 3 --data text.jsonl --epochs 3 --out minilm-3

    Example: slimkit distill --factory nets.py:net --model net.pt --student-arg width=16 --data x.npz --out small
    """
    with session("distill", output) as talk:
        from slimkit.core.jobs.training import DistillAims
        from slimkit.core.run.measurement import show

        sizes = {"layers": layers, "ffn": ffn, "heads": heads, "hidden": hidden}
        aims = DistillAims(
            sizes={k: v for k, v in sizes.items() if v is not None},
            selection=selection,
            student=places.student(network, student, student_factory, student_arguments),
            matches=places.matches(match or []),
            temperature=temperature,
            hidden_weight=hidden_weight,
            output_weight=output_weight,
            output_loss=output_loss,
            hard_weight=hard_weight,
            loss=loss,
            label_key=label_key,
        )
        place = places.model(network)
        talk.go_on = training.GO_ON
        jobs = places.wing(network.framework, network.device)
        with places.alone(out, output.dry_run) as target:
            found = jobs.distill(place, texts.place(data), target, trained.plan(lr, texts.batch_size), aims)
        talk.line(
            f"{'Would train' if output.dry_run else 'Trained'} a student of {show(found['parameters'], 'count')} "
            f"parameters ({found['parameters'] / found['teacher_parameters']:.3f} of the teacher) on "
            f"{found['samples']} samples"
        )
        if not output.dry_run:
            talk.line(f"Loss by epoch: {training.losses(found)}")
            talk.line(f"Written: {out}")
        talk.result(
            {"model": places.say_where(place), "out": out, "sizes": aims.sizes, **found}, dry_run=output.dry_run
        )
