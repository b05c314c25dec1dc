"""The options of the jobs that train: what all share, and those of train, distill and adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from slimkit.core.errors import ConfigError
from slimkit.core.jobs.factory import LOSS_NAMES, Factory, LossReference
from slimkit.core.jobs.fields import RECIPE_ONLY, Flag, OneOf, Strict
from slimkit.core.log import logger

if TYPE_CHECKING:
    from slimkit.core.distill.config import KnowledgeDistillConfig


def _pair(text: str) -> str:
    theirs, _, mine = text.partition("=")
    if not theirs or not mine:
        raise PydanticCustomError("pair", "must be TEACHER=STUDENT, two layers by their paths")
    return text


Pair = Annotated[str, AfterValidator(_pair)]


class JobOptions(Strict):
    """What every job's options answer, so that whoever checks them need not know the job."""

    @property
    def needs_data(self) -> bool:
        """Whether the job reads calibration data."""
        return False

    @property
    def labelled(self) -> bool:
        """Whether the job reads (inputs, labels)."""
        return False

    def build(self) -> Any:
        """Build the job's configuration, as far as no model is needed; a SlimkitError says what is not allowed."""

    def functions(self) -> dict[str, tuple[Factory | str, tuple[str, ...]]]:
        """The user's functions among the options: key -> the function, and what it will be called with."""
        return {}


class FitOptions(JobOptions):
    """How parameters are trained, by every job that trains."""

    epochs: PositiveInt = Field(1, description="passes over the training data")
    learning_rate: Annotated[PositiveFloat, Flag("--learning-rate", old=("--lr",))] = Field(
        description="peak learning rate"
    )
    batch_size: PositiveInt = Field(
        16, description="samples per update, of all processes together; ready batches keep their own size"
    )
    optimizer: Annotated[str, OneOf(("adamw", "sgd"))] = Field("adamw", description="adamw, or sgd with momentum 0.9")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    schedule: Annotated[str, OneOf(("cosine", "linear", "constant"))] = Field(
        "cosine", description="of the learning rate: cosine or linear down to zero, or constant"
    )
    warmup: int = Field(0, ge=0, description="updates until the full learning rate")
    max_steps: PositiveInt | None = Field(None, description="bound on the updates; unset: none")
    gradient_clip_norm: float | None = Field(
        1.0, ge=0, description="bound on the norm of all gradients together; 0: none"
    )
    gradient_clip_value: PositiveFloat | None = Field(None, description="bound on each gradient entry; unset: none")
    loss: Annotated[LossReference | None, Flag("--loss", metavar="NAME|MODULE:FUNCTION")] = Field(
        None,
        description="cross_entropy, mse, or file.py:function f(model, batch), batch being (inputs, labels); unset: the "
        "recipe's, for a command by the labels' type (integers are classes)",
    )

    @property
    def labelled(self) -> bool:
        return True

    def functions(self) -> dict[str, tuple[Factory | str, tuple[str, ...]]]:
        if self.loss is None or self.loss in LOSS_NAMES:
            return {}
        return {"loss": (self.loss, ("model", "batch"))}

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "gradient_clip" not in given:
            return given
        if "gradient_clip_value" in given:
            raise PydanticCustomError("twice", "gradient_clip is the old name of gradient_clip_value; both are given")
        logger.warning("gradient_clip is the old name of gradient_clip_value, which bounds each entry")
        rest = {key: value for key, value in given.items() if key != "gradient_clip"}
        # A recipe that says how it clips does not want another bound beside it.
        return {"gradient_clip_norm": None, **rest, "gradient_clip_value": given["gradient_clip"]}


class TrainOptions(FitOptions):
    """Train (or fine-tune) all parameters."""

    learning_rate: Annotated[PositiveFloat, Flag("--learning-rate", old=("--lr",))] = Field(
        1e-3, description="peak learning rate"
    )
    batch_size: PositiveInt = Field(64, description="samples per update; ready batches keep their own size")
    gradient_clip_norm: float | None = Field(
        None, ge=0, description="bound on the norm of all gradients together; unset or 0: none"
    )
    keep_zeros: bool = Field(False, description="weights that are zero stay zero (after sparsify)")


class DistillTerm(Strict):
    """One comparison of student and teacher."""

    teacher: str | int = Field(description="module path, or output index or key")
    student: str | int = Field(description="module path, or output index or key")
    loss: Annotated[str, OneOf("slimkit.core.distill.config:LOSSES")] = Field(description="name of the loss")
    weight: PositiveFloat = Field(1.0, description="factor of this term")
    temperature: PositiveFloat = Field(1.0, description="softening of logits")

    def written(self) -> dict[str, Any]:
        """The term as `KnowledgeDistillConfig` takes it."""
        return {"func_name": self.loss, "func_weight": self.weight, "temperature": self.temperature}


class DistillOptions(FitOptions):
    """Train the model to answer as the dense model does (``get_distill_model``)."""

    learning_rate: Annotated[PositiveFloat, Flag("--learning-rate", old=("--lr",))] = Field(
        2e-4, description="peak learning rate"
    )
    hidden: Annotated[list[DistillTerm], RECIPE_ONLY] = Field(
        default_factory=list, description="inner modules to compare, written out as terms"
    )
    outputs: Annotated[list[DistillTerm], RECIPE_ONLY] = Field(
        default_factory=list, description="outputs to compare, written out as terms"
    )
    match: Annotated[list[Pair] | None, Flag("--match", metavar="TEACHER=STUDENT")] = Field(
        None, description="without terms: pairs of layers whose outputs are compared, TEACHER=STUDENT by their paths"
    )
    temperature: PositiveFloat | None = Field(
        None, description="without terms: softening of logits; unset: 2, for a language model 1"
    )
    hidden_weight: float | None = Field(
        None,
        ge=0,
        description="without terms: weight of all pairs of layers together; unset: 1, of a language model 0",
    )
    output_weight: float = Field(1.0, ge=0, description="without terms: weight of the outputs' term")
    output_loss: Annotated[str, OneOf("slimkit.core.distill.config:LOSSES", first=("auto",))] = Field(
        "auto",
        description="without terms: the outputs' loss; auto: KDKLDiv where the answer is (samples, classes), else "
        "HiddenMse",
    )
    hard_weight: float = Field(0.0, ge=0, description="weight of the loss on labels beside the teacher's")

    @model_validator(mode="after")
    def _one_form(self) -> DistillOptions:
        short = {"match", "temperature", "hidden_weight", "output_weight", "output_loss"} & self.changed()
        if short and (self.hidden or self.outputs):
            raise PydanticCustomError(
                "one_form", "{short} is for a stage without written terms", {"short": ", ".join(sorted(short))}
            )
        return self

    @property
    def labelled(self) -> bool:
        return bool(self.hard_weight)

    def functions(self) -> dict[str, tuple[Factory | str, tuple[str, ...]]]:
        return super().functions() if self.hard_weight else {}

    def build(self) -> KnowledgeDistillConfig:
        """What is compared, whatever the answers' shape will be."""
        return self.comparison(lambda: (2, 2))

    @property
    def warmth(self) -> float:
        """The temperature of classes."""
        return 2.0 if self.temperature is None else self.temperature

    def comparison(
        self,
        shape: Callable[[], Sequence[int]],
        mask: Callable[[Any, Any, str], str | None] = lambda path, index, loss: None,
    ) -> KnowledgeDistillConfig:
        """What is compared: the terms that were written out, or outputs against outputs and each pair of layers.

        Args:
            shape: gives that of the teacher's answer, where it has to choose the loss.
            mask: f(layer of the teacher or None, output's index, loss) -> the argument that says which rows count.

        Raises:
            ConfigError: nothing is compared.
        """
        from slimkit.core.distill.config import LOSSES, KnowledgeDistillConfig

        config = KnowledgeDistillConfig()

        def add_inner(theirs: Any, mine: Any, term: dict[str, Any]) -> None:
            places = {"t_module": theirs, "s_module": mine, "t_output_idx": 0, "s_output_idx": 0}
            config.add_inter_soft_label({**places, "loss_func": [term], "mask": mask(theirs, 0, term["func_name"])})

        for term in self.hidden:
            add_inner(term.teacher, term.student, term.written())
        for term in self.outputs:
            outputs = {"t_output_idx": term.teacher, "s_output_idx": term.student}
            config.add_output_soft_label(
                {**outputs, "loss_func": [term.written()], "mask": mask(None, term.teacher, term.loss)}
            )
        if self.hidden or self.outputs:
            return config
        weight = 1.0 if self.hidden_weight is None else self.hidden_weight
        pairs = self.pairs() if weight else []
        if not self.output_weight and not pairs:
            raise ConfigError("output_weight is 0 and no pair of match is weighed: there is nothing to learn from")
        if self.output_weight:
            name = self.output_loss
            if name == "auto":
                name = "KDKLDiv" if len(shape()) == 2 and shape()[1] > 1 else "HiddenMse"
            made: dict[str, Any] = {"func_name": name, "func_weight": self.output_weight}
            if LOSSES[name][1]:
                made |= {"temperature": self.warmth, "t_squared": True}
            outputs = {"t_output_idx": 0, "s_output_idx": 0}
            config.add_output_soft_label({**outputs, "loss_func": [made], "mask": mask(None, 0, name)})
        for theirs, mine in pairs:
            add_inner(theirs, mine, {"func_name": "HiddenRelative", "func_weight": weight / len(pairs)})
        return config

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of `match`, the teacher's layer first."""
        return [(text.partition("=")[0], text.partition("=")[2]) for text in self.match or ()]


class AdaptOptions(FitOptions):
    """Freeze the model and train a small delta on top (``apply_delta``)."""

    learning_rate: Annotated[PositiveFloat, Flag("--learning-rate", old=("--lr",))] = Field(
        5e-4, description="peak learning rate"
    )
    kind: Annotated[str, OneOf("slimkit.core.delta.spec:KINDS")] = Field("lora", description="delta kind")
    targets: Annotated[list[str] | None, Flag("--target", metavar="GLOB")] = Field(
        None, description="globs of the layers that get a delta; unset: the kind's own (lora: all linear ones)"
    )
    exclude: Annotated[list[str] | None, Flag("--exclude", metavar="GLOB")] = Field(
        None, description="globs of targets left alone"
    )
    also_train: Annotated[list[str] | None, Flag("--also-train", metavar="GLOB")] = Field(
        None, description="globs of the model's own parameters that train whole and travel with the delta"
    )
    rank: PositiveInt | None = Field(
        None, description="rank of the update; unset: the kind's own (lora, shira: 8; miss: 16)"
    )
    alpha: PositiveFloat | None = Field(None, description="a LoRA is scaled by alpha / rank; unset: twice the rank")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout before the delta; unset: none")
    settings: Annotated[dict[str, Any], Flag("--set", metavar="KEY=VALUE")] = Field(
        default_factory=dict, description="other options of the kind, such as init: gradient or bottleneck_size: 32"
    )
    rdrop: float = Field(
        0.0,
        ge=0,
        description="R-Drop: each batch goes through dropout twice, and this is the weight of the two answers' "
        "divergence; 0: once. Classes and cross_entropy only",
    )
    distill_weight: Annotated[float, RECIPE_ONLY] = Field(
        0.0, ge=0, description="weight of the dense model's answers beside the loss on labels; 0: they are not asked"
    )
    temperature: Annotated[PositiveFloat | None, RECIPE_ONLY] = Field(
        None, description="softening of the dense model's logits, as for distill; unset: 2, for a language model 1"
    )

    @model_validator(mode="after")
    def _of_the_kind(self) -> AdaptOptions:
        from slimkit.core import check
        from slimkit.core.delta.spec import OPTIONS

        known = OPTIONS[self.kind]
        for key in self.settings:
            if key not in known:
                raise PydanticCustomError(
                    "option_of_kind",
                    "settings: {key} is no option of {kind}, which takes {known}",
                    {"key": key, "kind": self.kind, "known": ", ".join(known), "near": check.near(key, known)},
                )
        if left_out := [key for key in self._named() if key not in known]:
            logger.warning("%s: not for kind %s, which takes %s", ", ".join(left_out), self.kind, ", ".join(known))
        return self

    def _named(self) -> dict[str, Any]:
        named = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        return {key: value for key, value in named.items() if value is not None}

    def of_kind(self) -> dict[str, Any]:
        """The options of the kind that were given, for `apply_delta`."""
        from slimkit.core.delta.spec import OPTIONS

        known = OPTIONS[self.kind]
        return {key: value for key, value in self._named().items() if key in known} | self.settings

    def build(self) -> Any:
        """What the kind can build without a layer, or at least the check of its options."""
        from slimkit.core import check
        from slimkit.core.delta import layers, opening, prefix, prompt
        from slimkit.core.delta.layered import SPECS

        given = {key: value for key, value in self.of_kind().items() if value is not None}
        if self.kind in SPECS and self.kind != "ia3":  # whose one option is about layers
            known = {field.name for field in fields(SPECS[self.kind])}
            return SPECS[self.kind](**{key: value for key, value in given.items() if key in known})
        if self.kind in ("prefix", "prompt"):
            # The text is read by the tokenizer, which is there when the job runs.
            given.pop("tokenizer", None)
            if "text" in given:
                opening.refuse_several(given.get("init"), given["text"], given.get("text_ids"))
                check.text(given.pop("text"), "text")
            return (prefix if self.kind == "prefix" else prompt).checked(**given)
        for key in {"bottleneck_size", "reduction_factor", "low_rank_size"} & set(given):
            layers.size(given[key], key)
        if "non_linearity" in given:
            layers.activation_name(given["non_linearity"], "non_linearity")
        return None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `apply_delta`, as plain values."""
        named = {"exclude": self.exclude, "also_train": self.also_train}
        given = {key: value for key, value in named.items() if value is not None}
        return {"kind": self.kind, "targets": self.targets, **given, **self.of_kind()}
