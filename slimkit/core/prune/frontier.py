"""Plans for many budgets from one pass of calibration: the frontier of size and foretold loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimkit.core import check

if TYPE_CHECKING:
    from slimkit.core.prune.planning import PrunerPlanning

_ROUNDS = 20


def frontier_of(
    pruner: PrunerPlanning, ratios: Sequence[float], un_prune_list: Sequence[int | str] | None, nested: bool
) -> dict[str, Any]:
    """One plan a ratio; see `PrunerBase.frontier`.

    The hardest is planned first: it may cut whatever a milder one may, so that one pass of the calibration data tells
    the losses of all. Nested plans are made from mild to hard, none above where the last one stands.
    """
    if isinstance(ratios, (str, bytes)) or not isinstance(ratios, (list, tuple)):
        check.wrong_type("reserved_ratios", "a list of numbers", ratios)
    if not ratios:
        check.wrong_value("reserved_ratios", "a list of at least one ratio", ratios)
    wanted = {check.ratio(r, "reserved_ratios", one=True) for r in ratios}
    whole = pruner._wanted_whole(un_prune_list)
    hardest = min(wanted)
    points = {hardest: _point(pruner, hardest, whole, {})}
    if nested:
        points = _nested(pruner, sorted(wanted, reverse=True), whole)
    else:
        points.update({r: _point(pruner, r, whole, {}) for r in sorted(wanted - {hardest})})
    return {"points": [points[float(r)] for r in ratios], "nested": bool(nested)}


def _nested(pruner: PrunerPlanning, falling: Sequence[float], whole: list[str]) -> dict[float, dict[str, Any]]:
    points: dict[float, dict[str, Any]] = {}
    for rounds in range(_ROUNDS + 1):
        points, most = {}, dict[str, int]()
        levers = None
        for ratio in falling:
            points[ratio] = _point(pruner, ratio, whole, most)
            found = [(x.name, x.size, x.members) for x in pruner._levers]
            if levers is not None and found != levers:
                break  # its rehearsal found more to be tied together: what was planned before did not know
            levers, most = found, dict(pruner._steps)
        else:
            return points
        if rounds == _ROUNDS:
            pruner._begun().keep_everything(f"harder cuts contradicted milder ones {rounds} times")
    return points


def _point(pruner: PrunerPlanning, ratio: float, whole: list[str], most: dict[str, int]) -> dict[str, Any]:
    desc = pruner._planned(ratio, whole, most)
    made, variables = desc["made"], pruner._report["variables"]
    return {
        "asked": ratio,
        "reached": made["reached"],
        "left_params": made["left_params"],
        "foretold_loss": made.get("foretold_loss"),
        "widths": {layer: [v["keep"], v["size"]] for v in variables.values() for layer in v["layers"]},
        "plan": desc,
    }
