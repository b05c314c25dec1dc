"""The budget latency of a pruning job: a table that is read or made here, and what the cut network takes in truth."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.log import logger
from slimkit.core.prune.latency import LatencyTable
from slimkit.core.prune.measuring import measure
from slimkit.core.prune.onnx_times import TimedCut

if TYPE_CHECKING:
    from slimkit.core.jobs.work import JobContext

# Larger networks are not written as files once more, only to see what the cut one takes.
_MOST_BYTES = 1 << 30


def table_for(pruner: Any, model: Any, options: PruneOptions, context: JobContext, keep: bool) -> LatencyTable:
    """The table that foretells a network's latency: the one in the file, or what is measured here and kept in it.

    Args:
        pruner: of the network.
        model: the network.
        options: of the job.
        context: gives the example, of the size that the network serves.
        keep: whether the file is written.

    Raises:
        ConfigError: there is no folder to keep the table in.
        FileFormatError: the file is no table; or one of another device, and without this network.
    """
    assert options.latency_table is not None
    key, file = context.spell("latency_table"), context.file(options.latency_table)
    if file.exists():
        table = LatencyTable.read(file)
        if pruner.is_timed_by(table):
            return table
    if not file.parent.is_dir():
        raise ConfigError(f"{key}: there is no folder {file.parent} to keep the table in")
    logger.info("measuring the latency of the network's layers by their widths%s", f", for {file}" if keep else "")
    face, inputs = context.face, context.example
    with face.evaluating(model):
        return measure(
            face.latency_times(model, inputs),
            copy.deepcopy(model),
            lambda other: face.slim.Pruner(other, inputs),
            file if keep else None,
            options.alignment,
        )


def timed_cut(model: Any, table: LatencyTable, context: JobContext, size: int) -> TimedCut | str:
    """A network made ready to be timed before and after its cut; or why it is not timed, in words.

    Args:
        model: the network.
        table: that its cut goes by.
        context: gives the example.
        size: numbers in its parameters.
    """
    if 4 * size > _MOST_BYTES:
        return f"its file would be larger than {_MOST_BYTES >> 30} GB"
    try:
        times = context.face.latency_times(model, context.example)
        if (times.device, times.runtime) != (table.device, table.runtime):
            return f"the table is of another device: {table.device} ({table.runtime})"
        return TimedCut(times, model)
    except SlimkitError as error:  # the cut goes by the table, and needs no file
        return str(error)


def measured(ready: TimedCut | str, model: Any) -> dict[str, Any]:
    """What a report says of a cut network's latency in truth: milliseconds, or why there are none.

    Args:
        ready: what `timed_cut` returned before the cut.
        model: the cut network.
    """
    if isinstance(ready, str):
        return {"measured": None, "not_measured": ready}
    try:
        before, after = ready.ms(model)
    except SlimkitError as error:
        return {"measured": None, "not_measured": str(error)}
    return {"measured": {"before_ms": before, "after_ms": after}}


def told(latency: Mapping[str, Any]) -> str:
    """The latency in a report, in words."""
    said = f"{latency['before_ms']:.3g} to {latency['after_ms']:.3g} ms foretold"
    found = latency.get("measured")
    if found:
        return f"{said}, {found['before_ms']:.3g} to {found['after_ms']:.3g} ms measured"
    return said + (f", not measured: {latency['not_measured']}" if "not_measured" in latency else "")
