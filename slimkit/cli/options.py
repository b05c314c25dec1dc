"""The options that commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from slimkit.core.errors import SlimkitError


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
    list[str] | None,
    typer.Option(
        "--calib",
        metavar="FILE[=WEIGHT]|self|MODULE:FUNCTION",
        help="Calibration data: text (.jsonl, .txt, .parquet; with the directory's tokenizer), drawn from the whole "
        "file; may be given again, with weights; self: text that the dense model writes itself; .npy, .npz, or a "
        "function that returns batches.",
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
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        min=1,
        help="Tokens of the example text; 128, or as many as the model knows positions for.",
        show_default=False,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace what is there already, once the result is whole; without it nothing is ever replaced.",
        rich_help_panel="Output",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything drawn at random.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda|npu[:N]",
        help="Where to compute; the CPU by default, and for PyTorch training what accelerate finds.",
        autocompletion=words("cpu", "cuda", "npu"),
        show_default=False,
        rich_help_panel="Model",
    ),
]


@dataclass(frozen=True)
class Network:
    """Which model, and where it is computed."""

    model: Model = None
    factory: Factory = None
    arguments: FactoryArguments = None
    framework: Framework = "torch"
    device: Device = None


@dataclass(frozen=True)
class Output:
    """What goes to the terminal, and whether anything is written."""

    dry_run: DryRun = False
    as_json: AsJson = False
    quiet: Quiet = False
    verbose: Verbose = False


@dataclass(frozen=True)
class Writing(Output):
    """The same of a command that writes a result."""

    force: Force = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let parameters that are dataclasses or a job's options stand for their fields: an option each.

    A dataclass's fields say themselves what they are to typer; for a job's options (`core.jobs.options`) the flag, the
    default, the help and the words come from the class.

    Example:
        >>> @spread
        ... def show(output: Output) -> None:
        ...     print(output.quiet)
        >>> show(dry_run=False, as_json=False, quiet=True, verbose=False)
        True
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    jobs: list[Any] = []
    taken: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if hasattr(kind, "model_fields"):
            from slimkit.cli import jobflags

            jobs.append(kind)
            found = jobflags.parameters(kind)
            groups[name] = (functools.partial(jobflags.made, kind), [one.name for one in found])
            taken += found
        elif is_dataclass(kind) and isinstance(kind, type):
            inner = get_type_hints(kind, include_extras=True)
            groups[name] = (kind, [one.name for one in fields(kind)])
            taken += [
                inspect.Parameter(one.name, parameter.KEYWORD_ONLY, default=one.default, annotation=inner[one.name])
                for one in fields(kind)
            ]
        else:
            taken.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def call(**given: Any) -> None:
        made = {name: kind(**{one: given.pop(one) for one in names}) for name, (kind, names) in groups.items()}
        try:
            command(**given, **made)
        except SlimkitError as error:
            if jobs and error.args and isinstance(error.args[0], str):
                from slimkit.cli import jobflags

                error.args = (jobflags.spoken(error.args[0], jobs), *error.args[1:])
            raise

    call.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return call
