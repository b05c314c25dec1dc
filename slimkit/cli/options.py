"""The options that commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def words(*choices: str) -> Callable[[str], list[str]]:
    """What the shell offers for an option that takes one of some words."""
    return lambda incomplete: [word for word in choices if word.startswith(incomplete)]


AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel="Output"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; write nothing.", rich_help_panel="Output")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.", rich_help_panel="Output")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more while working.", rich_help_panel="Output")]

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="A Hugging Face directory, a folder that a command here wrote, or with --factory a weight file.",
        show_default=False,
        rich_help_panel="Model",
    ),
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory",
        metavar="MODULE:FUNCTION",
        help="Makes the network: package.module:function or file.py:function.",
        show_default=False,
        rich_help_panel="Model",
    ),
]
FactoryArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--arg",
        metavar="KEY=VALUE",
        help="An argument of the factory (YAML value).",
        show_default=False,
        rich_help_panel="Model",
    ),
]
Framework = Annotated[
    str,
    typer.Option(
        "--framework",
        "-f",
        help="torch or mindspore.",
        autocompletion=words("torch", "mindspore"),
        rich_help_panel="Model",
    ),
]
Example = Annotated[
    str | None,
    typer.Option(
        "--example",
        metavar="SHAPE|FILE|MODULE:FUNCTION",
        help="One input: 1,3,224,224 (float32; 1,128:int64), NAME=SHAPE;NAME=SHAPE, .npy, .npz, or a function. "
        "Hugging Face models need none.",
        show_default=False,
        rich_help_panel="Model",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="FILE|MODULE:FUNCTION",
        help="Calibration data: .jsonl or .txt (with the directory's tokenizer), .npy, .npz, or a function that "
        "returns batches.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
TextKey = Annotated[str, typer.Option("--text-key", help="Key of the text in .jsonl lines.", rich_help_panel="Data")]
Samples = Annotated[
    int, typer.Option("--samples", min=1, help="Take at most so many samples of the data.", rich_help_panel="Data")
]
MaxLength = Annotated[
    int, typer.Option("--max-length", min=1, help="Cut texts to so many tokens.", rich_help_panel="Data")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples in a batch.", rich_help_panel="Data")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything drawn at random.")]
