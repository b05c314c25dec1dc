"""The options that commands alone take and no recipe has a stage for: sizes of a student, a small delta of a model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt

from slimkit.core.jobs.fields import Flag, OneOf, each_block, numbers_of
from slimkit.core.jobs.training_options import JobOptions


class StudentOptions(JobOptions):
    """What the command `distill` alone takes: a student's sizes (``make_student``) and how its teacher is asked."""

    layers: PositiveInt | None = Field(
        None, description="how many blocks stay: those that the data needs most (block influence)"
    )
    layer_map: Annotated[Annotated[str, AfterValidator(each_block)] | None, Flag("--layer-map", metavar="BLOCKS")] = (
        Field(None, description="the blocks that stay, by number, such as 0-9,12,20-29; unset: by the data")
    )
    ffn: PositiveInt | None = Field(None, description="width of the feed-forward")
    heads: PositiveInt | None = Field(None, description="attention heads")
    hidden: PositiveInt | None = Field(None, description="hidden width")
    selection: Annotated[str, OneOf(("importance", "first"))] = Field(
        "importance", description="which rows and columns stay: importance (by the data's activations) or first"
    )

    teacher: Annotated[str, OneOf(("auto", "online", "cached"))] = Field(
        "auto",
        description="online: the teacher runs at every step; cached: once, and 64 classes of each row are kept, "
        "drawn without bias; auto: cached where only logits are compared and samples are seen twice or more",
    )

    def sizes(self) -> dict[str, int]:
        """The sizes that change."""
        named = {"layers": self.layers, "ffn": self.ffn, "heads": self.heads, "hidden": self.hidden}
        return {key: value for key, value in named.items() if value is not None}

    def blocks(self) -> tuple[int, ...] | None:
        """The blocks of `layer_map`."""
        return None if self.layer_map is None else numbers_of(self.layer_map)


class CompressOptions(JobOptions):
    """What a fully fine-tuned model has learned since its base, as a small delta (``compress_delta``)."""

    kind: Annotated[str, OneOf(("bits", "low_rank"))] = Field(
        "bits",
        description="what the delta holds of each weight: bits (a sign of every entry, a scale a row, and a low rank) "
        "or low_rank (a LoRA, which PEFT reads too)",
    )
    bytes_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.09, description="share of a weight's bytes in bfloat16 that its delta may take; bits takes 1/16 at least"
    )
    rank: PositiveInt | None = Field(None, description="rank of the low rank; unset: what bytes_ratio leaves for it")
    exclude: Annotated[list[str] | None, Flag("--exclude", metavar="GLOB")] = Field(
        None, description="globs of layers that travel whole, such as a classifier's head"
    )

    def arguments(self) -> dict[str, Any]:
        """The arguments of `compress_delta`, as plain values."""
        return {key: getattr(self, key) for key in type(self).model_fields}


# The rows of the tables of documentation.
COMMAND_JOBS: dict[str, type[JobOptions]] = {"student": StudentOptions, "compress": CompressOptions}
