"""Making a small delta of what a model has learned since its base: the steps that both wings share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.checkpoint.openweights import open_weights
from slimkit.core.checkpoint.torchfile import TorchFile
from slimkit.core.delta import base as base_values
from slimkit.core.delta import filling, fitted, inject, rest, starts
from slimkit.core.delta import spec as rules
from slimkit.core.delta.base import BaseValue
from slimkit.core.delta.drawn import drawing
from slimkit.core.delta.framework import DeltaStorage
from slimkit.core.delta.spec import DeltaReport, LoraSpec, Site
from slimkit.core.delta.tensors import bits, wide
from slimkit.core.errors import ArgumentError, PatternError, PlanError
from slimkit.core.lazy import imported
from slimkit.core.log import logger
from slimkit.core.match import match

Array = np.ndarray[Any, Any]
Values = Callable[[str], Array]

# kind -> what it holds beside the low rank
KINDS = {"bits": "signs", "low_rank": ""}
_FIT = ("linear", "conv1d", "embedding", "conv2d")
_TURNED = ("conv1d", "embedding")  # stored (inputs, outputs)


@dataclass
class _Small:
    """One layer's delta: its options and tensors, what it cannot say, and how many bytes it takes."""

    spec: LoraSpec
    parts: dict[str, Array]
    error: float
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(part.nbytes for part in self.parts.values())

    def turned(self) -> _Small:
        """The same for a layer that reads the same weight the other way: the table of embeddings as a linear layer."""
        halves = {"a": self.parts["b"].T, "b": self.parts["a"].T}
        return _Small(self.spec, {**self.parts, **{n: np.ascontiguousarray(h) for n, h in halves.items()}}, self.error)


def compress(
    access: DeltaStorage,
    model: Any,
    tuned: Any,
    kind: Any,
    *,
    name: Any,
    bytes_ratio: Any,
    rank: Any,
    exclude: Any,
    seed: Any,
    calibration: Any,
) -> DeltaReport:
    """Put what a tuned model has learned on its base as a small delta, in place; see `compress_delta` of the wings.

    Everything is decided and computed before the model is touched, except by how much data betters it.
    """
    check.choice(kind, KINDS, "kind")
    rules.delta_name(name)
    check.ratio(bytes_ratio, "bytes_ratio")
    check.integer(seed, "seed", minimum=0)
    if rank is not None:
        check.positive(rank, "rank")
    if kind == "bits" and bytes_ratio <= 1 / 16:
        check.wrong_value(
            "bytes_ratio", "more than 1/16 for kind='bits', which takes one bit of bfloat16's 16", bytes_ratio
        )
    batches = [] if calibration is None else starts.batches_of(calibration)
    if batches and isinstance(tuned, (str, Path, Mapping)):
        check.wrong_value("tuned", "the tuned model itself where calibration is given, which it reads", type(tuned))
    access.at_rest(model)
    # The base's own values, whatever deltas are on it.
    alone = inject.disabled(access, model) if access.layers(model) else contextlib.nullcontext()
    with alone, _tuned(access, tuned) as (read, shapes):
        sites, every = access.sites(model), {n: t for n, t in access.neutral(model).items() if rules.PREFIX not in n}
        # What is worked out anew is in no file; models say it of each other.
        made_anew = access.unsaved(model) - set(shapes)
        every = {n: t for n, t in every.items() if n not in made_anew}
        names = _names(every, shapes, read)

        def after(name: str) -> Array:
            return read(names[name])

        if exclude is not None:
            kept = match(
                sites, check.strings([exclude] if isinstance(exclude, str) else exclude, "exclude"), whole_modules=True
            )
            if kept.unmatched:
                raise PatternError(
                    f"exclude must name modules. Matched none: {check.nears(kept.unmatched, list(sites))}"
                )
            sites = {path: site for path, site in sites.items() if path not in kept.names}
        made = _layers(access, sites, every, after, kind, bytes_ratio, rank, seed)
        weights = {f"{path}.weight" for path in made}
        values = _whole(access, every, after, weights)
        fits = _fits(access, sites, every, made) if batches else {}
        # What is the same for all rows goes into the bias, which travels whole.
        values |= {bias: np.asarray(after(bias), order="C") for bias in fits.values() if bias and bias not in values}
    if not made and not values:
        raise ArgumentError("tuned must differ from the base; every value is the same.")
    places = base_values.place(every, {n: BaseValue(v, trains=False, owner=name) for n, v in values.items()}, "tuned")
    if not made:
        raise ArgumentError(
            "no layer differs that a delta goes on; save_delta after training those tensors alone does."
        )
    statistics = {n: np.array(access.value(every[n])) for n in values if not access.may_train(every[n])}
    specs, parts = {p: small.spec for p, small in made.items()}, {p: small.parts for p, small in made.items()}
    if batches:  # a batch that the models cannot read is found out while nothing has changed
        for one in (tuned, model):
            access.given(one, list(fits)[:1], batches, lambda path, rows: None)
    acting = inject.active_weights(access, model)
    report = filling.put_made(access, model, name, specs, parts, freeze=True)
    notes = filling.fill_base(access, model, places, [{"name": name}], freeze=True)
    inject.activate(access, model, name)
    if batches:
        try:
            notes = (*notes, *_fit(access, model, tuned, name, made, fits, after, batches, seed))
        except BaseException:
            for place, value in statistics.items():
                access.fill(every[place], value)
            inject.remove(access, model, name)
            if acting:
                inject.activate(access, model, acting)
            raise
    total = sum(small.nbytes for small in made.values()) + sum(v.nbytes for v in values.values())
    numbers = sum(int(np.prod(t.shape)) for t in {id(t): t for t in every.values()}.values())
    notes = (
        f"{total:,} bytes, {2 * numbers / max(total, 1):.1f} times smaller than the model in bfloat16",
        *((f"{len(values)} tensors travel whole: {', '.join(list(values)[:3])}",) if values else ()),
        *notes,
    )
    logger.info("%s", notes[0])
    layers = {p: {**r, "error": made[p].error, "bytes": made[p].nbytes} for p, r in report.layers.items()}
    return DeltaReport(kind, name, layers, notes=notes)


@contextlib.contextmanager
def _tuned(access: DeltaStorage, tuned: Any) -> Iterator[tuple[Values, dict[str, tuple[int, ...]]]]:
    """The tuned values by torch's names, and their shapes: of a model, a mapping, or files."""
    if isinstance(tuned, (str, Path)):
        with open_weights(tuned, lambda path: TorchFile(path, imported("torch")), "tuned") as weights:
            yield weights.read, {n: entry.shape for n, entry in weights.entries.items()}
        return
    held: Mapping[str, Any] = tuned
    if not isinstance(tuned, Mapping):
        if access.layers(tuned):
            raise ArgumentError("tuned must be a plain model; merge_delta(tuned, unload=True) puts its deltas into it.")
        access.at_rest(tuned)
        held = access.neutral(tuned)
    yield (
        lambda n: held[n] if isinstance(held[n], np.ndarray) else access.value(held[n]),
        {n: tuple(value.shape) for n, value in held.items()},
    )


def _names(every: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Values) -> dict[str, str]:
    """What the tuned model calls each tensor of the base; a tied one may stand under one of its names there.

    Raises:
        PlanError: it lacks a tensor, has one more or one of another shape, or two values for what is tied in the base.
    """
    groups = base_values.common(every)
    missing = [group[0] for group in groups if not any(n in shapes for n in group)]
    if missing:
        raise PlanError(
            f"tuned lacks {len(missing)} tensors of the base, {missing[0]!r} among them"
            f"{check.near(missing[0], sorted(shapes))}."
        )
    more = [name for name in shapes if name not in every]
    if more:
        raise PlanError(
            f"tuned has {len(more)} tensors that the base lacks, {more[0]!r} among them"
            f"{check.near(more[0], list(every))}. A delta has no place for them."
        )
    found: dict[str, str] = {}
    for group in groups:
        name, *others = (n for n in group if n in shapes)
        wanted = tuple(every[name].shape)
        for one in (name, *others):
            if shapes[one] != wanted:
                raise PlanError(f"{one} has shape {wanted} in the base and {shapes[one]} in tuned.")
        for other in others:
            if not np.array_equal(bits(read(name)), bits(read(other))):
                raise PlanError(
                    f"{name} and {other} are one tensor in the base and two in tuned; untie them in the base first."
                )
        found |= dict.fromkeys(group, name)
    return found


def _layers(
    access: DeltaStorage,
    sites: Mapping[str, Site],
    every: Mapping[str, Any],
    after: Values,
    kind: str,
    bytes_ratio: float,
    rank: int | None,
    seed: int,
) -> dict[str, _Small]:
    """Path -> small delta, of every layer that differs and has one."""
    found: dict[str, _Small] = {}
    done: dict[int, tuple[bool, _Small]] = {}
    for path, site in sites.items():
        tensor = every.get(f"{path}.weight")
        if site.kind not in _FIT or site.reason or tensor is None:
            continue
        if id(tensor) not in done:
            before = access.value(tensor)
            change = wide(after(f"{path}.weight")).astype(np.float32) - wide(before).astype(np.float32)
            if not np.isfinite(change).all():
                raise ArgumentError(f"{path}: the difference between tuned and base is not finite.")
            if not change.any():
                continue
            rng = drawing(seed, path)
            small = _small(change, site.kind, kind, bytes_ratio, rank, rng)
            if small.nbytes >= change.size * 2:
                continue  # it travels whole
            done[id(tensor)] = (site.kind in _TURNED, small)
        turned, small = done[id(tensor)]
        found[path] = small if turned == (site.kind in _TURNED) else small.turned()
    return found


def _fits(
    access: DeltaStorage, sites: Mapping[str, Site], every: Mapping[str, Any], made: Mapping[str, _Small]
) -> dict[str, str]:
    """Path of each layer that data can better -> its bias, or "" where it has none of its own."""
    alone = {group[0] for group in base_values.common(every) if len(group) == 1}
    found: dict[str, str] = {}
    for path in made:
        if sites[path].kind == "linear" and f"{path}.weight" in alone:
            bias = f"{path}.bias"
            found[path] = bias if bias in alone and access.may_train(every[bias]) else ""
    return found


def _fit(
    access: DeltaStorage, model: Any, tuned: Any, name: str, made: dict[str, _Small], fits: Mapping[str, str],
    after: Values, batches: list[Any], seed: int,
) -> list[str]:  # fmt: skip
    """Fit the deltas of linear layers to data, block by block in place; lines about those that stay as they are."""
    tensors = access.neutral(model)
    silent = []
    for path, pairs in fitted.fit(access, model, tuned, fits, batches):
        base = wide(access.value(access.weight(model, path))).astype(np.float32)
        bias = wide(after(fits[path])).astype(np.float32) if fits[path] else None
        spec, rng = made[path].spec, drawing(seed, path)
        target = wide(after(f"{path}.weight")).astype(np.float32)
        found = None if pairs is None else fitted.solve(base, target, bias, pairs, spec.rest, spec.rank, rng)
        if found is None:
            silent.append(path)
            continue
        made[path] = _Small(spec, found.parts, found.error)
        filling.fill_made(access, model, name, {path: found.parts})
        if found.bias is not None:
            access.fill(tensors[fits[path]], found.bias)
    rest_of = [path for path in made if path not in fits]
    notes = [f"{len(fits) - len(silent)} layers are fitted to the data, the others to the weights alone"]
    notes += [f"the data says nothing comparable of {len(silent)} layers: {silent[0]} ..."] if silent else []
    return notes if silent or rest_of else []


def _small(
    change: Array, layer: str, kind: str, bytes_ratio: float, rank: int | None, rng: np.random.Generator
) -> _Small:
    """The small delta of one weight."""
    rows = rest.flat(change)
    turned = layer in _TURNED
    outputs, inputs = rows.shape[::-1] if turned else rows.shape
    name = KINDS[kind]
    wanted = rank
    if wanted is None:
        fixed = len(rows) * (-(-rows.shape[1] // 8) + 4) if name else 0
        wanted = max(1, int((2 * rows.size * bytes_ratio - fixed) // (2 * (outputs + inputs))))
    wanted = min(wanted, outputs, inputs)
    parts: dict[str, Array] = {}
    left = rows
    if name:
        # First what low rank says best, then the signs of what it leaves; further turns gain a hundredth of the error.
        product = _product(rest.nearest(rows.T if turned else rows, wanted, rng), turned=turned)
        parts = dict(zip(rest.PARTS[name], rest.signs_of(rows - product), strict=True))
        left = rows - rest.dense(parts, rows.shape)
    a, b = rest.nearest(left.T if turned else left, wanted, rng)
    product = _product((a, b), turned=turned)
    error = float(np.linalg.norm(left - product) / np.linalg.norm(rows))
    if layer == "conv2d":
        a, b = a.reshape(len(a), *change.shape[1:]), b.reshape(*b.shape, 1, 1)
    spec = LoraSpec(rank=wanted, alpha=float(wanted), rest=name)
    return _Small(spec, {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b), **parts}, round(error, 4))


def _product(factors: tuple[Array, Array], *, turned: bool) -> Array:
    """b @ a as the weight's rows lie."""
    a, b = (half.astype(np.float32) for half in factors)
    found: Array = (b @ a).T if turned else b @ a
    return found


def _whole(access: DeltaStorage, every: Mapping[str, Any], after: Values, weights: set[str]) -> dict[str, Array]:
    """What differs and has no small delta, by its first name."""
    found = {}
    for group in base_values.common(every):
        if weights & set(group):
            continue
        before = access.value(every[group[0]])
        value = after(group[0])
        if not np.array_equal(bits(before), bits(value)) and not np.array_equal(wide(before), wide(value)):
            found[group[0]] = np.asarray(value, order="C")
    return found
