"""The forward passes of a trace: each example, in eval mode and where it says something new in training mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slimkit import bridge
from slimkit.core.batch import as_call
from slimkit.core.errors import GraphError
from slimkit.core.log import logger
from slimkit.core.prune.graph import Graph
from slimkit.trace.modes import mode, reads_training
from slimkit.trace.tracer import Recorder
from slimkit.trace.watch import answers, unmarked, watched

import torch
from torch import nn


class Run(NamedTuple):
    """One forward pass of a trace."""

    example: Any
    training: bool


class Trace:
    """A model's graph together with what it took to make it, so that it can be made again with other shapes.

    Args:
        graph: the neutral graph.
        real: whether the model had to be computed for real.
        runs: the forward passes that it is made of.
    """

    def __init__(self, graph: Graph, real: bool, runs: Sequence[Run]) -> None:
        self.graph = graph
        self.real = real
        self.runs = list(runs)


def trace(model: nn.Module, examples: Sequence[Any], real: bool | None = None) -> Trace:
    """Trace a model into the neutral graph: on each example, and in training mode where its code asks for the mode.

    Args:
        model: any torch module; it is not changed.
        examples: one or more, each a tensor, a tuple or list of arguments, or a dict of keyword arguments. Only shapes
            matter, and the values of whole-number tensors.
        real: True computes activations, False never does; None computes them only where shapes are not enough.

    Returns:
        The trace; passes that only repeat an earlier one are left out.

    Raises:
        GraphError: the model does not run on an example.
    """
    if not real:
        try:
            return _trace(model, examples, False)
        except Exception as error:
            if real is False:
                raise GraphError(
                    f"the model does not run on the example given: {type(error).__name__}: {error}"
                ) from error
            logger.info("shapes alone do not carry the trace (%s); computing it for real", error)
    try:
        return _trace(model, examples, True)
    except Exception as error:
        raise GraphError(f"the model does not run on the example given: {type(error).__name__}: {error}") from error


def _trace(model: nn.Module, examples: Sequence[Any], real: bool) -> Trace:
    recorder = Recorder(model, real)
    runs: list[Run] = []
    modes = (False, True) if reads_training(model) else (False,)
    for run in (Run(e, training) for e in examples for training in modes):
        mark = recorder.mark()
        try:
            record(recorder, model, run)
        except Exception as error:
            if not run.training:
                raise
            recorder.rewind(mark)
            note = f"traced in eval mode only: in training mode it does not run on the example ({error})"
            recorder.graph.notes.append(note)
            continue
        if runs and recorder.repeats():
            recorder.rewind(mark)
            continue
        runs.append(run)
    return Trace(recorder.graph, real, runs)


def record(recorder: Recorder, model: nn.Module, run: Run) -> None:
    """Run the model once under a recorder; after an error its graph holds what ran before."""
    args, kwargs = as_call(run.example)
    device = bridge.device_of(model)

    def prepare(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return recorder.input(value.to(device) if recorder.real else value)
        if isinstance(value, Mapping):
            return {k: prepare(v) for k, v in value.items()}
        if type(value) in (tuple, list):
            return type(value)(prepare(v) for v in value)
        return value

    args, kwargs = prepare(args), prepare(kwargs)
    recorder.scopes[:] = [""]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    watching = watched(model, recorder.scopes, recorder.crossed)
    try:
        with mode(model, run.training), unmarked(model), recorder.whole_modules(model), watching as layers, recorder:
            output = model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    graph = recorder.graph
    (graph.further if graph.ends else graph.layers).extend(layers)
    graph.outputs.extend(recorder.value(t) for t in answers(output))
    graph.ends.append(len(graph.nodes))
    recorder.finished(output)
