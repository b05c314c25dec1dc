"""`slimkit distill`: a smaller student that answers like its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options, places, training
from slimkit.cli.session import session
from slimkit.core.jobs.command_options import StudentOptions
from slimkit.core.jobs.options import DistillOptions


@options.spread
def distill(
    data: training.Data,
    out: training.Out,
    network: options.Network,
    texts: training.Texts,
    kept: training.Keeping,
    output: options.Writing,
    asked: DistillOptions,
    cut: StudentOptions,
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
        typer.Option(
            "--student",
            help="The student to begin with: a folder, such as the pruned teacher; of a factory also weights.",
            show_default=False,
        ),
    ] = None,
    label_key: training.LabelKey = "labels",
) -> None:
    """Distil a teacher into a smaller student.

    The student of a Hugging Face directory is cut out of the teacher's own weights, by what the text shows to matter
    least, or comes from a folder (--student), and is trained on that text to give the teacher's answers. Zeros that
    sparsify made stay. A factory's network learns from the teacher's answers
    to arrays, in PyTorch and MindSpore. Ctrl-C and SIGTERM save the state; the same command goes on. Under torchrun
    each process holds a part of the models.

    Example: slimkit distill --model minilm --layers 3 --data text.jsonl --epochs 3 --out minilm-3

    Example: slimkit distill --model llama --student llama-70 --data text.jsonl --out llama-70-taught

    Example: torchrun --nproc-per-node 8 -m slimkit distill --model llama --layers 16 --data text.jsonl --out small

    Example: slimkit distill --factory nets.py:net --model net.pt --student-arg width=16 --data x.npz --out small
    """
    with session("distill", output) as talk:
        from slimkit.core.jobs import crew
        from slimkit.core.jobs import training as jobs
        from slimkit.core.jobs.measurement import show

        chosen = places.student(network, cut, student, student_factory, student_arguments)
        place = places.model(network)
        talk.go_on = training.GO_ON
        with training.claimed(out, output, network.model, student) as target:
            if training.is_silent(target):
                return
            face = places.framework(network)
            read = texts.place(data, asked.batch_size)
            found = jobs.distill(face, place, read, target, asked, chosen, kept.run(), label_key=label_key)
        if crew.rank() > 0:
            return
        talk.line(
            f"{'Would train' if output.dry_run else 'Trained'} a student of {show(found['parameters'], 'count')} "
            f"parameters ({found['parameters'] / found['teacher_parameters']:.3f} of the teacher) on "
            f"{found['samples']} samples"
        )
        if not output.dry_run:
            training.tell(talk, found, out)
        talk.result(
            {"model": places.say_where(place), "out": out, "sizes": dict(chosen.sizes), **found}, dry_run=output.dry_run
        )
