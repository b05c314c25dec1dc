"""What a pruner reports of a model: its coupling, and what an allocation made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.log import logger
from slimkit.core.prune.allocate import Account, Allocation
from slimkit.core.prune.solve import View


def coupled(view: View) -> dict[str, Any]:
    """What a coupling says: sizes, variables, what stays whole and why, operators without a rule."""
    graph = view.coupling.graph
    return {
        "params": sum(int(np.prod(s)) for p, s in graph.shapes.items() if p not in graph.buffers),
        "variables": {
            v.name: {
                "size": v.size,
                "kind": v.kind,
                "layers": list(v.layers),
                "axes": [f"{p}:{a}" for p, a, _ in v.places],
            }
            for v in view.variables
        },
        "whole": {reason: list(places) for reason, places in view.whole.items()},
        "without_rule": [f"{name} in {scope or 'the model'}" for name, scope in view.coupling.relations.opaque],
        "notes": list(dict.fromkeys(graph.notes)),
    }


def allocated(
    view: View,
    allocation: Allocation,
    account: Account,
    left: int,
    ratio: float,
    budget: str,
    quiet: bool = False,
    copied: int = 0,
    chosen: str | None = None,
) -> dict[str, Any]:
    """The same, with what each variable keeps and how near that comes to what was asked.

    Args:
        view: the coupling.
        allocation: what each variable keeps.
        account: what the ratio counts.
        left: parameters of the cut model.
        ratio, budget: what was asked for.
        quiet: log nothing.
        copied: parameters of a tied table that rotation must hold twice.
        chosen: how the allocation was found: "uniform", "global" or "measured".
    """
    report = coupled(view)
    before = account.count(np.array(list(view.counts.values()), dtype=np.int64))
    if budget == "params":
        before -= copied
    for name, entry in report["variables"].items():
        entry["keep"] = allocation.keep[name]
    report.update(
        asked=ratio,
        budget=budget,
        reached=allocation.total / before if before else 1.0,
        left_params=left,
        held_back=[
            {"variable": n, "layers": report["variables"][n]["layers"], "keeps": allocation.keep[n]}
            for n in allocation.held_back
        ],
    )
    missed = allocation.total > allocation.target * 1.02
    stuck = missed and not allocation.held_back and any(k < view.counts[n] for n, k in allocation.keep.items())
    if allocation.total < allocation.target * 0.98 or stuck:
        wide = (
            "of the widths that alignment and heads allow, these are foretold to lose least"
            if chosen == "measured" and not stuck
            else "the widths that alignment and heads allow lie too far apart to come nearer"
        )
        report["notes"].append(f"asked to keep {ratio:.3f}, keeps {report['reached']:.3f}: {wide}")
        if not quiet:
            logger.warning("asked to keep %.3f of the %s, keeps %.3f: %s", ratio, budget, report["reached"], wide)
    if missed and not allocation.held_back and not stuck:
        report["notes"].append("nothing more can be pruned: every other axis stays whole")
    if missed and not stuck and not quiet:
        logger.warning(
            "asked to keep %.3f of the %s, reached %.3f; report() says what holds it back",
            ratio,
            budget,
            report["reached"],
        )
    return report


def padding(view: View, kept: Mapping[str, int], held: Mapping[str, int], live: int, params: int) -> dict[str, Any]:
    """What a padded cut costs: parameters that are kept and held, and the layers whose widths hold zeros.

    Args:
        view: the coupling.
        kept: variable -> indices that stay.
        held: variable -> indices that the cut model has, the others zero.
        live: parameters that belong to what stays.
        params: parameters of the cut model.
    """
    widths = {n: [kept[n], held[n]] for n in held if kept[n] < held[n]}
    whole = [v.layers[0] for v in view.variables if v.kind == "hidden" and v.layers and held[v.name] == v.size]
    return {
        "params": params,
        "live_params": live,
        "zeros": params - live,
        "widths": {layer: widths[v.name] for v in view.variables if v.name in widths for layer in v.layers},
        "not_padded": whole,
    }
