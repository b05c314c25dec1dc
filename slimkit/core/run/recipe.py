"""The recipe: one YAML file that says which model goes through which stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, PositiveFloat, PositiveInt, Tag, ValidationError

from slimkit.core import check
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.files import readable_file
from slimkit.core.run.factory import Factory, Reference, Strict
from slimkit.core.yamltext import parse_yaml

# A recipe is written by hand; a few lines of YAML aliases can stand for more values than fit into memory.
_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Training(Strict):
    """How parameters are trained, in every stage that trains."""

    epochs: PositiveInt = Field(description="passes over the training data")
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate")
    batch_size: PositiveInt = Field(64, description="samples per update")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd uses momentum 0.9")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="down to zero, or constant")
    gradient_clip: PositiveFloat | None = Field(None, description="bound on each gradient entry")
    loss: Reference | None = Field(None, description="overrides the recipe's loss in this stage")


class TrainOptions(Training):
    """Train (or fine-tune) all parameters."""

    keep_zeros: bool = Field(False, description="weights that are zero stay zero (after sparsify)")


class PruneOptions(Strict):
    """Drop the least important channels, heads and widths (``Pruner``)."""

    reserved_ratio: Annotated[float, Field(gt=0, le=1)] = Field(description="share of the parameters kept")
    importance: str = Field("l1", description="name of the importance measure")
    budget: Literal["params", "macs"] = Field("params", description="what reserved_ratio counts")
    alignment: PositiveInt = Field(16, description="kept widths are multiples of it")
    node_reserved_ratio: Ratio = Field(0.5, description="least share of its channels each node keeps")
    un_prune_list: list[int | str] | None = Field(None, description="layers left whole; null means first and last")
    calibration_batches: PositiveInt | None = Field(None, description="batches for data-driven importance")
    compensation_batches: PositiveInt | None = Field(None, description="batches to refit what remains, without labels")


class CutOptions(Strict):
    """Build a smaller instance of the model and cut its weights from a file (``prune_model_weight``)."""

    arguments: dict[str, Any] = Field(description="keyword arguments of the model factory that make it smaller")
    weights: Reference | None = Field(None, description="factory of a weight file's path; null: the present model")
    steps: list[str] = Field(default=["prune_blocks"], description="prune_blocks, prune_bert_intra_block")
    pattern: str | None = Field(None, description="regular expression of a block's name; group 1 is its number")
    layers: dict[int, int] | None = Field(None, description="new block number: old block number")
    selection: Literal["first", "importance"] = Field("first", description="which rows and columns to keep")


class DistillTerm(Strict):
    """One comparison of student and teacher."""

    teacher: str | int = Field(description="module path, or output index or key")
    student: str | int = Field(description="module path, or output index or key")
    loss: str = Field(description="loss name, for example HiddenMse")
    weight: PositiveFloat = Field(1.0, description="factor of this term")
    temperature: PositiveFloat = Field(1.0, description="softening of logits")


class DistillOptions(Training):
    """Train the model to answer as the dense model does (``get_distill_model``)."""

    hidden: list[DistillTerm] = Field(default_factory=list, description="inner modules to compare")
    outputs: list[DistillTerm] = Field(default_factory=list, description="outputs to compare")
    hard_weight: float = Field(0.0, ge=0, description="weight of the task loss beside the soft ones")


class SparsifyOptions(Strict):
    """Set weights to zero by magnitude or second-order information (``Compressor``)."""

    method: str = Field("hessian", description="magnitude, wanda, hessian, par or par_v2")
    sparse_ratio: Ratio = Field(0.5, description="share of the weights set to zero")
    pattern: str | None = Field(None, description='n:m along input channels, for example "2:4"')
    uniform: bool = Field(True, description="the same ratio in every layer")
    progressive: bool = Field(False, description="reach the ratio in steps")
    residual: bool = Field(False, description="also fit what the residual stream has lost (torch, chains of blocks)")
    targets: list[str] | None = Field(None, description="globs of layers to sparsify; null means all")
    ignore: list[str] | None = Field(None, description="globs of layers left dense")
    calibration_batches: PositiveInt = Field(8, description="batches of calibration data")


class AdaptOptions(Training):
    """Freeze the model and train a small delta on top (``apply_delta``)."""

    kind: str = Field("lora", description="delta kind")
    targets: list[str] = Field(description="globs of the layers that get a delta")
    rank: PositiveInt = Field(8, description="rank of the update")
    alpha: PositiveFloat = Field(16.0, description="scale is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the delta")


class ExportOptions(Strict):
    """Write the model as files that other programs run, each proven against it (``export_onnx``, ``export_mindir``)."""

    opset: PositiveInt = Field(13, description="ONNX opset; 13 suits ATC")
    dynamic_batch: bool = Field(False, description="leave the batch size open")
    tolerance: PositiveFloat = Field(1e-4, description="largest difference allowed between model and file")
    compare_dense: bool = Field(True, description="also export the dense model and measure the latency ratio")
    formats: Annotated[list[Literal["onnx", "mindir"]], Field(min_length=1)] | None = Field(
        None, description="null: onnx, and mindir too in MindSpore"
    )


class TrainStage(Strict):
    train: TrainOptions


class FinetuneStage(Strict):
    finetune: TrainOptions


class PruneStage(Strict):
    prune: PruneOptions


class CutStage(Strict):
    cut: CutOptions


class DistillStage(Strict):
    distill: DistillOptions


class SparsifyStage(Strict):
    sparsify: SparsifyOptions


class AdaptStage(Strict):
    adapt: AdaptOptions


class ExportStage(Strict):
    export: ExportOptions


_STAGES: dict[str, type[BaseModel]] = {
    "train": TrainStage,
    "finetune": FinetuneStage,
    "prune": PruneStage,
    "cut": CutStage,
    "distill": DistillStage,
    "sparsify": SparsifyStage,
    "adapt": AdaptStage,
    "export": ExportStage,
}


def _kind(stage: Any) -> str | None:
    """The one key of a stage; None lets pydantic refuse it."""
    if isinstance(stage, BaseModel):
        return next(iter(type(stage).model_fields))
    if isinstance(stage, Mapping) and len(stage) == 1:
        key = next(iter(stage))
        return key if key in _STAGES else None
    return None


Stage = Annotated[
    Annotated[TrainStage, Tag("train")]
    | Annotated[FinetuneStage, Tag("finetune")]
    | Annotated[PruneStage, Tag("prune")]
    | Annotated[CutStage, Tag("cut")]
    | Annotated[DistillStage, Tag("distill")]
    | Annotated[SparsifyStage, Tag("sparsify")]
    | Annotated[AdaptStage, Tag("adapt")]
    | Annotated[ExportStage, Tag("export")],
    Discriminator(_kind),
]


class Recipe(Strict):
    """A whole run: the model, the data, and the stages it goes through."""

    version: Literal[1] = Field(description="version of this format")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(description="names the report")
    title: str | None = Field(None, description="heading of the report")
    framework: Literal["torch", "mindspore"] = Field("torch", description="which wing runs it")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="every stage is seeded from it and its place")
    output: str | None = Field(None, description="folder of the run; runs/<name> by default")
    model: Reference = Field(description="makes the model: f(**arguments) -> model")
    data: Reference = Field(description="makes the data: f() -> mapping with train, example, calibration")
    loss: Reference = Field("cross_entropy", description="cross_entropy, mse, or f(model, batch) -> scalar")
    metrics: Reference | None = Field(None, description="f(model, data, dense) -> {name: number}")
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(description="run in this order")

    def steps(self) -> list[tuple[str, BaseModel]]:
        """The stages as (kind, options)."""
        return [(kind, getattr(stage, kind)) for stage in self.stages for kind in type(stage).model_fields]


def load_recipe(path: Any, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: dotted key -> value, for example {"seed": 3, "stages.0.train.epochs": 1}.

    Returns:
        The checked, immutable recipe.

    Raises:
        FileFormatError: the file does not exist.
        ConfigError: it is not YAML, or says something that is not allowed; the message begins with the key's path.
    """
    file = readable_file(path, "recipe")
    if file.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{file} is larger than {_MOST_BYTES:,} bytes, which no recipe should be")
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (FileFormatError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping of keys. Received: {type(content).__name__}")
    if _values(content, {}) > _MOST_VALUES:
        raise ConfigError(f"{file}: its aliases make more than {_MOST_VALUES:,} values, or lead back to themselves")
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    return parse_recipe(content, source=str(file))


def _values(value: Any, known: dict[int, float]) -> float:
    """How many values a parsed file holds once its aliases are written out; infinite where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        inner = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(value)]


def parse_recipe(content: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check the content of a recipe; ConfigError names each wrong key by its path.

    Example:
        >>> parse_recipe({"version": 1, "name": "x", "model": "m.py:f", "data": "m.py:d",
        ...               "stages": [{"prune": {"reserved_ratio": 0.5}}]}).steps()[0][0]
        'prune'
    """
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        lines = [_explain(e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(dict.fromkeys(lines))) from None


def _explain(location: tuple[Any, ...], kind: str, message: str, value: Any) -> str:
    """One line of a validation error: the key's path as written in the YAML, then what is wrong."""
    place, model = _walk(location)
    if kind == "extra_forbidden":
        return f"{place}: unknown key{check.near(location[-1], list(model.model_fields)) if model else ''}"
    if kind == "missing":
        return f"{place}: this key is required"
    if kind == "union_tag_not_found" or kind == "union_tag_invalid":
        keys = list(value) if isinstance(value, Mapping) else [value]
        near = check.near(keys[0], list(_STAGES)) if len(keys) == 1 else ""
        return f"{place}: a stage is one of {', '.join(_STAGES)}. Received: {', '.join(map(repr, keys))}{near}"
    shown = repr(value)
    return f"{place}: {message}. Received: {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _walk(location: tuple[Any, ...]) -> tuple[str, type[BaseModel] | None]:
    """A pydantic location as a YAML path, and the model that holds its last key."""
    path, model = "", Recipe
    holder: type[BaseModel] | None = Recipe
    previous: Any = None
    for at, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(previous, int) and part in _STAGES:
            model = _STAGES[part]  # type: ignore[assignment]  # the union's tag, which the YAML does not repeat
        elif part == "Factory" or part == "str":
            model = Factory  # type: ignore[assignment]
        else:
            path += f".{part}" if path else str(part)
            holder = model
            if at < len(location) - 1 and model is not None:
                model = _inner(model, str(part))  # type: ignore[assignment]
        previous = part
    return path or "recipe", holder


def _inner(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model inside a field, through lists and unions."""
    if key not in model.model_fields:
        return None
    pending = [model.model_fields[key].annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        pending.extend(get_args(kind))
    return None


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in raw recipe content, in place; list positions are numbers."""
    *path, last = key.split(".")
    here: Any = content
    try:
        for part in path:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        if isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise ConfigError(f"{key}: there is no such place in the recipe") from None
