"""Every job's options, once: recipes, commands, the JSON Schema and the documentation read these classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from slimkit.core.jobs.factory import Factory, Reference
from slimkit.core.jobs.fields import RECIPE_ONLY, Flag, OneOf, Strict, whole_number
from slimkit.core.jobs.training_options import (
    AdaptOptions,
    DistillOptions,
    DistillTerm,
    FitOptions,
    JobOptions,
    TrainOptions,
)

if TYPE_CHECKING:
    from slimkit.core.sparse import SparseConfig
    from slimkit.core.weights.blocks import PruneConfig

Ratio = Annotated[float, Field(gt=0, lt=1)]
W8A8S = ("ranges", "most_error")  # options of export that this format alone has
EVERY = 1_000_000_000  # more batches than any data has


class PruneOptions(JobOptions):
    """Drop the least important channels, heads and widths (``Pruner``)."""

    reserved_ratio: Annotated[float, Field(gt=0, le=1), Flag("--keep-ratio", old=("--ratio", "-r"))] = Field(
        0.75, description="share of the parameters (or MACs, or milliseconds) kept"
    )
    importance: Annotated[str, OneOf("slimkit.core.prune.criteria:CRITERIA", functions=True)] = Field(
        "auto",
        description="how channels are scored, by name (output, taylor, hessian, activation read calibration data) or "
        "file.py:function of one channel's weights; auto: output for a language model, l1 for others",
    )
    budget: Annotated[str, OneOf(("params", "macs", "kv_cache", "latency"))] = Field(
        "params",
        description="what the ratio counts; kv_cache: keys and values that a decoder holds for each token, and nothing "
        "else is cut; latency: milliseconds, as a table foretells them",
    )
    latency_table: Annotated[str | None, Flag("--latency-table", metavar="FILE")] = Field(
        None,
        description="table of times for the budget latency, as measure_latency makes it; where the file is not there "
        "or lacks this network it is measured here (onnxruntime, one thread) and kept in it",
    )
    allocation: Annotated[str | None, OneOf(("uniform", "global", "measured"))] = Field(
        None,
        description="uniform: each node keeps the same share; global: the least important go first; measured: what "
        "importance output foretells to cost least; unset: measured with output, else uniform",
    )
    alignment: Annotated[PositiveInt, Flag("--alignment", old=("--align",))] = Field(
        16, description="kept widths are multiples of it; 16 suits Ascend"
    )
    node_reserved_ratio: Annotated[Ratio | None, Flag("--node-ratio")] = Field(
        None,
        description="least share of its channels each node keeps, whatever is asked for; unset: 0.5, 0.1 where "
        "measured, or as much less as the ratio asked for needs",
    )
    form: Annotated[str | None, OneOf(("config", "padded", "any"))] = Field(
        None,
        description="config: only what a Hugging Face configuration can say, so that from_pretrained loads the result; "
        "padded: blocks of their own widths, filled up with zeros to that; any: cuts of any shape, "
        "for slimkit's own loaders; unset: config where the model has such a configuration",
    )
    rotation: bool = Field(
        False,
        description="turn the hidden width onto its principal axes before it is cut (models with RMSNorm; wants the "
        "importance output)",
    )
    parallel: PositiveInt = Field(
        1, description="devices that heads, key and value heads and inner widths must divide among"
    )
    un_prune_list: Annotated[list[int | str] | None, Flag("--un-prune", metavar="LAYER", old=("--keep",))] = Field(
        None,
        description="layers left whole, by number or name, or none; unset: the first and the last, in the form config "
        "none",
    )
    calibration_batches: Annotated[PositiveInt | None, RECIPE_ONLY] = Field(
        None, description="batches for data-driven importance; unset: all there are"
    )
    compensation_batches: Annotated[
        PositiveInt | None,
        Flag("--compensate", sets=EVERY, help="refit what remains on the --calib data; no labels needed"),
    ] = Field(
        None,
        description="batches to refit what remains, without labels; unset: no refit, but of a language model pruned by "
        "output all batches",
    )

    @model_validator(mode="after")
    def _timed(self) -> PruneOptions:
        if (self.budget == "latency") != (self.latency_table is not None):
            raise PydanticCustomError(
                "together", "the budget latency and a latency table (a file) must be given together", {"near": ""}
            )
        return self

    @property
    def needs_data(self) -> bool:
        return self.scored_by_data or self.compensation_batches is not None

    @property
    def scored_by_data(self) -> bool:
        """Whether the importance reads calibration data."""
        from slimkit.core.prune.criteria import CRITERIA

        named = self.importance in CRITERIA and bool(CRITERIA[self.importance].needs)
        return named or self.calibration_batches is not None

    def functions(self) -> dict[str, tuple[Factory | str, tuple[str, ...]]]:
        # A function of one channel's weights, or a class of criteria, which is made without arguments.
        return {"importance": (self.importance, ())} if ":" in self.importance else {}


class CutOptions(JobOptions):
    """Build a smaller instance of the model and cut its weights from a file (``prune_model_weight``)."""

    arguments: dict[str, Any] = Field(description="keyword arguments of the model factory that make it smaller")
    weights: Reference | None = Field(None, description="factory of a weight file's path; unset: the present model")
    steps: list[Annotated[str, OneOf(("prune_blocks", "prune_bert_intra_block"))]] = Field(
        default=["prune_blocks"], description="prune_blocks, prune_bert_intra_block"
    )
    pattern: str | None = Field(None, description="regular expression of a block's name; group 1 is its number")
    layers: dict[Annotated[int, BeforeValidator(whole_number)], int] | None = Field(
        None, description="new block number: old block number"
    )
    keep_blocks: PositiveInt | None = Field(
        None, description="instead of layers: how many blocks stay, those that the calibration data needs most"
    )
    selection: Annotated[str, OneOf(("first", "importance"))] = Field(
        "first",
        description="which rows and columns to keep; importance: by activations, where there is calibration data",
    )
    calibration_batches: PositiveInt = Field(8, description="batches of calibration data")

    @property
    def needs_data(self) -> bool:
        return self.keep_blocks is not None

    @model_validator(mode="after")
    def _together(self) -> CutOptions:
        if (self.pattern is None) != (self.layers is None):
            raise PydanticCustomError("together", "pattern and layers must be given together", {"near": ""})
        if self.keep_blocks is not None and self.layers is not None:
            raise PydanticCustomError("either", "keep_blocks and layers are two ways to say one thing", {"near": ""})
        return self

    def functions(self) -> dict[str, tuple[Factory | str, tuple[str, ...]]]:
        return {} if self.weights is None else {"weights": (self.weights, ())}

    def build(self) -> PruneConfig:
        """The configuration of `prune_model_weight`, as far as no model is needed."""
        return self.chosen(self.pattern, self.layers, None)

    def chosen(self, pattern: str | None, layers: Mapping[int, int] | None, activations: Any) -> PruneConfig:
        """The same with the blocks and activations that were measured."""
        from slimkit.core.weights.blocks import PruneConfig

        made = PruneConfig().set_steps(self.steps).set_selection(self.selection, activations)
        if pattern is not None and layers is not None:
            made.add_blocks_params(pattern, layers)
        return made


class SparsifyOptions(JobOptions):
    """Set the weights that matter least to zero and refit the others (``Compressor``)."""

    method: Annotated[str, OneOf("slimkit.core.sparse.config:METHODS")] = Field(
        "par", description="how; all but magnitude read calibration data. Python's SparseConfig: magnitude"
    )
    sparse_ratio: Annotated[Ratio, Flag("--sparsity", old=("--ratio", "-r"))] = Field(
        0.5, description="share of each layer's weights set to zero; a pattern fixes it"
    )
    pattern: str | None = Field(None, description='n:m along input channels, for example "2:4" ("4:2" for Ascend)')
    uniform: Annotated[
        bool | str,
        OneOf("slimkit.core.sparse.config:RULES", switches=True),
        Flag("--uniform", metavar="RULE", old=("--measured-ratios",), stood="measured"),
    ] = Field(
        True,
        description="true: the same ratio in every layer; measured, or false: each gets what its sensitivity allows; "
        "dlp: each block by a median of its weights times input norms, almost for nothing",
    )
    progressive: bool = Field(False, description="reach the ratio in steps")
    residual: bool = Field(False, description="also fit what the residual stream has lost (chains of blocks)")
    swaps: NonNegativeInt = Field(
        0, description="afterwards exchange a kept and a dropped weight of a row, up to so many times, where that helps"
    )
    mantissa_bits: PositiveInt | None = Field(
        None, description="round what stays to floats with so many bits of mantissa, 1 to 10; unset: not"
    )
    outliers: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of what stays that is not rounded: where it would cost most"
    )
    weight_bits: PositiveInt | None = Field(
        None, description="round what stays to whole numbers of so many bits, 2 to 8, by output channel; unset: not"
    )
    targets: Annotated[list[str] | None, Flag("--target", metavar="GLOB")] = Field(
        None, description="globs of layers to sparsify; unset: all"
    )
    ignore: Annotated[list[str] | None, Flag("--ignore", metavar="GLOB")] = Field(
        None, description="globs of layers left dense"
    )
    options: Annotated[dict[str, Any] | None, Flag("--set", metavar="KEY=VALUE")] = Field(
        None, description="options of the method: those of block, or of a registered one of one's own"
    )
    calibration_batches: Annotated[PositiveInt, RECIPE_ONLY] = Field(8, description="batches of calibration data")

    @property
    def needs_data(self) -> bool:
        return self.build().needs_data

    def build(self) -> SparseConfig:
        """The configuration of `Compressor`: every option that it has a field for."""
        from slimkit.core.sparse import SparseConfig

        known = {field.name for field in fields(SparseConfig)}
        given = {key: getattr(self, key) for key in type(self).model_fields if key in known}
        return SparseConfig(**{key: value for key, value in given.items() if value is not None})


class ExportOptions(JobOptions):
    """Write the model as files that other programs run, each proven against it (``export_onnx``, ``export_mindir``)."""

    opset: PositiveInt = Field(13, description="ONNX opset; 13 suits Ascend's ATC")
    dynamic_batch: bool = Field(False, description="leave the batch size open")
    dynamic: Annotated[list[str] | None, Flag("--dynamic", metavar="[INPUT=]AXIS:NAME,...")] = Field(
        None,
        description="leave axes open, proven at a second size: 0:batch,1:sequence, or input_ids=1:sequence",
    )
    tolerance: PositiveFloat = Field(1e-4, description="largest difference accepted between file and model")
    compare_dense: Annotated[bool, RECIPE_ONLY] = Field(
        True, description="also export the dense model and measure the latency ratio"
    )
    ranges: Annotated[str, OneOf(("minmax", "percentile"))] = Field(
        "minmax", description="w8a8s: inputs lie between all that calibration shows, or all but a ten-thousandth"
    )
    most_error: Annotated[float, Field(ge=0)] = Field(
        0.1, description="w8a8s: a layer whose answers change by a larger share from rounded inputs stays float16"
    )
    formats: Annotated[
        Annotated[list[Annotated[str, OneOf(("onnx", "mindir", "w8a8s"))]], Field(min_length=1)] | None, RECIPE_ONLY
    ] = Field(None, description="which files; unset: onnx, and mindir too in MindSpore; w8a8s is a folder")

    def build(self, format: str = "onnx") -> dict[str, Any]:
        """The arguments of `JobFramework.export` for a format."""
        from slimkit.core.onnxaxes import parse_axes

        if format == "w8a8s":
            return {key: getattr(self, key) for key in W8A8S}
        keys = ("opset", "dynamic_batch", "tolerance")
        return {**{key: getattr(self, key) for key in keys}, "dynamic": parse_axes(self.dynamic or [])}


class CompareOptions(JobOptions):
    """Judge smaller models against a dense one on held-out data (``compare_models``)."""

    task: Annotated[str, OneOf("slimkit.core.compare:TASKS")] = Field(
        "language", description="language: next tokens of texts; encoder: outputs; classifier: outputs and labels"
    )
    length: PositiveInt = Field(512, description="tokens a window of text; the stride is the same")
    bos: Annotated[bool, Flag("--bos", sets=True, help="begin each window with the BOS token")] = Field(
        False, description="begin each window with the tokenizer's beginning-of-sequence token"
    )
    top_k: PositiveInt | None = Field(
        256,
        description="KL over so many of the dense model's likeliest tokens, one model in memory at a time; "
        "Python's compare_models, given models and not functions: exact",
    )
    exact: Annotated[bool, Flag("--exact", sets=True, help="the exact KL; all models are in memory at once")] = Field(
        False, description="the exact KL; all models are in memory at once"
    )
    metrics: Annotated[list[str] | None, Flag("--metric", metavar="MODULE:FUNCTION")] = Field(
        None, description="further figures: f(model, dataset)"
    )
    speed: Annotated[bool, Flag("--no-speed", sets=False, help="do not measure speed")] = Field(
        True, description="measure prefill and decode speed, all models in turn"
    )

    def build(self) -> Any:
        """The options of `judge`, seed apart."""
        from slimkit.core.compare.judge import JudgeOptions

        top_k = None if self.exact else self.top_k
        return JudgeOptions(task=self.task, length=self.length, bos=self.bos, top_k=top_k, speed=self.speed)

    def functions(self) -> dict[str, tuple[Factory | str, tuple[str, ...]]]:
        return {f"metrics[{n}]": (name, ("model", "dataset")) for n, name in enumerate(self.metrics or ())}


class CalibrateOptions(Strict):
    """Calibration windows of text, by the tokenizer of the recipe (``calibration``)."""

    text: str | list[str] = Field(
        description="a file or several: .jsonl, .txt, .parquet; FILE=WEIGHT shares windows out"
    )
    samples: PositiveInt = Field(128, description="windows")
    length: PositiveInt = Field(512, description="tokens a window")
    batch_size: PositiveInt = Field(4, description="windows in a batch")
    text_key: str = Field("text", description="key or column of the text")

    @property
    def files(self) -> list[str]:
        """The files, each with its weight behind it where it has one."""
        return [self.text] if isinstance(self.text, str) else self.text


class EvaluateOptions(Strict):
    """Held-out text that a language model is judged on after each stage (``compare_models``)."""

    text: str | None = Field(None, description="a file: .jsonl, .txt, .parquet, read by the recipe's tokenizer")
    data: str | None = Field(None, description="instead of text: a key of the data, rows of token numbers")
    documents: PositiveInt = Field(32, description="at most so many of them, from all over the file")
    length: PositiveInt = Field(512, description="tokens a window; the stride is the same")
    windows: PositiveInt | None = Field(None, description="of each document at most so many windows; unset: all")
    bos: bool = Field(False, description="begin each window with the tokenizer's beginning-of-sequence token")
    text_key: str = Field("text", description="key or column of the text")

    @model_validator(mode="after")
    def _one(self) -> EvaluateOptions:
        if (self.text is None) == (self.data is None):
            raise PydanticCustomError("one", "give text or data, and not both", {"near": ""})
        return self


__all__ = [
    "JOBS",
    "AdaptOptions",
    "CalibrateOptions",
    "CompareOptions",
    "CutOptions",
    "DistillOptions",
    "DistillTerm",
    "EvaluateOptions",
    "ExportOptions",
    "FitOptions",
    "JobOptions",
    "PruneOptions",
    "SparsifyOptions",
    "TrainOptions",
]  # fmt: skip

# job -> its options; a recipe's stage has the job's name, and finetune is train under another one
JOBS: dict[str, type[JobOptions]] = {
    "train": TrainOptions,
    "finetune": TrainOptions,
    "prune": PruneOptions,
    "cut": CutOptions,
    "distill": DistillOptions,
    "sparsify": SparsifyOptions,
    "adapt": AdaptOptions,
    "export": ExportOptions,
    "compare": CompareOptions,
}
