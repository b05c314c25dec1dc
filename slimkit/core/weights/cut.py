"""Cutting a large transformer's weights to a small model's shapes: the channels that stay, the slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core.checkpoint.weightfile import Array, Weights
from slimkit.core.errors import PlanError, UnsupportedError
from slimkit.core.log import logger, progress
from slimkit.core.weights import blocks
from slimkit.core.weights.activations import of_file
from slimkit.core.weights.blocks import PruneSpec
from slimkit.core.weights.coupling import Structure, WeightCoupling, couple
from slimkit.core.weights.heads import Index, best, choose_heads
from slimkit.core.weights.names import pair_names
from slimkit.core.weights.scores import Scores


@dataclass
class WeightPlan:
    """Which file tensor feeds which parameter, and which of its channels.

    Args:
        feeds: name in the model -> name in the file, for every tensor that is read.
        index: name in the model -> for each axis the kept positions, or None where all stay.
        report: copied, renamed, cut, initialised, unused, tied, ...: what `prune_model_weight` returns.
    """

    feeds: dict[str, str]
    index: dict[str, tuple[Index | None, ...]]
    report: dict[str, Any] = field(default_factory=dict)

    def tensors(self, source: Weights) -> Iterator[tuple[str, Array]]:
        """(name in the model, values of its shape), one at a time."""
        for name, origin in progress(list(self.feeds.items()), "tensors"):
            yield name, take(source.read(origin), self.index[name])


def plan_weights(
    structure: Structure,
    source: Weights,
    spec: PruneSpec,
    config: Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
) -> WeightPlan:
    """Decide for every tensor of a small model where its values come from.

    Args:
        structure: the small model.
        source: the large model's weights; read only where importance must be measured.
        spec: the steps and the selection.
        config: config.json of the large model, if there is one.
        strict: refuse a parameter without a source, a file tensor without a use, and a cut that cannot be coupled.

    Returns:
        The plan; nothing is changed by making it.

    Raises:
        ConfigError, PatternError: the blocks do not fit the file or the model.
        PlanError: names or shapes do not fit.
        UnsupportedError: the attention heads cannot be found.
    """
    spec.check()
    names: dict[str, str] = {n: n for n in source.entries}
    dropped: list[str] = []
    if spec.blocks:
        names, dropped = blocks.rename_blocks(source.entries, spec.blocks)
        blocks.check_targets(structure.targets, spec.blocks)
    paired = pair_names(structure.targets, names)
    aliases = _feed_tied_once(structure, paired)
    feeds = {target: names[found] for target, found in paired.items()}
    apart = _differing(source, {names[s]: feeds[fed] for s, fed in aliases.items()})
    if apart and strict:
        lost, taken = next(iter(apart.items()))
        raise PlanError(
            f"{lost} and {taken} hold different values, and the model ties them: give a model that does not "
            "(tie_word_embeddings=False). strict=False leaves the first one unused and reports it."
        )
    used = {*feeds.values(), *(names[s] for s in aliases if names[s] not in apart)}
    missing = [n for n in structure.targets if n not in feeds and not _fed_by_twin(n, structure, feeds)]
    unused = [n for n in source.entries if n not in used and n not in dropped]
    surplus = [n for n in unused if not _ignorable(n, structure)]
    if strict and (missing or surplus):
        raise PlanError(_mismatch(missing, surplus, spec))
    shapes = {n: source.entries[s].shape for n, s in feeds.items()}
    differing = [n for n, s in shapes.items() if s != structure.targets[n].shape]
    if differing and "prune_bert_intra_block" not in spec.steps:
        name = differing[0]
        raise PlanError(
            f"{name}: the model wants shape {list(structure.targets[name].shape)}, the file has {list(shapes[name])}. "
            "Add the step 'prune_bert_intra_block' to cut it."
        )
    coupling = (
        couple(structure, shapes, spec.head_size, config, fused_only=spec.selection == "first") if differing else None
    )
    plan = WeightPlan(feeds, {n: (None,) * len(s) for n, s in shapes.items()})
    choice: dict[str, Any] = {}
    if coupling is not None:
        _fill_index(plan, coupling, shapes, structure, source, spec, choice, strict)
    plan.report = {
        "selection": spec.selection,
        "copied": [n for n in feeds if n not in differing],
        "cut": {n: {"from": list(shapes[n]), "to": list(structure.targets[n].shape)} for n in differing},
        "renamed": {n: s for n, s in feeds.items() if n != s},
        "initialised": missing,
        "tied": sorted(n for group in structure.tied for n in group if n not in feeds and n not in missing),
        "unused": unused,
        "dropped": dropped,
        "choices": choice,
        "computed": _computed_anew(structure, coupling),
    }
    return plan


def _computed_anew(structure: Structure, coupling: WeightCoupling | None) -> list[str]:
    """The tables in no file whose features are as many as a cut leaves: the small model computes others than the large
    one's, whichever channels stay."""
    hidden = {
        use.variable
        for name, uses in (coupling.uses.items() if coupling is not None else ())
        for use in uses[1:]
        if use is not None and structure.targets[name].kind == "embedding"
    }
    left = {coupling.widths[key].target for key in hidden if key in coupling.widths} if coupling is not None else set()
    found = sorted(n for n, shape in structure.computed.items() if len(shape) > 1 and shape[-1] in left)
    if found:
        logger.warning(
            "%s: in no file, but computed by a formula for the width that is left, other numbers than the large model "
            "adds to the channels that stay; train the small model before it is used",
            ", ".join(found),
        )
    return found


def _feed_tied_once(structure: Structure, paired: dict[str, str]) -> dict[str, str]:
    """Leave one name of each tied group in `paired`, in place; returns the others' sources -> the name left."""
    aliases = {}
    for group in structure.tied:
        fed = [n for n in group if n in paired]
        for name in fed[1:]:
            aliases[paired.pop(name)] = fed[0]
    return aliases


def _differing(source: Weights, pairs: Mapping[str, str]) -> dict[str, str]:
    """The pairs of tensors that are not equal."""
    return {
        one: other
        for one, other in pairs.items()
        if source.entries[one].shape != source.entries[other].shape
        or not np.array_equal(source.read(one), source.read(other), equal_nan=True)
    }


def _fed_by_twin(name: str, structure: Structure, feeds: Mapping[str, str]) -> bool:
    return any(name in group and any(twin in feeds for twin in group) for group in structure.tied)


def _ignorable(name: str, structure: Structure) -> bool:
    return any(name == n or name.endswith("." + n) for n in structure.ignorable)


def _mismatch(missing: list[str], surplus: list[str], spec: PruneSpec) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} parameters of the model have no tensor in the file, such as {missing[0]!r}")
    if surplus:
        parts.append(f"{len(surplus)} tensors of the file have no place in the model, such as {surplus[0]!r}")
    hint = "" if spec.blocks else " Whole blocks are dropped by the step 'prune_blocks'."
    return "; ".join(parts) + f".{hint} strict=False loads what fits and reports the rest."


# --- which channels stay ---


def _fill_index(
    plan: WeightPlan,
    coupling: WeightCoupling,
    shapes: Mapping[str, tuple[int, ...]],
    structure: Structure,
    source: Weights,
    spec: PruneSpec,
    choice: dict[str, Any],
    strict: bool,
) -> None:
    """Choose the channels of every variable and write the positions into the plan, in place."""
    by_importance = spec.selection == "importance"
    loose = [k for k, w in coupling.widths.items() if "consumer" in w.uses and "producer" not in w.uses]
    if by_importance and loose and strict:
        readers = [n for n, uses in coupling.uses.items() if any(u and u.variable == loose[0] for u in uses)]
        raise UnsupportedError(
            f"{readers[0]}: nothing in the model was seen to write the axis that must be cut, so the channels to keep "
            'cannot be chosen consistently. Use set_selection("first"), or strict=False to take the first ones there.'
        )
    for key in loose if by_importance else ():
        logger.warning("%s: no writer of this width was found; its first channels stay.", key)
    scores = Scores(coupling)
    if by_importance:
        seen = of_file(spec.activations, source.entries, plan.feeds.values())
        for name, origin in progress(list(plan.feeds.items()), "tensors scored"):
            if any(coupling.uses[name]):
                scores.add(name, source.read(origin), seen.get(origin))
        _check_seen(scores, coupling, spec, strict)
    keeps: dict[str, Any] = {}
    for key, width in coupling.widths.items():
        ranked = by_importance and width.coupled
        keeps[key] = best(scores.width(key), width.target) if ranked else np.arange(width.target)
        choice[key] = scores.told_by(key) if ranked else "first"
    together: dict[str, dict[str, Array]] = {}
    for path, attention in coupling.attentions.items() if by_importance else ():
        added = together.get(attention.group)
        own = scores.attention(path)
        together[attention.group] = {k: own[k] + added[k] for k in own.keys() & added.keys()} if added else own
    for path, attention in coupling.attentions.items():
        keeps[path] = choose_heads(attention, together.get(attention.group), structure.rotary)
        choice[path] = {"heads": keeps[path].queries.tolist(), "key_heads": keeps[path].keys.tolist()}
    for name, uses in coupling.uses.items():
        index: list[Index | None] = []
        for axis, use in enumerate(uses):
            want, have = structure.targets[name].shape[axis], shapes[name][axis]
            if want == have:
                index.append(None)
            elif use is None:
                index.append(np.arange(want))
            elif use.variable in coupling.attentions:
                index.append(keeps[use.variable].positions(use.side))
            else:
                step = have // use.parts
                index.append(np.concatenate([keeps[use.variable] + part * step for part in range(use.parts)]))
            if index[-1] is not None and len(index[-1]) != want:
                raise PlanError(f"{name}: {len(index[-1])} channels stay on axis {axis} where the model wants {want}.")
        plan.index[name] = tuple(index)


def _check_seen(scores: Scores, coupling: WeightCoupling, spec: PruneSpec, strict: bool) -> None:
    """Refuse activations that say nothing of a choice that must be made; without `strict` its weights decide."""
    if spec.activations is None:
        return
    asked = [k for k, w in coupling.widths.items() if w.coupled] + list(coupling.attentions)
    for key in asked:
        if scores.told_by(key) == "activations":
            continue
        if strict:
            raise PlanError(
                f"the activations hold no layer that reads {key!r}, so they cannot say which of its channels to keep. "
                "Measure them on the file's own model, or pass strict=False to go by the weights there."
            )
        logger.warning("%s: the activations hold no layer that reads it; its weights decide.", key)


def take(values: Array, index: tuple[Index | None, ...]) -> Array:
    """Cut an array to the kept positions of each axis.

    Example:
        >>> take(np.arange(6).reshape(2, 3), (None, np.array([0, 2])))
        array([[0, 2],
               [3, 5]])
    """
    for axis, kept in enumerate(index):
        if kept is None:
            continue
        if len(kept) and kept[-1] - kept[0] == len(kept) - 1 and (np.diff(kept) == 1).all():
            values = values[(slice(None),) * axis + (slice(int(kept[0]), int(kept[-1]) + 1),)]  # no copy
        else:
            values = np.take(values, kept, axis=axis)
    return values
