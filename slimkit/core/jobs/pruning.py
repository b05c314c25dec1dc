"""The job prune for a model of either framework in memory: what the options ask of a pruner, the cut, and its facts."""

from __future__ import annotations

import contextlib
from typing import Any

from slimkit.core.errors import ConfigError
from slimkit.core.jobs import timing
from slimkit.core.jobs.framework import JobResult
from slimkit.core.jobs.measurement import MISSED, goal, show
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.jobs.work import JobContext, count
from slimkit.core.prune.criteria import Criterion
from slimkit.core.prune.latency import LatencyTable

# What the words of a budget count.
_COUNTED = {"params": "parameters", "macs": "MACs", "kv_cache": "KV cache", "latency": "latency"}


# Why calibration data may be of no use to a command.
UNREAD = "the importance goes by weights alone (--importance output reads data), and --compensate was not given"


def set_up(
    pruner: Any, model: Any, options: PruneOptions, context: JobContext, *, keep: bool = True
) -> LatencyTable | None:
    """Set on a pruner what the options ask for; returns the table of its latency, where that is the budget.

    A table that is made here is kept in its file where `keep` says so.
    """
    importance: Any = options.importance
    if ":" in importance:
        importance = context.function(importance, "importance")
    own = isinstance(importance, type) and issubclass(importance, Criterion) and importance.needs
    measured = None
    if options.scored_by_data or own:
        measured = context.calibration(options.calibration_batches)
    elif importance == "auto" and pruner.is_language_model:
        try:
            measured = context.calibration()
        except ConfigError as error:
            raise ConfigError(
                f"{error}. Weights alone do not tell what a language model can lose; {context.spell('importance')} l1 "
                "goes by them all the same"
            ) from None
    pruner.set_importance_evaluation_function(importance, calibration=measured, seed=context.seed)
    if options.rotation:
        pruner.set_rotation(True)
    table = timing.table_for(pruner, model, options, context, keep) if options.budget == "latency" else None
    pruner.set_parallel(options.parallel).set_alignment(options.alignment).set_budget(options.budget, table)
    if options.form is not None:
        pruner.set_form(options.form)
    if options.node_reserved_ratio is not None:
        pruner.set_node_reserved_ratio(options.node_reserved_ratio)
    if options.allocation is not None:
        pruner.set_allocation(options.allocation)
    if options.compensation_batches:
        pruner.set_compensation(context.calibration(options.compensation_batches))
    return table


def prune(model: Any, options: PruneOptions, context: JobContext, *, plan_only: bool = False) -> JobResult:
    """Drop channels, heads and widths, in place; with `plan_only` the model is left as it is."""
    face = context.face
    before = count(face, model)
    pruner = face.slim.Pruner(model, context.example)
    table = set_up(pruner, model, options, context, keep=not plan_only)
    desc = None
    if plan_only:
        after, _ = pruner.analysis(options.reserved_ratio, options.un_prune_list)
        report = pruner.report()
    else:
        desc, report = _pruned(pruner, model, options, context, table)
        after = count(face, model)
    said = f"{show(before, 'count')} to {show(after, 'count')} parameters: {after / before:.3f} kept"
    if options.budget != "params":
        said += f"; of the {options.budget} {report['reached']:.3f}"
    if table is not None:
        said += f" ({timing.told(report['latency'])})"
    if "padding" in report:
        said += f"; {show(report['padding']['zeros'], 'count')} of them are padding"
    facts = {
        "headline": f"{said}, {options.reserved_ratio} asked for",
        "goal": goal(
            f"{_COUNTED[options.budget]} kept",
            options.reserved_ratio,
            report["reached"],
            report["reached"] > MISSED * options.reserved_ratio,
        ),
        "parameters_before": before,
        "parameters": after,
        "kept": after / before,
        "report": report,
    }
    return JobResult(model, edit=None if desc is None else {"prune": desc}, facts=facts)


def _pruned(
    pruner: Any, model: Any, options: PruneOptions, context: JobContext, table: LatencyTable | None
) -> tuple[dict[str, Any], Any]:
    """Prune, in place; the plan and the report, with the latency measured where that was the budget."""
    ready = "" if table is None else timing.timed_cut(model, table, context, count(context.face, model))
    with contextlib.nullcontext() if isinstance(ready, str) else ready:
        desc = pruner.prune(options.reserved_ratio, options.un_prune_list)
        report = pruner.report()
        if table is not None:
            report["latency"] = {**report["latency"], **timing.measured(ready, model)}
    return desc, report
