"""The options of the commands that train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli import options, places

if TYPE_CHECKING:
    from slimkit.core.jobs.data import DataPlace
    from slimkit.core.jobs.training import TrainingPlan

# What a stopped training command says.
GO_ON = "the state is saved; the same command goes on from there"

_EVERY = 1_000_000_000

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
Loss = Annotated[
    str,
    typer.Option(
        "--loss",
        metavar="NAME|MODULE:FUNCTION",
        autocompletion=options.words("auto", "cross_entropy", "mse"),
        help="On labels, for arrays: cross_entropy, mse, auto (by the type of the labels), or f(model, batch).",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.", show_default=False)]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate of AdamW.", rich_help_panel="Training")]


@dataclass(frozen=True)
class Texts:
    """How training data is read."""

    text_key: options.TextKey = "text"
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Take at most so many samples.", rich_help_panel="Data")
    ] = _EVERY
    max_length: options.MaxLength = 128
    batch_size: options.BatchSize = 16

    def place(self, reference: str) -> DataPlace:
        """The data that an option names."""
        found = places.data(reference, self.text_key, self.samples, self.max_length, self.batch_size)
        assert found is not None
        return found


@dataclass(frozen=True)
class Training:
    """How to train, and how to go on."""

    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Passes over the data.", rich_help_panel="Training")
    ] = 1
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            autocompletion=options.words("cosine", "linear", "constant"),
            help="cosine, linear or constant.",
            rich_help_panel="Training",
        ),
    ] = "cosine"
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Updates until the full rate.", rich_help_panel="Training")
    ] = 0
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps", min=1, help="Bound on the updates.", show_default=False, rich_help_panel="Training"
        ),
    ] = None
    seed: options.Seed = 0
    save_every: Annotated[
        int,
        typer.Option("--save-every", min=1, help="Updates between two checkpoints.", rich_help_panel="Training"),
    ] = 100
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw an unfinished run in --out away.", rich_help_panel="Training"),
    ] = False

    def plan(self, rate: float, batch_size: int) -> TrainingPlan:
        """The plan for the framework's side."""
        from slimkit.core.jobs.training import TrainingPlan

        return TrainingPlan(
            epochs=self.epochs,
            learning_rate=rate,
            batch_size=batch_size,
            schedule=self.schedule,
            warmup=self.warmup,
            max_steps=self.max_steps,
            seed=self.seed,
            save_every=self.save_every,
            restart=self.restart,
        )


def losses(found: dict[str, Any]) -> str:
    """The loss of each epoch, for people."""
    return ", ".join(f"{value:.4g}" for value in found["loss_by_epoch"])
