"""What the layers of a MindSpore cell are given, and how much the cell's loss depends on what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.batch import without_labels
from slimkit.core.calibration.halves import has_encoder
from slimkit.core.padding import Padding
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.signals import SignalSums, sent_back
from slimkit_ms import bridge, kinds
from slimkit_ms.replay import replaying

import mindspore as ms
from mindspore import nn, ops

Array = np.ndarray[Any, Any]


def unsuited(cell: nn.Cell) -> str | None:
    """Why a layer is no plain product of its inputs with one matrix, or None."""
    kind = kinds.kind_of(cell)
    if kind is not None and kind.word == "conv":
        if kind.transposed or kinds.groups_of(cell) != 1:
            return "grouped or transposed"
        if kind.space != 2 or kinds.padding_mode_of(cell) != "zeros":
            return "not a plain Conv2d"
    elif kind is None or kind.word != "linear":
        return "not a plain Conv2d or Dense"
    return None if kinds.activation_of(cell) is None else "an activation of its own hides its outputs"


def input_rows(cell: nn.Cell, x: Array) -> Array:
    """What a layer multiplies with its weights: one row for each output position, (n, inputs)."""
    if not kinds.is_kind(cell, "conv"):
        return x.reshape(-1, x.shape[-1])
    strides, dilations = kinds.steps_of(cell, "stride"), kinds.steps_of(cell, "dilation")
    spans = tuple((k - 1) * d + 1 for k, d in zip(cell.kernel_size, dilations))
    x = np.pad(x, [(0, 0), (0, 0), *kinds.pads_of(cell, x.shape[2:])])
    # (batch, channels, height, width, *window), thinned by stride and dilation
    windows: Array = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(2, 3))  # type: ignore[call-overload]
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, cell.weight[0].size)


def output_rows(cell: nn.Cell, y: Array) -> Array:
    """What a layer says: one row for each output position, (n, outputs)."""
    y = np.moveaxis(y, 1, -1) if kinds.is_kind(cell, "conv") else y
    return y.reshape(-1, y.shape[-1])


def padding_of(model: nn.Cell, batch: Any) -> Padding:
    """The masks of a batch."""

    def to_array(value: Any) -> Any:
        tensor = bridge.tensors(value)
        return bridge.as_numpy(tensor) if isinstance(tensor, ms.Tensor) and tensor.ndim == 2 else None

    return Padding(batch, model.construct, to_array, has_encoder(model))


def real_rows(padding: Padding, path: str, x: Array) -> Array:
    """An array that a layer is given or says, or a cell answers, without its rows of padding."""
    real = padding.real(path, x.shape)
    return x if real is None else x[real]


def layer_signals(
    model: nn.Cell, data: Iterable[Any], layers: Sequence[str], loss: Callable[..., Any] | None, seed: int
) -> dict[str, LayerSignal]:
    """Send calibration data through a cell and its loss back, watching some layers.

    Args:
        model: the cell.
        data: batches.
        layers: paths of layers; those that are no plain product are left out.
        loss: (outputs, batch) -> scalar. Unset: of a cell with logits, how far its answers move (the divergence of its
            own probabilities); of another, the square of its first output.
        seed: of the random signs that stand for the second derivative of the loss.

    Returns:
        layer -> its signal.
    """
    cells = {p: c for p in layers if unsuited(c := bridge.get_module(model, p)) is None}
    sums = SignalSums(seed)
    for batch in data:
        padding = padding_of(model, batch)
        made: list[tuple[str, Array]] = []  # each call of a layer, and the shape of what it said

        def seen(path: str, inputs: Any, output: Any) -> None:
            rows = input_rows(cells[path], real_rows(padding, path, _numbers(inputs[0])))  # noqa: B023
            sums.given(path, rows.T.astype(np.float64) @ rows, len(rows))
            made.append((path, _numbers(output)))  # noqa: B023

        with replaying(model) as run, bridge.hooked(cells, seen):
            given = batch if loss is None else without_labels(batch, model.construct)
            signs = None if loss is not None else _signs(run(given), padding, sums)
        if loss is not None:
            sums.answered(1)
        shifts = tuple(ms.Tensor(np.zeros_like(y)) for _, y in made)
        for (path, y), slope in zip(made, _slopes(model, cells, given, batch, loss, signs, shifts)):
            slopes = output_rows(cells[path], real_rows(padding, path, slope.reshape(y.shape)))
            sums.sloped(path, np.square(slopes, dtype=np.float64).sum(0))
    return sums.means()


def _slopes(
    model: nn.Cell,
    cells: Mapping[str, nn.Cell],
    given: Any,
    batch: Any,
    loss: Callable[..., Any] | None,
    signs: ms.Tensor | None,
    shifts: tuple[ms.Tensor, ...],
) -> list[Array]:
    """The loss's derivative by what each call of the layers says: by a zero that is added to it."""

    def lost(*added: ms.Tensor) -> ms.Tensor:
        waiting = iter(added)

        def shifted(_path: str, _inputs: Any, output: Any) -> Any:
            return output + next(waiting).astype(output.dtype)

        with bridge.hooked(cells, shifted):
            args, kwargs = bridge.call_of(given)
            output = model(*args, **kwargs)
        if loss is not None:
            return loss(output, bridge.tensors(batch))
        return ops.sum(_answer(output)[0].astype(ms.float32) * signs)

    if not shifts:
        return []
    with replaying(model), bridge.whole_gradient():
        found = ms.grad(lost, grad_position=tuple(range(len(shifts))))(*shifts)
    return [_numbers(slope) for slope in (found if isinstance(found, tuple) else (found,))]


def _answer(output: Any) -> tuple[ms.Tensor, bool]:
    """What a cell answers, and whether it is logits."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, ms.Tensor):
        return logits, logits.shape[-1] > 1
    while not isinstance(output, ms.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output, False


def _signs(output: Any, padding: Padding, sums: SignalSums) -> ms.Tensor:
    answer, is_logits = _answer(output)
    values = _numbers(answer)
    real = padding.real("", values.shape)
    mask = np.ones(values.shape[:-1], dtype=bool) if real is None else real
    signs = np.zeros_like(values)
    signs[mask] = sent_back(sums.random, values[mask] if is_logits else None, values[mask].shape)
    sums.answered(int(mask.sum()))
    return ms.Tensor(signs)


def _numbers(tensor: ms.Tensor) -> Array:
    # By way of float32: bfloat16 tensors give no array.
    found: Array = tensor.astype(ms.float32).asnumpy()
    return found
