"""What to distil: the fluent configuration, the frozen specification it becomes, and the checks both wings share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ConfigError
from slimkit.core.showing import Shown

Index = int | str | tuple[int | str, ...] | None

# name -> (what it compares, whether a temperature means something, parameters it takes)
LOSSES: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "KDCrossEntropy": ("logits", True, ()),
    "KDMse": ("logits", True, ()),
    "KDKLDiv": ("logits", True, ()),
    "HardKDCrossEntropy": ("logits", False, ()),
    "HiddenMse": ("hidden", False, ()),
    "HiddenRelative": ("hidden", False, ()),
    "HiddenCosine": ("hidden", False, ()),
    "MMD": ("relation", False, ("batch_size",)),
    "AttentionMse": ("attention", False, ()),
    "Relation": ("relation", True, ("n_heads",)),
}
SIDES = ("output", "input")
POOLS = ("mean", "first")


@dataclass(frozen=True)
class LossTerm:
    """One loss between two tensors.

    Args:
        func_name: a name of LOSSES, or a custom one.
        func_weight: its factor in the soft loss.
        temperature: logits (Relation: scores) are divided by it first.
        func_param: MMD: [batch_size] of flattened states; Relation: [number of relation heads].
        t_squared: multiply by temperature squared, which keeps gradients of one size (Hinton et al. 2015, sec. 2).
    """

    func_name: str
    func_weight: float
    temperature: float = 1.0
    func_param: tuple[Any, ...] = ()
    t_squared: bool = False

    @property
    def factor(self) -> float:
        """What the loss is multiplied by."""
        return self.func_weight * (self.temperature**2 if self.t_squared else 1.0)


@dataclass(frozen=True)
class Reading:
    """Where one tensor of a soft label is read; the names are SoftLabel's without the role."""

    module: str | None
    index: Index
    side: str


@dataclass(frozen=True)
class SoftLabel:
    """A tensor of the teacher, a tensor of the student, and the losses between them.

    Args:
        t_module, s_module: dotted module paths; None is the whole model.
        t_output_idx, s_output_idx: which output: a position, a key, a path of both, or None for the only one.
        losses: the terms.
        t_side, s_side: "output", or "input" for what the module was called with.
        mask: the forward argument (name or position) that is 1 on real positions and 0 on padding.
        pool: "mean" over axis 1 (the masked positions left out) or "first" position, before the losses.
        widths: (student's, teacher's) last axis, when they differ and no example batch can show.
        shape: the teacher tensor's shape without the batch; checked when given.
        label: how messages and logs call it.
    """

    t_module: str | None
    s_module: str | None
    t_output_idx: Index
    s_output_idx: Index
    losses: tuple[LossTerm, ...]
    t_side: str
    s_side: str
    mask: str | int | None
    pool: str | None
    widths: tuple[int, int] | None
    shape: tuple[int, ...] | None
    label: str

    def read(self, role: str) -> Reading:
        """Where the teacher's ("t") or the student's ("s") tensor is read."""
        if role == "t":
            return Reading(self.t_module, self.t_output_idx, self.t_side)
        return Reading(self.s_module, self.s_output_idx, self.s_side)


@dataclass(frozen=True)
class DistillSpec:
    """A checked distillation: the soft labels, the hard label's weight and place, and whether the teacher trains."""

    soft_labels: tuple[SoftLabel, ...]
    hard_weight: float | None
    hard_index: int | str
    teacher_trains: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for reports."""
        return asdict(self)


class KnowledgeDistillConfig(Shown):
    """Say which tensors of teacher and student to compare, and how; every setter checks and returns the configuration.

    Example:
        >>> config = KnowledgeDistillConfig().set_hard_label(0.5, 0).add_output_soft_label({
        ...     "t_output_idx": 0, "s_output_idx": 0,
        ...     "loss_func": [{"func_name": "KDCrossEntropy", "func_weight": 1, "temperature": 2}]})
        >>> config.spec(()).soft_labels[0].losses[0].temperature
        2.0
    """

    def __init__(self) -> None:
        self._labels: list[SoftLabel] = []
        self._hard: tuple[float, int | str] | None = None
        self._teacher_trains = False
        self._custom: dict[str, Any] = {}

    def _rows(self) -> Iterator[tuple[str, Any]]:
        for label in self._labels:
            where = f"{label.t_module} and {label.s_module}" if label.t_module else "outputs"
            yield where, ", ".join(f"{term.func_weight:g} {term.func_name}" for term in label.losses)
        yield "hard label", f"{self._hard[0]:g}" if self._hard else None
        yield "teacher trains", self._teacher_trains

    def set_teacher_train(self) -> KnowledgeDistillConfig:
        """Let the teacher train too: it keeps its mode and its gradients, and moves with the distillation model."""
        self._teacher_trains = True
        return self

    def set_hard_label(self, weight: float, index: int | str = 0) -> KnowledgeDistillConfig:
        """Mix in the loss on true labels: total = weight * hard + (1 - weight) * soft.

        Args:
            weight: in (0, 1).
            index: MindSpore: which output of the student is its own loss. PyTorch: unused, `get_total_loss` gets it.
        """
        weight = check.ratio(weight, "weight")
        if not isinstance(index, str):
            check.integer(index, "index", minimum=0)
        self._hard = (weight, index)
        return self

    def add_inter_soft_label(self, config: Mapping[str, Any]) -> KnowledgeDistillConfig:
        """Compare a module inside the teacher with one inside the student.

        Args:
            config: t_module, s_module (dotted paths), t_output_idx, s_output_idx (position, key, list of both, None),
                loss_func (list of {func_name, func_weight, temperature=1, func_param=[], t_squared=False}); optional:
                t_side, s_side ("output" or "input"), mask (forward argument), pool ("mean" or "first"), widths
                ([student's, teacher's]), shape (teacher's, without the batch).

        Raises:
            ConfigError: a key is missing or unknown, or a value is not allowed.
            ArgumentTypeError: a value of another type.
        """
        self._labels.append(_soft_label(config, inner=True))
        return self

    def add_output_soft_label(self, config: Mapping[str, Any]) -> KnowledgeDistillConfig:
        """Compare the outputs of teacher and student; the same keys without modules."""
        self._labels.append(_soft_label(config, inner=False))
        return self

    def add_custom_loss_func(self, name: str, instance: Any) -> KnowledgeDistillConfig:
        """Offer a loss under a name of your own: a module called as loss(student, teacher), trained with the student.

        Args:
            name: not one of the built-in names.
            instance: an nn.Module (PyTorch) or nn.Cell (MindSpore); it also gets `temperature` when that is not 1, and
                `mask` when one is configured.
        """
        check.text(name, "name")
        if name in LOSSES:
            raise ConfigError(f"name must not be a built-in loss. Received: {name!r}")
        if isinstance(instance, type) or not {"Module", "Cell"} & {k.__name__ for k in type(instance).__mro__}:
            check.wrong_type("instance", "a torch.nn.Module or a mindspore.nn.Cell", instance)
        self._custom[name] = instance
        return self

    @property
    def custom_losses(self) -> dict[str, Any]:
        """The custom losses by name."""
        return dict(self._custom)

    def spec(self, custom: Sequence[str] | None = None) -> DistillSpec:
        """The frozen specification.

        Args:
            custom: names of custom losses; None: those added here.

        Raises:
            ConfigError: no soft label, or a loss nobody defined.
        """
        if not self._labels:
            raise ConfigError("config must hold a soft label: call add_inter_soft_label or add_output_soft_label")
        known = [*LOSSES, *(self._custom if custom is None else custom)]
        names: dict[str, int] = {}
        labels = []
        for label in self._labels:
            for term in label.losses:
                if term.func_name not in known:
                    near = check.near(term.func_name, known)
                    raise ConfigError(f"func_name must be one of {known}. Received: {term.func_name!r}{near}")
            names[label.label] = count = names.get(label.label, 0) + 1
            labels.append(label if count == 1 else _renamed(label, f"{label.label}#{count}"))
        weight, index = self._hard or (None, 0)
        return DistillSpec(tuple(labels), weight, index, self._teacher_trains)


def _renamed(label: SoftLabel, name: str) -> SoftLabel:
    return SoftLabel(**{**vars(label), "label": name})


_COMMON = ("t_output_idx", "s_output_idx", "loss_func")
_OPTIONAL = ("t_side", "s_side", "mask", "pool", "widths", "shape")
_TERM = ("func_name", "func_weight", "temperature", "func_param", "t_squared")


def _keys(config: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], name: str) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        check.wrong_type(name, "a dict", config)
    for key in config:
        if key not in (*needed, *optional):
            raise ConfigError(f"{name} has no key {key!r}{check.near(key, [*needed, *optional])}")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ConfigError(f"{name} must hold the keys {', '.join(needed)}. Missing: {', '.join(missing)}")
    return copy.deepcopy(dict(config))


def _soft_label(config: Mapping[str, Any], *, inner: bool) -> SoftLabel:
    modules = ("t_module", "s_module") if inner else ()
    given = _keys(config, (*modules, *_COMMON), _OPTIONAL, "config")
    for key in modules:
        check.text(given[key], f"config[{key!r}]")
    for key in ("t_output_idx", "s_output_idx"):
        given[key] = _index(given[key], f"config[{key!r}]")
    for key in ("t_side", "s_side"):
        given[key] = check.choice(given.get(key, "output"), SIDES, f"config[{key!r}]")
        if given[key] == "input" and not inner:
            raise ConfigError(f"config[{key!r}]: only inner modules can be compared by their inputs")
    mask, pool = given.get("mask"), given.get("pool")
    if mask is not None and not isinstance(mask, str):
        check.integer(mask, "config['mask']", minimum=0)
    if pool is not None:
        check.choice(pool, POOLS, "config['pool']")
    terms = given["loss_func"]
    if not isinstance(terms, (list, tuple)) or not terms:
        check.wrong_type("config['loss_func']", "a non-empty list of dicts", terms)
    label = given["s_module"] if inner else "output"
    if not inner and given["s_output_idx"] not in (0, None):
        place = given["s_output_idx"]
        label = "output[" + (".".join(map(str, place)) if isinstance(place, tuple) else str(place)) + "]"
    widths, shape = given.get("widths"), given.get("shape")
    if widths is not None and len(_sizes(widths, "config['widths']")) != 2:
        check.wrong_value("config['widths']", "[student's width, teacher's width]", widths)
    return SoftLabel(
        t_module=given.get("t_module"),
        s_module=given.get("s_module"),
        t_output_idx=given["t_output_idx"],
        s_output_idx=given["s_output_idx"],
        losses=tuple(_term(term) for term in terms),
        t_side=given["t_side"],
        s_side=given["s_side"],
        mask=mask,
        pool=pool,
        widths=None if widths is None else (widths[0], widths[1]),
        shape=None if shape is None else _sizes(shape, "config['shape']"),
        label=label,
    )


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        check.wrong_type(name, "a non-empty list of int", value)
    return tuple(check.positive(v, name) for v in value)


def _index(value: Any, name: str) -> Index:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value:
        return tuple(v if isinstance(v, str) else check.integer(v, name) for v in value)
    return check.integer(value, name, minimum=0)


def _term(config: Any) -> LossTerm:
    given = _keys(config, ("func_name", "func_weight"), _TERM[2:], "loss_func")
    name = check.text(given["func_name"], "func_name")
    weight = check.number(given["func_weight"], "func_weight")
    if weight <= 0:
        check.wrong_value("func_weight", "a number above 0", weight)
    temperature = given.get("temperature")
    temperature = 1.0 if temperature is None else check.number(temperature, "temperature")
    if temperature <= 0:
        check.wrong_value("temperature", "a number above 0", temperature)
    parameters = given.get("func_param") or []
    if not isinstance(parameters, (list, tuple)):
        check.wrong_type("func_param", "a list", parameters)
    if name in LOSSES:
        _, tempered, takes = LOSSES[name]
        if temperature != 1 and not tempered:
            raise ConfigError(f"{name} knows no temperature. Received: {temperature}")
        if len(parameters) > len(takes):
            raise ConfigError(f"{name} takes func_param {list(takes)}. Received: {list(parameters)}")
        for value, what in zip(parameters, takes):
            check.positive(value, what)
    squared = check.boolean(given.get("t_squared", False), "t_squared")
    return LossTerm(name, float(weight), float(temperature), tuple(parameters), squared)
