"""The single commands, alike in both frameworks: a model named on the command line in, files or figures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.calibration.record import record_of, write_record
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.examples import NoExampleError
from slimkit.core.jobs import cards, early, fed, fitting, folders, pruning, sources, work
from slimkit.core.jobs.calibrating import calibration_of
from slimkit.core.jobs.fields import Strict, flag_of
from slimkit.core.jobs.framework import ComputeLoss, FitRun, JobFramework, Opened, Supervised
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.jobs.options import W8A8S, ExportOptions, FitOptions, PruneOptions, SparsifyOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace
from slimkit.core.log import logger
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.select import select

# Formats that are a folder with the model's configuration beside the weights.
FOLDERS = ("w16a16s", "w8a8s", "hf")


class CommandContext(work.JobContext):
    """A command as the job sees it.

    Args:
        face: the framework.
        seed: of --seed.
        example: one batch of inputs.
        options: the job's options, whose flags messages name.
        batches: calibration batches, where --calib was given.
        read: the training data.
        is_hf: whether transformers made the model, which then knows no loss on arrays.
        named_loss: the task's loss and its name, where that is settled.
        words: gives the tokenizer that came with the model.
    """

    def __init__(
        self,
        face: JobFramework,
        seed: int,
        example: Any,
        options: Strict,
        *,
        batches: Sequence[Any] | None = None,
        read: Supervised | None = None,
        is_hf: bool = False,
        named_loss: tuple[str, ComputeLoss] | None = None,
        words: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(face, seed, example)
        self._words = words
        self._kind, self._batches, self._read, self._is_hf = type(options), batches, read, is_hf
        self._loss, self._asked = named_loss, False
        # Where a training run keeps its state, how, and the inputs that it is known by.
        self.keeps: tuple[Path, FitRun, Mapping[str, Any]] | None = None

    def spell(self, key: str) -> str:
        return flag_of(self._kind, key).names[0]

    def function(self, reference: str, key: str) -> Callable[..., Any]:
        return sources.found(reference, self.spell(key))

    def file(self, name: str) -> Path:
        return Path(name)

    def calibration(self, count: int | None = None) -> Sequence[Any]:
        if not self._batches:
            raise ConfigError("--calib DATA is needed: calibration batches, which nothing else gives")
        self._asked = True
        return self._batches

    def warn_unread(self, what: str) -> None:
        """Say so where calibration data was given and nothing asked for it."""
        if self._batches and not self._asked:
            logger.warning("--calib is read by nothing here: %s", what)

    def tokenizer(self, folder: str | None) -> Any:
        if folder is not None:
            return folder
        return super().tokenizer(None) if self._words is None else self._words()

    def lessons(self, count: int, size: int) -> list[Any]:
        assert self._read is not None
        return self._read.spread(count if self._read.collate is None else count * size, size)

    def loss(self, asked: Any) -> tuple[str, ComputeLoss]:
        if self._loss is not None:
            return self._loss
        if asked is not None and ":" in asked:
            return asked, sources.found(asked, "--loss")
        if self._is_hf:
            raise ConfigError("--loss: arrays on a Hugging Face directory need --loss MODULE:FUNCTION, f(model, batch)")
        assert self._read is not None
        name = asked or ("cross_entropy" if self._read.integers else "mse")
        return name, work.named_loss(self.face, name, self.spell)

    def fit(self, model: Any, options: FitOptions, loss: ComputeLoss) -> dict[str, Any]:
        assert self._read is not None
        assert self.keeps is not None
        return fitting.fit_resumably(
            self.face, model, options, self._read.samples, loss, *self.keeps,
            spell=self.spell, collate=self._read.collate, tokens=self._read.tokens,
        )  # fmt: skip


# prune, sparsify, export, inspect -----------------------------------------------------------------------------------


def prune(
    face: JobFramework,
    place: ModelPlace,
    out: Path | None,
    options: PruneOptions,
    *,
    example: str | None,
    calib: DataPlace | None,
    seed: int,
) -> dict[str, Any]:
    """Prune a model's structure; with `out` None only plan it.

    Args:
        face: the framework.
        place: the model.
        out: folder of the pruned model; None leaves everything as it is.
        options: of the job.
        example: one input: a shape, a file of arrays or a function; None: one that the model describes.
        calib: data for data-driven importances and for the refit.
        seed: of made-up examples and of random importance.

    Returns:
        parameters_before, parameters, kept, report, and with `out` written; where transformers reads the folder,
        reloaded: the largest difference of its model's outputs from the model in memory.
    """
    early.check(place, options, calib=calib)
    opened = face.open(place)
    if opened.desc is not None:
        raise ConfigError("--model is a pruned model already; prune the original to the ratio wanted")
    batches = proved(face, opened, calibration_of(face, opened, calib, out), calib)
    inputs = example_of(face, opened, example, seed=seed)
    context = CommandContext(face, seed, inputs, options, batches=batches)
    done = pruning.prune(opened.model, options, context, plan_only=out is None)
    context.warn_unread(pruning.UNREAD)
    facts = {key: value for key, value in done.facts.items() if key not in ("headline", "goal")}
    if out is None or done.edit is None:
        return facts
    opened.desc = done.edit["prune"]
    with files.atomic_directory(out) as folder:
        facts["written"] = face.write_model(opened, folder)
        if facts["written"] == "transformers":
            # Only now it is more than a promise: the folder is read again by its library's own loader.
            facts["reloaded"] = face.reloaded(opened, folder, inputs)
        command = cards.command_line("prune", place, options, cards.data_flags(calib, seed=seed))
        cards.write_card(folder, "pruned", opened, command, cards.pruned_facts(facts, options), facts["written"])
        folders.write_report(folder, "prune", {"asked": options.reserved_ratio, "command": command, **facts})
        write_record(folder, "prune", record_of(batches), place.model)
    return facts


def sparsify(
    face: JobFramework,
    place: ModelPlace,
    out: Path,
    options: SparsifyOptions,
    *,
    calib: DataPlace | None,
    restart: bool = False,
    plan: bool = False,
) -> dict[str, Any]:
    """Make a model sparse and write it; with `plan` say what that would do.

    Args:
        face: the framework.
        place: the model.
        out: folder of the sparse model.
        options: of the job.
        calib: calibration data.
        restart: throw an unfinished run away, where a framework leaves one.
        plan: write nothing.

    Returns:
        The report of the sparsity room, with "written" and "resumable"; for a plan the layers, the zeros, the data.
    """
    config = options.build()
    early.check(place, options, calib=calib)
    command = cards.command_line("sparsify", place, options, cards.data_flags(calib))
    found = face.sparsify_blocks(place, out, config, calib, command, restart=restart, plan=plan)
    if found is not None:
        return found
    opened = face.open(place)
    batches = needed(proved(face, opened, calibration_of(face, opened, calib, out), calib), config)
    if plan:
        return sparse_plan(*face.sparse_layers(opened.model), config, batches)
    context = CommandContext(face, 0, None, options, batches=batches)
    report = work.sparsify(opened.model, options, context).facts["report"]
    with files.atomic_directory(out) as folder:
        written = face.write_model(opened, folder)
        files.write_json(folder / folders.SPARSE_REPORT, report)
        cards.write_card(folder, "sparse", opened, command, cards.sparse_facts(report), written)
        write_record(folder, "sparsify", record_of(batches), place.model)
    return {**report, "written": written, "resumable": False}


def proved(face: JobFramework, opened: Opened, batches: Any, place: DataPlace | None) -> Any:
    """Calibration batches in the form that the model takes; one call of it shows that it takes them."""
    if not batches:
        return batches
    made = fed.fitted(face, opened, batches, "--calib")
    own = place is not None and place.kind in ("arrays", "function")
    return made if own else batches  # drawn text keeps its record


def needed(batches: Sequence[Any] | None, config: SparseConfig) -> Sequence[Any] | None:
    """Refuse to go on without data that the method reads."""
    if config.needs_data and not batches:
        raise ConfigError(f"--method {config.method} needs --calib DATA; only magnitude with equal ratios needs none")
    return batches


def sparse_plan(
    layers: Mapping[str, Any], skipped: Mapping[str, str], config: SparseConfig, batches: Sequence[Any] | None
) -> dict[str, Any]:
    """What a sparsity run would do, as plain values."""
    left_out = dict(skipped)
    names, unmatched = select(layers, left_out, config)
    weights = sum(layers[n].size for n in names)
    return {
        "layers": names,
        "skipped": left_out,
        "unmatched": list(unmatched),
        "weights": weights,
        "zeros": round(weights * config.sparse_ratio),
        "batches": len(batches or ()),
        "blocks_done": 0,
        "resumable": False,
    }


def export(
    face: JobFramework,
    place: ModelPlace,
    out: Path | None,
    options: ExportOptions,
    *,
    format: str,
    example: str | None,
    length: int | None,
    delta_folder: Path | None,
    calib: DataPlace | None = None,
    seed: int,
) -> dict[str, Any]:
    """Write a model for deployment; with `out` None only prepare.

    Args:
        face: the framework.
        place: the model.
        out: the file, or the folder of a format that is one.
        options: of the job.
        format: one of the framework's formats.
        example: one input, as in `prune`.
        length: tokens of a made-up text; None: 128, or as many as the model knows positions for.
        delta_folder: a delta to put on and merge first; the model's files stay as they are.
        calib: of w8a8s: what shows between which values each layer's inputs lie.
        seed: of made-up inputs.

    Returns:
        What was written and how well it agrees, as plain values.

    Raises:
        UnsupportedError: the format belongs to the other framework.
    """
    if format not in face.formats:
        raise UnsupportedError(
            f"--format {format} is not written here (choose from {', '.join(face.formats)}): mindir is for --framework "
            "mindspore"
        )
    if format in FOLDERS and not (place.model is not None and (place.model / "config.json").is_file()):
        raise ConfigError(f"--format {format} needs a --model folder with a config.json, which goes along")
    if (format == "w8a8s") != (calib is not None):
        raise ConfigError(
            "--calib is needed for --format w8a8s, whose inputs get their steps from it, and for no other"
        )
    if format != "w8a8s" and (odd := [key for key in W8A8S if key in options.changed()]):
        raise ConfigError(f"--{odd[0].replace('_', '-')} is an option of --format w8a8s. Received: --format {format}")
    if format == "mindir" and out is not None and out.suffix != ".mindir":
        raise ConfigError(f"--out must end in .mindir for --format mindir. Received: {out.name!r}")
    early.check(place, options)
    length = early.text_length(place, length)
    opened = face.open(place, delta_folder)
    if delta_folder is not None:
        face.slim.merge_delta(opened.model, unload=True)
    facts: dict[str, Any] = {"format": format, "parameters": work.count(face, opened.model)}
    inputs = None
    if format == "w8a8s":
        inputs = proved(face, opened, calibration_of(face, opened, calib), calib)
    elif format not in FOLDERS:
        inputs = example_of(face, opened, example, length=length, seed=seed)
        facts["shapes"] = face.input_shapes(inputs)
    if out is None:
        return facts
    if format not in FOLDERS:
        return {**facts, **face.export(opened, inputs, out, format, options.build(format))}
    with files.atomic_directory(out) as folder:
        written = face.export(opened, inputs, folder, format, options.build(format))
    return {**facts, **written, "directory": str(out)}


def measure(
    face: JobFramework,
    place: ModelPlace,
    *,
    example: str | None,
    length: int | None,
    delta_folder: Path | None,
    seed: int,
) -> Measurement:
    """Parameters, zeros, MACs, trainable share and latency of a model on one input."""
    length = early.text_length(place, length)
    opened = face.open(place, delta_folder)
    return face.measure(opened.model, example_of(face, opened, example, length=length, seed=seed))


# What they share. ---------------------------------------------------------------------------------------------------


def example_of(face: JobFramework, opened: Opened, given: str | None, *, length: int = 16, seed: int = 0) -> Any:
    """One input: what the user gave (a shape, a file of arrays, a function), or one the model describes."""
    if given is None:
        try:
            made = face.own_example(opened, length, seed)
        except NoExampleError as error:
            raise ConfigError(
                f"--example SHAPE (such as 1,3,224,224), a file or a function is needed: {error.reason}"
            ) from None
    elif Path(given).exists():
        made = face.tensors(sources.read_arrays(Path(given)))
    elif ":" in given and not given.rpartition(":")[2].startswith(("float", "int", "bool")):
        made = sources.found(given, "--example")()
        made = made["example"] if isinstance(made, dict) and "example" in made else made
    else:
        made = face.tensors(sources.parse_example(given, seed))
    option = "the example that the model describes" if given is None else "--example"
    return fed.fitting_form(face, opened, made, option)(made)
