"""Teacher and student as one module to train: forward gives the soft loss and both models' outputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

from slimkit import bridge
from slimkit.core.batch import as_call
from slimkit.core.distill.config import LOSSES, DistillSpec, KnowledgeDistillConfig, SoftLabel
from slimkit.core.distill.joined import TotalLoss, check_pair
from slimkit.core.distill.masks import IGNORED, holds_labels
from slimkit.core.distill.shapes import check_mask, check_shapes, pick, projection_values
from slimkit.core.errors import ConfigError
from slimkit.distill import losses, taps
from slimkit.sharded import gathered_for

import torch
from torch import Tensor, nn


class DistillDualModels(nn.Module, TotalLoss):
    """A student that learns from a teacher; made by `get_distill_model`.

    Only the student, the projections between unequal widths and custom losses are parameters of this module. The
    teacher stays where and as it is (device, dtype), in eval mode and without gradients, unless the configuration lets
    it train.

    Args:
        teacher: any module, or a teacher cache.
        student: the module to train.
        spec: what to compare.
        custom: custom losses by name.
    """

    def __init__(
        self, teacher: Any, student: nn.Module, spec: DistillSpec, custom: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.student_model = student
        self.spec = spec
        self.projections = nn.ModuleDict()
        self.custom_losses = nn.ModuleDict(dict(custom or {}))
        self.losses: dict[str, Tensor] = {}
        # Held in a tuple, the teacher is no submodule: to(), train(), DDP and optimizers leave it alone.
        self._teacher = (teacher,)
        if spec.teacher_trains:
            self.trained_teacher = teacher
        elif isinstance(teacher, nn.Module):
            teacher.eval()
        self._stores = {"t": taps.Store(), "s": taps.Store()}
        self._attached = False
        self._checked = False
        self._label_masks: set[Any] = set()  # masks that hold labels, of which -100 does not count
        self._soft: Tensor | None = None
        self._argument_names = list(inspect.signature(student.forward).parameters)
        self._names = [[f"{label.label}/{term.func_name}" for term in label.losses] for label in spec.soft_labels]
        for place, label in enumerate(spec.soft_labels):
            if label.widths is not None and label.widths[0] != label.widths[1]:
                self._project(place, *label.widths)
        self._attach()

    def __getstate__(self) -> dict[str, Any]:
        # The last loss belongs to a graph, which can be neither copied nor saved.
        return {**self.__dict__, "_soft": None}

    @property
    def teacher_model(self) -> Any:
        """The teacher."""
        return self._teacher[0]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        """Run both models on one batch.

        Args:
            args, kwargs: what student and teacher are called with.

        Returns:
            (soft loss, the student's outputs, the teacher's outputs).
        """
        if not self._attached:
            self._attach()
        try:
            teacher_output, teacher_states = self._ask_teacher(args, kwargs)
            student_output, student_states = self._listen("s", self.student_model, args, kwargs)
        finally:
            for store in self._stores.values():
                store.listening, store.seen = False, {}
        mask_of = self._masks(args, kwargs)
        pairs = self._pairs(student_states, teacher_states, student_output, teacher_output)
        if not self._checked:
            self._check(pairs)
        self._soft = self._soft_loss(pairs, mask_of)
        return self._soft, student_output, teacher_output

    def loss_terms(self) -> Mapping[str, Tensor]:
        return self.losses

    def get_total_loss(self, hard: Tensor | None = None) -> Tensor:
        """weight * hard + (1 - weight) * soft, with the soft loss of the last forward.

        Args:
            hard: the student's loss on true labels; None: the soft loss alone.

        Returns:
            The loss to call backward on; the weight is `set_hard_label`'s, 0.5 when that was not called.

        Raises:
            ConfigError: no forward came before.
        """
        if self._soft is None:
            raise ConfigError("get_total_loss: call the distillation model on a batch first")
        soft = self._soft
        if hard is None:
            return soft
        weight = 0.5 if self.spec.hard_weight is None else self.spec.hard_weight
        return weight * hard + (1 - weight) * soft

    def get_student_model(self) -> nn.Module:
        """The student, free of hooks; the distillation model hooks it again when it is called again.

        Returns:
            The module that was given, trained; projections and custom losses stay behind.
        """
        for role, model in (("s", self.student_model), ("t", self.teacher_model)):
            if isinstance(model, nn.Module):
                taps.detach(model, self._stores[role])
        self._attached = False
        return self.student_model

    def _attach(self) -> None:
        labels = self.spec.soft_labels
        taps.attach(self.student_model, self._stores["s"], labels, "s")
        if isinstance(self.teacher_model, nn.Module):
            try:
                taps.attach(self.teacher_model, self._stores["t"], labels, "t")
            except ConfigError:
                taps.detach(self.student_model, self._stores["s"])
                raise
        self._attached = True

    def _listen(self, role: str, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[int, Tensor]]:
        store = self._stores[role]
        store.listening, store.seen = True, {}
        output = model(*args, **kwargs)
        seen = store.seen
        store.listening, store.seen = False, {}
        for place, tensor in seen.items():
            read = self.spec.soft_labels[place].read(role)
            if tensor.requires_grad and read.module is not None:
                gathered_for(model, read.module, tensor)
        for place, label in enumerate(self.spec.soft_labels):
            path = label.t_module if role == "t" else label.s_module
            if path is not None and place not in seen:
                raise ConfigError(f"{role}_module {path!r} did not run in this forward")
        return output, seen

    def _ask_teacher(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        teacher = self.teacher_model
        if not isinstance(teacher, nn.Module):
            return teacher.lookup(args, kwargs)
        if self.spec.teacher_trains:
            return self._listen("t", teacher, args, kwargs)
        if teacher.training:
            teacher.eval()
        device = bridge.device_of(teacher)
        if device != bridge.device_of(self.student_model):
            args, kwargs = bridge.to_device(args, device), bridge.to_device(kwargs, device)
        with torch.no_grad():
            return self._listen("t", teacher, args, kwargs)

    def _masks(self, args: Any, kwargs: Any) -> dict[str | int, Tensor]:
        masks: dict[str | int, Tensor] = {}
        for label in self.spec.soft_labels:
            key = label.mask
            if key is None or key in masks:
                continue
            if isinstance(key, str) and key in kwargs:
                masks[key] = kwargs[key]
                continue
            place = self._argument_names.index(key) if key in self._argument_names else key
            if isinstance(place, str) or place >= len(args):
                raise ConfigError(f"mask {key!r} of {label.label} is no argument of this forward")
            masks[key] = args[place]
        return masks

    def _counting(self, label: SoftLabel, mask: Tensor, student: Tensor) -> Tensor:
        """1 where a row counts and 0 where it does not, in the student's type."""
        key = label.mask
        name = self._argument_names[key] if isinstance(key, int) and key < len(self._argument_names) else key
        check_mask(label, tuple(mask.shape), tuple(student.shape))
        # Values are looked at where that costs nothing, and elsewhere in the first batch: it waits for the device.
        if name not in self._label_masks and (mask.device.type == "cpu" or not self._checked):
            values = mask.detach().float() if mask.is_floating_point() else mask
            if holds_labels(values.numpy(force=True), name, label.label):
                self._label_masks.add(name)
        counts = mask != IGNORED if name in self._label_masks else mask
        return counts.to(student.device, student.dtype)

    def _check(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for place, (label, (student, teacher)) in enumerate(zip(self.spec.soft_labels, pairs)):
            widths = self._widths(place)
            if check_shapes(label, tuple(student.shape), tuple(teacher.shape), projected=widths) and not widths:
                raise ConfigError(
                    f"{label.label}: widths {_width(student)} and {_width(teacher)} differ and need a projection: pass "
                    "inputs=one example batch to get_distill_model, or the key widths, before making the optimizer"
                )
        self._checked = True

    def _widths(self, place: int) -> tuple[int, int] | None:
        key = f"label{place}"
        if key not in self.projections:
            return None
        teacher, student = self.projections[key].weight.shape
        return student, teacher

    def _project(self, place: int, student_width: int, teacher_width: int) -> None:
        like = next(self.student_model.parameters(), None)
        layer = nn.Linear(student_width, teacher_width, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(projection_values(student_width, teacher_width, place)))
        self.projections[f"label{place}"] = layer if like is None else layer.to(like.device)

    def _fit(self, args: Any, kwargs: Any) -> None:
        """Run once without learning: check every pair and make the projections that unequal widths need."""
        with bridge.evaluating(self):
            teacher_output, seen_t = self._ask_teacher(args, kwargs)
            student_output, seen_s = self._listen("s", self.student_model, args, kwargs)
            masks = self._masks(args, kwargs)
            pairs = self._pairs(seen_s, seen_t, student_output, teacher_output)
            for place, (label, (student, teacher)) in enumerate(zip(self.spec.soft_labels, pairs)):
                widths = self._widths(place)
                if check_shapes(label, tuple(student.shape), tuple(teacher.shape), projected=widths) and not widths:
                    self._project(place, _width(student), _width(teacher))
            self._soft_loss(pairs, masks)
        self._checked, self.losses = True, {}

    def _pairs(self, seen_s: Any, seen_t: Any, output_s: Any, output_t: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for place, label in enumerate(self.spec.soft_labels):
            student = seen_s[place] if label.s_module else pick(output_s, label.s_output_idx, "student")
            known = label.t_module or not isinstance(self.teacher_model, nn.Module)
            teacher = seen_t[place] if known else pick(output_t, label.t_output_idx, "teacher")
            pairs.append((student, teacher.to(student.device, non_blocking=True)))
        return pairs

    def _soft_loss(self, pairs: list[tuple[Tensor, Tensor]], masks: Mapping[str | int, Tensor]) -> Tensor:
        total: Tensor | None = None
        self.losses = {}
        off = torch.autocast(pairs[0][0].device.type, enabled=False) if torch.is_autocast_enabled() else None
        with off or contextlib.nullcontext():
            for place, (label, (student, teacher)) in enumerate(zip(self.spec.soft_labels, pairs)):
                for name, term, value in self._terms(place, label, _float(student), _float(teacher), masks):
                    self.losses[name] = value.detach()
                    total = term.factor * value if total is None else total + term.factor * value
        assert total is not None
        return total

    def _terms(self, place: int, label: SoftLabel, student: Tensor, teacher: Tensor, masks: Any) -> Any:
        mask = None if label.mask is None else self._counting(label, masks[label.mask], student)
        if label.pool is not None:
            student, teacher = losses.pool(student, label.pool, mask), losses.pool(teacher, label.pool, mask)
            mask = None
        key = f"label{place}"
        for name, term in zip(self._names[place], label.losses):
            function = losses.LOSSES.get(term.func_name)
            if function is None:
                extra = {} if term.temperature == 1 else {"temperature": term.temperature}
                if mask is not None:
                    extra["mask"] = mask
                yield name, term, self.custom_losses[term.func_name](student, teacher, **extra)
                continue
            shown = student
            if key in self.projections and LOSSES[term.func_name][0] == "hidden":
                shown = self.projections[key](losses.places(student).to(self.projections[key].weight.dtype))
                yield name, term, function(shown, losses.places(teacher), term, mask)
                continue
            yield name, term, function(shown, teacher, term, mask)


def _float(x: Tensor) -> Tensor:
    # Half precision has too few digits for sums over a vocabulary; double stays double.
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _width(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else x.shape[-1]


def get_distill_model(
    teacher: Any, student: nn.Module, config: KnowledgeDistillConfig, inputs: Any = None
) -> DistillDualModels:
    """Join teacher and student into one module whose forward gives the soft loss.

    Args:
        teacher: an nn.Module, put into eval mode and otherwise left alone; or a `TeacherCache`.
        student: the module to train.
        config: what to compare.
        inputs: one batch as the models take it (tensor, tuple of arguments, dict of keyword arguments): the
            configuration is proven on it at once, and unequal widths get their projection. None: the first batch does.

    Returns:
        The module to train; `get_student_model()` gives the student back.

    Raises:
        ArgumentTypeError: not two modules, or not a configuration.
        ConfigError: an unknown module or loss, an output out of range, shapes that cannot be compared; by name.

    Example:
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> config = KnowledgeDistillConfig().add_output_soft_label({
        ...     "t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "KDMse", "func_weight": 1}]})
        >>> soft, student_out, teacher_out = get_distill_model(teacher, student, config)(torch.ones(2, 4))
        >>> soft.requires_grad, teacher_out.requires_grad
        (True, False)
    """
    custom = check_pair(teacher, student, config, bridge.check_model, "module")
    modes = {m: m.training for m in teacher.modules()} if isinstance(teacher, nn.Module) else {}
    dual = None
    try:
        spec = config.spec()
        if not isinstance(teacher, nn.Module):
            teacher.check(spec)
        dual = DistillDualModels(teacher, student, spec, custom)
        if inputs is not None:
            args, kwargs = as_call(bridge.to_device(inputs, bridge.device_of(student)))
            dual._fit(args, kwargs)
    except BaseException:
        if dual is not None:
            dual.get_student_model()
        for module, mode in modes.items():
            module.training = mode
        raise
    return dual
