"""The pruning plan as plain data: what each variable keeps, versioned, tied to one model's shapes, and replayable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core import check, naming
from slimkit.core.errors import PlanError
from slimkit.core.prune.attributes import Field
from slimkit.core.prune.expressions import Expr, Index, kept, mentions, size_of
from slimkit.core.prune.solve import View

FORMAT, VERSION = "slimkit.prune", 1

# Module -> attribute or buffer -> (before, after): numbers that a model computes from its configuration.
Derived = dict[str, dict[str, tuple[float, float]]]


def make_desc(
    view: View,
    keep: Mapping[str, Index],
    attributes: Mapping[str, Mapping[str, tuple[int, int]]],
    config: Mapping[str, tuple[Field, Field]],
    made: Mapping[str, Any],
    padded: Mapping[str, Index] | None = None,
) -> dict[str, Any]:
    """Write a plan as JSON-able data.

    Args:
        view: the coupling it was made from.
        keep: variable -> kept indices, ascending.
        attributes: module -> attribute -> (before, after), beyond what the cut weights themselves say.
        config: field of the model's configuration -> (before, after).
        made: how it was made (settings and numbers), for people.
        padded: variable -> those of its kept indices that hold zeros afterwards.

    Returns:
        The desc.
    """
    full = view.counts
    zeros = {n: index for n, index in (padded or {}).items() if len(index)}
    used = {n for n in keep if len(keep[n]) < full[n] or n in zeros}
    axes = {p: e for p, e in view.axes.items() if any(mentions(x, used) for x in e)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "shapes": {p: list(s) for p, s in view.coupling.graph.shapes.items()},
        "variables": {n: {"size": full[n], "keep": [int(i) for i in keep[n]]} for n in keep if n in used},
        **({"padded": {n: [int(i) for i in index] for n, index in zeros.items()}} if zeros else {}),
        "axes": {p: [_without(x, used, full) for x in e] for p, e in axes.items()},
        "groups": {
            scope: [attr, _without(e, used, full)] for scope, (attr, e) in view.groups.items() if mentions(e, used)
        },
        "attributes": {m: {a: list(v) for a, v in changes.items()} for m, changes in attributes.items() if changes},
        "config": {f: list(v) for f, v in config.items()},
        "made": dict(made),
    }


def _without(expr: Expr, used: set[str], full: Mapping[str, int]) -> Expr:
    if isinstance(expr, str):
        return expr if expr in used else full[expr]
    return expr if isinstance(expr, int) else [expr[0], *(_without(e, used, full) for e in expr[1:])]


class PrunePlan:
    """A desc that has been read and found sound.

    Args:
        desc: plain data as `make_desc` writes it, possibly after a trip through JSON.

    Raises:
        ArgumentTypeError: not a dict.
        PlanError: another format or version, or damaged.
    """

    def __init__(self, desc: Any) -> None:
        check.instance(desc, dict, "desc", "a dict as prune() returns it")
        if desc.get("format") != FORMAT:
            raise PlanError(f"desc must be of the format {FORMAT!r}. Received: {desc.get('format')!r}")
        if desc.get("version") != VERSION:
            raise PlanError(
                f"desc must be of version {VERSION}, which this slimkit reads. Received: {desc.get('version')!r}"
            )
        try:
            self.desc: Mapping[str, Any] = desc
            self.shapes = {p: tuple(int(n) for n in s) for p, s in desc["shapes"].items()}
            self.full = {n: int(v["size"]) for n, v in desc["variables"].items()}
            self.keep = {n: np.asarray(v["keep"], dtype=np.int64) for n, v in desc["variables"].items()}
            self.axes: dict[str, list[Expr]] = {p: list(e) for p, e in desc["axes"].items()}
            self.framework = str(desc.get("made", {}).get("framework", ""))
            for name, index in self.keep.items():
                sound = index.ndim == 1 and len(index) and (np.diff(index) > 0).all()
                if not sound or index[0] < 0 or index[-1] >= self.full[name]:
                    raise PlanError(
                        f"desc keeps indices of {name} that are not ascending within 0..{self.full[name] - 1}"
                    )
            for path, exprs in self.axes.items():
                if tuple(size_of(e, self.full) for e in exprs) != self.shapes[path]:
                    raise PlanError(f"desc says axes of {path} that do not make its shape {list(self.shapes[path])}")
            self.indices = {
                path: [kept(e, self.full, self.keep) if not isinstance(e, int) else None for e in exprs]
                for path, exprs in self.axes.items()
            }
            self.padded = {n: np.asarray(index, dtype=np.int64) for n, index in desc.get("padded", {}).items()}
            for name, index in self.padded.items():
                if index.ndim != 1 or not np.isin(index, self.keep[name]).all() or len(index) >= len(self.keep[name]):
                    raise PlanError(f"desc pads indices of {name} that it does not keep, or all that it keeps")
            self.groups = {
                m: (str(a), len(kept(e, self.full, self.keep))) for m, (a, e) in desc.get("groups", {}).items()
            }
            self.attributes = {m: dict(c) for m, c in desc.get("attributes", {}).items()}
            self.config = {f: (old, new) for f, (old, new) in desc.get("config", {}).items()}
            self.derived: Derived = {
                m: {n: (float(old), float(new)) for n, (old, new) in c.items()}
                for m, c in desc.get("derived", {}).items()
            }
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PlanError(f"desc is damaged: {type(error).__name__}: {error}") from None

    @property
    def counts(self) -> dict[str, int]:
        """How many indices each variable keeps that loses some."""
        return {name: len(index) for name, index in self.keep.items()}

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """How each of the cuts was made that the plan holds: one, or those that `merge_desc` joined."""
        made = self.desc.get("made", {})
        steps: list[Mapping[str, Any]] = made.get("steps", [made])
        return steps

    @property
    def parted(self) -> dict[str, str]:
        """Matrices that get values of their own before the cut -> the table that each shared them with."""
        return {path: table for step in self.steps for path, table in step.get("rotated", {}).get("apart", {}).items()}

    def filled(self) -> dict[str, list[Index | None]]:
        """`indices` without those that hold zeros: what an unpadded model would keep."""
        if not self.padded:
            return self.indices
        keep = {n: np.setdiff1d(index, self.padded.get(n, [])) for n, index in self.keep.items()}
        return {
            path: [None if isinstance(e, int) else kept(e, self.full, keep) for e in exprs]
            for path, exprs in self.axes.items()
        }

    def zeros(self) -> dict[str, list[Index | None]]:
        """For each axis the places in the cut parameter that hold zeros; parameters without any are left out."""
        out = {}
        for path, axes in self.filled().items() if self.padded else ():
            kept_axes = self.indices[path]
            found = [
                None if held is None or index is None or len(index) == len(held)
                else np.flatnonzero(np.isin(held, index, invert=True))
                for held, index in zip(kept_axes, axes)
            ]  # fmt: skip
            if any(index is not None for index in found):
                out[path] = found
        return out

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes after the cut of the parameters that change."""
        return {
            path: tuple(n if index is None else len(index) for n, index in zip(self.shapes[path], axes))
            for path, axes in self.indices.items()
        }

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Find each parameter of the plan in an uncut model, in the other framework's names if need be.

        Args:
            shapes: the model's parameters and buffers.

        Returns:
            The plan's path -> the model's path.

        Raises:
            PlanError: names the first parameter that is missing, left over or of another shape.
        """
        return self._match(shapes, self.shapes, "Run analysis() on this model, or load the model it was made for.")

    def match_cut(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The same for the model that the plan has cut.

        Raises:
            PlanError: the model has not the shapes that the plan leaves.
        """
        try:
            return self._match(shapes, {**self.shapes, **self.sizes()}, "")
        except PlanError as error:
            raise PlanError(f"model must be the one that desc pruned: {error}") from None

    def _match(
        self, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], hint: str
    ) -> dict[str, str]:
        plain = {_plain(p): p for p in shapes}
        names: dict[str, str] = {}
        for path, shape in wanted.items():
            name = path if path in shapes else plain.get(_plain(path))
            if name is None:
                raise PlanError(
                    f"desc was made for a model with {path!r} {list(shape)}, and this model has no such parameter"
                )
            if not _same_shape(tuple(shapes[name]), shape):
                raise PlanError(
                    f"desc was made for {path!r} of shape {list(shape)}, and this model's is {list(shapes[name])}. "
                    f"{hint}"
                )
            names[path] = name
        extra = [p for p in shapes if p not in set(names.values())]
        if extra:
            raise PlanError(
                f"desc was made for a model without {extra[0]!r} {list(shapes[extra[0]])}, and this one has it"
            )
        return names


def _same_shape(here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    # MindSpore writes a 1-d kernel as (out, in, 1, k); ones aside, the axes are the same.
    return here == there or ([n for n in here if n != 1] == [n for n in there if n != 1] and len(here) != len(there))


def _plain(path: str) -> str:
    module, _, leaf = path.rpartition(".")
    return f"{module}.{naming.torch_word(leaf)}"
