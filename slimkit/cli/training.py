"""The options of the commands that train."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli import options, places
from slimkit.core.jobs.fields import EVERY

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from slimkit.cli.session import Session
    from slimkit.core.jobs.framework import FitRun
    from slimkit.core.jobs.sources import DataPlace

# What a stopped training command says.
GO_ON = "the state is saved; the same command goes on from there"

Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        metavar="FILE|MODULE:FUNCTION",
        help="Text for a Hugging Face directory (.jsonl, .txt); for a factory arrays (.npz, .npy, .safetensors), or a "
        "function that returns batches.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
LabelKey = Annotated[str, typer.Option("--label-key", help="The array that holds the labels.", rich_help_panel="Data")]
Task = Annotated[
    str,
    typer.Option(
        "--task",
        autocompletion=options.words("auto", "classification", "causal-lm"),
        help="Of text: classification (lines have a label), causal-lm, or auto: what the data says.",
    ),
]
Evaluation = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        help="Held-out data of the same form.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.", show_default=False)]


@dataclass(frozen=True)
class Texts:
    """How training data is read."""

    text_key: options.TextKey = "text"
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Take at most so many samples.", rich_help_panel="Data")
    ] = EVERY
    max_length: Annotated[
        int,
        typer.Option(
            "--max-length",
            min=2,
            help="Tokens of a sample: a language model's documents go into windows, other texts into pieces; "
            "a text with a label is cut.",
            rich_help_panel="Data",
        ),
    ] = 128

    def place(self, reference: str, batch_size: int) -> DataPlace:
        """The data that an option names."""
        found = places.data(reference, self.text_key, self.samples, self.max_length, batch_size)
        assert found is not None
        return found


@dataclass(frozen=True)
class Keeping:
    """How a training command keeps its state, and how it goes on."""

    seed: options.Seed = 0
    save_every: Annotated[
        int,
        typer.Option("--save-every", min=1, help="Updates between two checkpoints.", rich_help_panel="Training"),
    ] = 100
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw an unfinished run in --out away.", rich_help_panel="Training"),
    ] = False

    def run(self) -> FitRun:
        """For the job."""
        from slimkit.core.jobs.framework import FitRun

        return FitRun(self.seed, self.save_every, self.restart)


def claimed(out: Path, output: options.Writing, *reads: Path | None) -> AbstractContextManager[Path | None]:
    """The place of a training command's result, which may hold the command's own unfinished state."""
    from slimkit.core.jobs import claim, crew

    if crew.rank() > 0:  # of several processes the first one holds the place for all
        return contextlib.nullcontext(None if output.dry_run else out.absolute())
    return claim.claimed(out, force=output.force, dry_run=output.dry_run, states=claim.TRAINING, reads=reads)


def is_silent(out: Path | None) -> bool:
    """Whether a process of several has nothing to plan (`out` None): the first one does it for all."""
    from slimkit.core.jobs import crew

    return out is None and crew.rank() > 0


def tell(talk: Session, found: dict[str, Any], out: Path) -> None:
    """What a training came to, for people."""
    talk.line("Loss by epoch: " + ", ".join(f"{value:.4g}" for value in found["loss_by_epoch"]))
    for name, value in found.get("evaluation", {}).items():
        talk.line(f"  held-out {name}: {value:.4g}")
    talk.line(f"Written: {out}")
