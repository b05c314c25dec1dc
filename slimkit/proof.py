"""`check_pruning`: the zero-mask proof of a plan on a torch model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimkit import bridge, renorm, surgery
from slimkit.core import check
from slimkit.core.lazy import door
from slimkit.core.prune.dims import Dim
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.proof import KeptIndices, PruningCheck, compare
from slimkit.core.prune.relations import Relations
from slimkit.core.prune.rules import relate
from slimkit.derived import put_numbers
from slimkit.trace.examples import example
from slimkit.trace.modes import mode
from slimkit.trace.passes import Run, record
from slimkit.trace.tracer import Recorder
from slimkit.trace.watch import answers

import torch
from torch import nn

__getattr__, __dir__ = door("slimkit", room="prune")

# Statistics over single axes: operator -> the place of its axes among the arguments.
_REDUCED = {"mean": 1, "var": 1, "std": 1, "var_mean": 1, "std_mean": 1, "amax": 1, "amin": 1, "logsumexp": 1}


def check_pruning(model: nn.Module, inputs: Any, desc: dict[str, Any], *, tolerance: float = 1e-4) -> PruningCheck:
    """Prove a plan on a model of your own: cut, it says what it said with the dropped indices set to zero.

    Statistics over a cut axis (norms, means) are taken over the kept indices in both, and numbers that the model
    derives from its configuration (Gemma's scale of embeddings) are those after the cut. Activations are to map zero to
    zero where nothing follows that hides it (a sigmoid gate on a dropped channel multiplies a zero).

    Args:
        model: the uncut model; it stays as it is.
        inputs: an example of what it takes, with real values.
        desc: the plan.
        tolerance: largest difference allowed, as a share of the largest output; float32 nets stay far below 1e-4.

    Returns:
        The check, with the largest difference seen.

    Raises:
        PlanError: the plan belongs to another model.
        GraphError: the outputs differ, or the cut model does not run.

    Example:
        >>> from slimkit import PruneTorch
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> _, desc = PruneTorch(net, torch.ones(1, 8)).analysis(0.5)
        >>> check_pruning(net, torch.randn(3, 8), desc).holds
        True
    """
    bridge.check_model(model)
    check.number(tolerance, "tolerance", minimum=0)
    plan = PrunePlan(desc)
    shapes = {p: tuple(t.shape) for p, t in surgery.tensors(model).items()}
    names = plan.match(shapes)
    given = example(model, inputs)
    indices = {names[p]: axes for p, axes in plan.filled().items()}
    small = copy.deepcopy(model)
    surgery.cut(small, plan, names)
    wide = zeroed(model, indices)
    for owner, name, new in put_numbers(wide, plan.derived):
        setattr(owner, name, new)
    first = _Seen(wide)
    record(first, wide, Run(given, False))
    relations = relate(first.graph)
    second = _Narrowed(wide, relations, KeptIndices(relations, indices))
    record(second, wide, Run(given, False))
    with mode(small, False):  # the same chance as in the other passes
        cut = list(answers(bridge.run(small, given)))
    return compare(_arrays(cut), _arrays(second.answers), tolerance, second.narrowed)


def _arrays(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [t.detach().float().cpu().numpy() for t in tensors if t.is_floating_point()]


def zeroed(model: nn.Module, indices: dict[str, list[Any]]) -> nn.Module:
    """A copy of a model in which everything that a plan drops is zero.

    Args:
        model: the uncut model.
        indices: parameter -> kept indices of each axis, None for all.
    """
    twin = copy.deepcopy(model)
    found = surgery.tensors(twin)
    gone = {
        path: [None if i is None else np.setdiff1d(np.arange(n), i) for i, n in zip(axes, found[path].shape)]
        for path, axes in indices.items()
    }
    with torch.no_grad():
        for path, values in renorm.with_zeros(twin, found, gone).items():
            found[path].copy_(values)
    return twin


class _Seen(Recorder):
    """A recorder that computes for real and keeps the answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, real=True)
        self.answers: list[torch.Tensor] = []

    def finished(self, output: Any) -> None:
        self.answers = list(answers(output))


class _Narrowed(_Seen):
    """The same, with statistics over cut axes taken over their kept indices."""

    def __init__(self, model: nn.Module, relations: Relations, kept: KeptIndices) -> None:
        super().__init__(model)
        self._relations, self._kept = relations, kept
        self.narrowed: list[str] = []

    def _compute(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        axes: Sequence[int] = ()
        if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
            axes = range(args[0].dim() - len(args[1]), args[0].dim())
        elif name == "native_group_norm":
            axes = [1]
        elif name in _REDUCED:
            place = _REDUCED[name]
            listed = args[place] if len(args) > place and args[place] is not None else kwargs.get("dim")
            listed = [listed] if isinstance(listed, int) else listed or list(range(args[0].dim()))
            axes = sorted(a % args[0].dim() for a in listed)
        kept = self._narrow(args[0], axes) if axes else {}
        if not kept:
            return super()._compute(func, name, args, kwargs)
        self.narrowed.append(f"{name} in {self.scopes[-1] or 'the model'}")
        x = _selected(args[0], kept)
        if name in _REDUCED:
            out = func(x, *args[1:], **kwargs)
            return out, out
        if name == "native_group_norm":
            out = _group_norm(func, x, args, kept[1])
        else:
            shape = [x.shape[a] for a in axes]
            at = {a - axes[0]: index for a, index in kept.items()}
            more = [_selected(t, at) if isinstance(t, torch.Tensor) else t for t in args[2:]]
            out = func(x, shape, *more, **kwargs)
        whole = args[0].new_zeros(args[0].shape)
        result = out[0] if isinstance(out, tuple) else out
        grid = [kept.get(a, torch.arange(n, device=x.device)) for a, n in enumerate(args[0].shape)]
        whole[torch.meshgrid(*grid, indexing="ij")] = result
        full = (whole, *out[1:]) if isinstance(out, tuple) else whole
        return full, full

    def _narrow(self, x: torch.Tensor, axes: Sequence[int]) -> dict[int, torch.Tensor]:
        dims: list[Dim] = self._relations.dims[self.value(x)]
        found = {a: self._kept.of(dims[a]) for a in axes}
        return {a: torch.from_numpy(i).to(x.device) for a, i in found.items() if len(i) < x.shape[a]}


def _selected(x: torch.Tensor, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    for axis, index in kept.items():
        x = x.index_select(axis, index)
    return x


def _group_norm(func: Callable[..., Any], x: torch.Tensor, args: list[Any], kept: torch.Tensor) -> Any:
    """x (B, kept channels, *space), each group by what it keeps."""
    per_group = args[3 + 1] // args[6]
    groups = len(torch.unique(kept // per_group))
    weights = [t if t is None else t.index_select(0, kept) for t in args[1:3]]
    return func(x.contiguous(), *weights, args[3], x.shape[1], args[5], groups, *args[7:])
