"""Teacher and student as one cell to train: construct gives the total loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from slimkit.core import check
from slimkit.core.distill.config import DistillSpec, KnowledgeDistillConfig
from slimkit.core.distill.joined import JoinedModels, check_pair
from slimkit.core.distill.masks import holds_labels
from slimkit.core.distill.shapes import check_mask, check_shapes, pick, projection_values
from slimkit.core.errors import ConfigError
from slimkit_ms import bridge
from slimkit_ms.distill import taps
from slimkit_ms.distill.losses import Terms
from slimkit_ms.distill.taps import choose, width_of

import mindspore as ms
from mindspore import nn, ops


class DistillDualModels(nn.Cell, JoinedModels):
    """A student that learns from a teacher; made by `get_distill_model`.

    `trainable_params()` holds the student's parameters, the projections between unequal widths and custom losses'. The
    teacher stays in eval mode and gets no gradient, unless the configuration lets it train.

    Args:
        teacher: any cell.
        student: the cell to train.
        spec: what to compare.
        custom: custom losses by name.
    """

    _made = False

    def __init__(
        self, teacher: Any, student: nn.Cell, spec: DistillSpec, custom: Mapping[str, nn.Cell] | None = None
    ) -> None:
        super().__init__(auto_prefix=False)
        self.teacher_model = teacher
        self.student_model = student
        self.spec = spec
        self.trains_teacher = spec.teacher_trains
        self.cached = not isinstance(teacher, nn.Cell)
        self.custom_losses = nn.CellList(list((custom or {}).values()), auto_prefix=False)
        self.custom_names = tuple(custom or {})
        self.terms = nn.CellList([Terms(label, dict(custom or {})) for label in spec.soft_labels], auto_prefix=False)
        self.hard = spec.hard_weight is not None
        self.hard_weight = float(spec.hard_weight or 0.0)
        self.hard_index = spec.hard_index
        # (place, is inner, student's index, teacher's index, position of the mask argument)
        self._argument_names = list(inspect.signature(student.construct).parameters)
        self.plan = tuple(
            (place, label.t_module is not None, label.s_output_idx, label.t_output_idx, self._mask_place(label))
            for place, label in enumerate(spec.soft_labels)
        )
        self._names = [[f"{label.label}/{term.func_name}" for term in label.losses] for label in spec.soft_labels]
        self.inner = any(label.t_module is not None for label in spec.soft_labels)
        self.in_graph = False
        self.unready = False  # attached for a graph whose shapes are not known yet
        self.entered = False  # whether Python runs the forward, rather than a compiler reading it
        self._attached = False
        self._ready = False
        self._wrapped: list[tuple[nn.Cell, str, nn.Cell]] = []
        self._seen: dict[str, dict[int, ms.Tensor]] = {"t": {}, "s": {}}
        none = [
            ms.Parameter(ops.zeros((1, 1), ms.float32), name=f"distill.unused{i}", requires_grad=False)
            for i in range(len(spec.soft_labels))
        ]
        self.projections = ms.ParameterTuple(none)
        self.values = ms.ParameterTuple(
            [
                ms.Parameter(
                    ops.zeros((len(label.losses),), ms.float32), name=f"distill.{i}.values", requires_grad=False
                )
                for i, label in enumerate(spec.soft_labels)
            ]
        )
        # What the graph multiplies an inner label's gradient with: the soft share, times a loss scale.
        self.soft_share = 1.0 - self.hard_weight if self.hard else 1.0
        self.inner_factor = ms.Parameter(
            ms.Tensor(self.soft_share, ms.float32), name="distill.factor", requires_grad=False
        )
        for place, label in enumerate(spec.soft_labels):
            if label.widths is not None and label.widths[0] != label.widths[1]:
                self._project(place, *label.widths)
        for path in taps.children(spec.soft_labels, "s"):
            taps.find(student, path, "s_module")
        if not self.cached:
            for path in taps.children(spec.soft_labels, "t"):
                taps.find(teacher, path, "t_module")
            if not spec.teacher_trains:
                teacher.set_train(False)
        self._memories: list[Any] = [None] * len(spec.soft_labels)
        self._attach()
        self._made = True

    @property
    def losses(self) -> dict[str, float]:
        """The value of every term in the last forward, without its weight."""
        found: dict[str, float] = {}
        for names, parameter in zip(self._names, self.values):
            found.update(zip(names, map(float, parameter.asnumpy())))
        return found

    def loss_terms(self) -> Mapping[str, float]:
        return self.losses

    def add_flags_recursive(self, **flags: Any) -> DistillDualModels:
        """What `set_train` of this cell or of one around it calls; the teacher stays in eval mode unless it trains."""
        if self._made:  # a training cell around this one is made or set going: the taps must be in, for its mode
            self._follow_mode()
        super().add_flags_recursive(**flags)
        if "training" in flags and not self.cached and not self.trains_teacher:
            self.teacher_model.add_flags_recursive(training=False)
        return self

    def trainable_params(self, recurse: bool = True) -> list[ms.Parameter]:
        """What an optimizer gets: student, projections, custom losses; the teacher only if it trains."""
        if self._attached:
            self._follow_mode()
        found = super().trainable_params(recurse)
        if self.cached or self.trains_teacher:
            return found
        teacher = {id(p) for p in self.teacher_model.get_parameters()}
        mine = {id(p) for p in self.student_model.get_parameters()}
        return [p for p in found if id(p) not in teacher or id(p) in mine]

    def set_loss_scale(self, scale: float) -> None:
        """Tell a compiled graph the loss scale in use: inner labels need it where their gradients are injected.

        Args:
            scale: what the loss is multiplied by before gradients are taken; 1 when there is no loss scaling.
        """
        scale = check.number(scale, "scale", minimum=0)
        ops.assign(self.inner_factor, ms.Tensor(self.soft_share * scale, ms.float32))

    def get_student_model(self) -> nn.Cell:
        """The student, with every parameter name as before; the distillation model goes on when it is called again."""
        self._detach()
        return self.student_model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_mode()
        if ms.get_context("mode") == ms.PYNATIVE_MODE:
            for place, label in enumerate(self.spec.soft_labels):
                if label.t_module is None:  # the others are read where their tensors are at hand
                    self._read_mask(place, None, args, kwargs)
        self.entered = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.entered = False

    def _follow_mode(self) -> None:
        """Put the taps in, or those of the other mode where it was set anew since, in place."""
        if self._attached and self.inner and self.in_graph != (ms.get_context("mode") == ms.GRAPH_MODE):
            self._detach()
        if not self._attached:
            self._attach()

    def construct(self, *args, **kwargs):
        """Run both models on one batch; returns the total loss."""
        if self.inner and not self.in_graph and not self.entered:
            # What was noted in PyNative would be compiled as constants. The compiler knows no error of our own.
            raise RuntimeError(
                "this distillation model compares inner layers and was made ready for PyNative, but a graph is being "
                "compiled: set GRAPH_MODE first, then call its set_train() or trainable_params(), or make the training "
                "cell, so that it attaches to the graph"
            )
        if self.unready:
            raise RuntimeError(
                "inner layers in GRAPH mode need their shapes: pass inputs=one example batch to get_distill_model"
            )
        for place, inner, _, _, mask_place in self.plan:
            if self.in_graph and inner and mask_place is not None:
                memory = self.memories[place]
                ops.assign(memory.mask, args[mask_place].astype(ms.float32))  # type: ignore[index]
        if self.cached:
            teacher_output = self._look_up(args, kwargs)
        elif kwargs:
            teacher_output = self.teacher_model(*args, **kwargs)
        else:
            teacher_output = self.teacher_model(*args)
        student_output = self.student_model(*args, **kwargs) if kwargs else self.student_model(*args)
        soft = 0.0
        for place, inner, s_index, t_index, mask_place in self.plan:
            mask = args[mask_place] if isinstance(mask_place, int) else None
            if inner and self.in_graph:
                memory = self.memories[place]
                read = ops.depend(memory.values, student_output)
                ops.assign(self.values[place], read)
                soft = soft + ops.depend(memory.value, student_output) * 1.0
            else:
                if inner:
                    student, teacher, mask = self._noted(place, args, kwargs)
                else:
                    student = choose(student_output, s_index)
                    teacher = self._told(place) if self.cached else choose(teacher_output, t_index)
                    if isinstance(mask_place, str):
                        mask = kwargs[mask_place]
                if not self.trains_teacher:
                    teacher = ops.stop_gradient(teacher)
                terms = self.terms[place]
                values = terms(student, teacher, mask, self.projections[place])
                ops.assign(self.values[place], ops.stop_gradient(ops.stack(values)))
                for i in range(len(terms.factors)):
                    soft = soft + values[i] * terms.factors[i]
        if self.hard:
            hard = choose(student_output, self.hard_index)
            return self.hard_weight * hard + self.soft_share * soft
        return soft

    def _noted(self, place: int, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        label = self.spec.soft_labels[place]
        for role, path in (("t", label.t_module), ("s", label.s_module)):
            if place not in self._seen[role] and not (role == "t" and self.cached):
                raise ConfigError(f"{role}_module {path!r} did not run in this forward")
        student = self._seen["s"][place]
        teacher = self._seen["t"][place]
        if not self._ready:
            widths = self._widths(place)
            if check_shapes(label, tuple(student.shape), tuple(teacher.shape), projected=widths) and not widths:
                raise ConfigError(
                    f"{label.label}: widths {width_of(student)} and {width_of(teacher)} differ and need a projection: "
                    "pass inputs=one example batch to get_distill_model, or the key widths, before making the optimizer"
                )
        return student, teacher, self._read_mask(place, student, args, kwargs)

    def _told(self, place: int) -> Any:
        return self._seen["t"][place]

    def _look_up(self, args: Any, kwargs: Any) -> Any:
        output, seen = self.teacher_model.lookup(args, kwargs)
        self._seen["t"] = seen
        return output

    def _mask_place(self, label: Any) -> int | str | None:
        key = label.mask
        return self._argument_names.index(key) if key in self._argument_names else key

    def _mask(self, label: Any, args: Any, kwargs: Any) -> Any:
        if label.mask is None:
            return None
        place = self._mask_place(label)
        if label.mask in kwargs:
            return kwargs[label.mask]
        if isinstance(place, str) or place is None or place >= len(args):
            raise ConfigError(f"mask {label.mask!r} of {label.label} is no argument of this forward")
        return args[place]

    def _read_mask(self, place: int, student: ms.Tensor | None, args: Any, kwargs: Any) -> Any:
        """The mask of a soft label, refused where its values or shape mean nothing; no compiled graph may call it."""
        label, terms = self.spec.soft_labels[place], self.terms[place]
        mask = self._mask(label, args, kwargs)
        if mask is None:
            return None
        if student is not None:
            check_mask(label, tuple(mask.shape), tuple(student.shape))
        if not terms.by_labels:
            key = label.mask
            name = self._argument_names[key] if isinstance(key, int) and key < len(self._argument_names) else key
            terms.by_labels = holds_labels(bridge.as_numpy(mask), name, label.label)
        return mask

    def _widths(self, place: int) -> tuple[int, int] | None:
        if not self.terms[place].projects:
            return None
        teacher, student = self.projections[place].shape
        return student, teacher

    def _project(self, place: int, student_width: int, teacher_width: int) -> None:
        values = ms.Tensor(projection_values(student_width, teacher_width, place))
        held = list(self.projections)
        held[place] = ms.Parameter(values, name=f"distill.{place}.projection")
        self.projections = ms.ParameterTuple(held)
        self.terms[place].project()

    def _fit(self, args: Any, kwargs: Any) -> None:
        """Run both models once on an example: check every pair, make projections, size a compiled graph's memory."""
        self._detach()
        mode = ms.get_context("mode")
        ms.set_context(mode=ms.PYNATIVE_MODE)
        self.in_graph = False
        self._attach()
        try:
            with bridge.evaluating(self):
                output_t = self._look_up(args, kwargs) if self.cached else self.teacher_model(*args, **kwargs)
                output_s = self.student_model(*args, **kwargs)
                for place, label in enumerate(self.spec.soft_labels):
                    student = (
                        self._seen["s"].get(place) if label.s_module else pick(output_s, label.s_output_idx, "student")
                    )
                    noted = label.t_module or self.cached
                    teacher = self._seen["t"].get(place) if noted else pick(output_t, label.t_output_idx, "teacher")
                    if student is None or teacher is None:
                        raise ConfigError(f"a module of {label.label} did not run in this forward")
                    widths = self._widths(place)
                    if check_shapes(label, tuple(student.shape), tuple(teacher.shape), projected=widths) and not widths:
                        self._project(place, width_of(student), width_of(teacher))
                    mask = self._read_mask(place, student, args, kwargs)
                    if label.t_module is not None:
                        n = len(label.losses)
                        self._memories[place] = taps.Memory(f"distill.{place}", teacher, mask, n)
        finally:
            self._detach()
            ms.set_context(mode=mode)
        self._ready = True
        self._attach()

    def _attach(self) -> None:
        """Put the taps in and give the teacher's parameters names of their own, in place."""
        labels = self.spec.soft_labels
        self.in_graph = ms.get_context("mode") == ms.GRAPH_MODE and self.inner
        self.unready = self.in_graph and not self._ready
        if self.unready:
            # Without shapes a graph has no memory for inner tensors; the first example brings them.
            return
        if self.in_graph:
            self._check_compilable()
        for role, model in (("s", self.student_model), ("t", self.teacher_model)):
            if not isinstance(model, nn.Cell):
                continue
            found = taps.children(labels, role)
            # The deepest first: a path must still lead to its cell when its parents are wrapped.
            for path in sorted(found, key=lambda p: -p.count(".")):
                cell = taps.find(model, path, f"{role}_module")
                wrapper = (
                    self._compiled_tap(cell, found[path], role)
                    if self.in_graph
                    else self._noting_tap(cell, found[path], role, path)
                )
                taps.replace(model, path, wrapper)
                self._wrapped.append((model, path, cell))
        if self.in_graph:
            self.memories = nn.CellList([m or nn.Cell() for m in self._memories], auto_prefix=False)
        if not self.cached:
            for parameter in self.teacher_model.get_parameters():
                parameter.name = f"teacher_model.{parameter.name}"
        self._attached = True
        bridge.forget_graphs(self)

    def _detach(self) -> None:
        for model, path, cell in reversed(self._wrapped):
            taps.replace(model, path, cell)
        self._wrapped = []
        if self._attached and not self.cached:
            for parameter in self.teacher_model.get_parameters():
                parameter.name = parameter.name.removeprefix("teacher_model.")
        self._attached = self.in_graph = self.unready = False
        bridge.forget_graphs(self)

    def _noting_tap(self, cell: nn.Cell, labels: list[tuple[int, Any]], role: str, path: str) -> nn.Cell:
        wants = [(place, read.side, read.index, path) for place, label in labels for read in [label.read(role)]]
        return taps.Noted(cell, wants, self._seen[role])

    def _compiled_tap(self, cell: nn.Cell, labels: list[tuple[int, Any]], role: str) -> nn.Cell:
        before: list[nn.Cell] = []
        after: list[nn.Cell] = []
        for place, label in labels:
            read = label.read(role)
            index = read.index or 0
            tap: nn.Cell = taps.Teller(self._memories[place], index)
            if role == "s":
                projection = self.projections[place]
                tap = taps.Listener(self.terms[place], self._memories[place], self.inner_factor, projection, index)
            (before if read.side == "input" else after).append(tap)
        return taps.Compiled(cell, before, after)

    def _check_compilable(self) -> None:
        for label in self.spec.soft_labels:
            if label.t_module is None:
                continue
            if self.cached or self.trains_teacher:
                raise ConfigError(f"{label.label}: inner labels in GRAPH mode need a frozen teacher; use PYNATIVE_MODE")
            for index in (label.t_output_idx, label.s_output_idx):
                if index is not None and not isinstance(index, int):
                    raise ConfigError(f"{label.label}: GRAPH mode reads inner outputs by position. Received: {index!r}")
            for term in label.losses:
                custom = [c for n, c in zip(self.custom_names, self.custom_losses) if n == term.func_name]
                if custom and list(custom[0].get_parameters()):
                    raise ConfigError(
                        f"{label.label}: {term.func_name} has parameters, which GRAPH mode cannot train inside"
                    )


def get_distill_model(
    teacher: Any, student: nn.Cell, config: KnowledgeDistillConfig, inputs: Any = None
) -> DistillDualModels:
    """Join teacher and student into one cell whose construct gives the total loss.

    Args:
        teacher: a cell, put into eval mode and otherwise left alone; or a `TeacherCache`.
        student: the cell to train; with `set_hard_label` its output at the index is its own loss.
        config: what to compare.
        inputs: one batch as the models take it: the configuration is proven on it at once, and unequal widths get their
            projection. Inner layers in GRAPH mode need it, for their shapes.

    Returns:
        The cell to train; `get_student_model()` gives the student back.

    Raises:
        ArgumentTypeError: not two cells, or not a configuration.
        ConfigError: an unknown cell or loss, an output out of range, shapes that cannot be compared; by name.

    Example:
        >>> teacher, student = nn.Dense(4, 3), nn.Dense(4, 3)
        >>> config = KnowledgeDistillConfig().add_output_soft_label({
        ...     "t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "KDMse", "func_weight": 1}]})
        >>> get_distill_model(teacher, student, config)(ops.ones((2, 4))).shape
        ()
    """
    custom = check_pair(teacher, student, config, bridge.check_model, "cell")
    spec = config.spec()
    if not isinstance(teacher, nn.Cell):
        teacher.check(spec)
        if ms.get_context("mode") == ms.GRAPH_MODE:
            raise ConfigError("teacher: a cache is read by Python, which GRAPH mode does not run; use PYNATIVE_MODE")
    inner = any(label.t_module is not None for label in spec.soft_labels)
    if inner and inputs is None and ms.get_context("mode") == ms.GRAPH_MODE:
        raise ConfigError("inputs: inner layers in GRAPH mode need one example batch, for their shapes")
    modes = [(c, c.training) for _, c in teacher.cells_and_names()] if isinstance(teacher, nn.Cell) else []
    dual = None
    try:
        dual = DistillDualModels(teacher, student, spec, custom)
        if inputs is not None:
            dual._fit(*bridge.call_of(inputs))
    except BaseException:
        if dual is not None:
            dual.get_student_model()
        for cell, mode in modes:
            cell.training = mode
        raise
    return dual
