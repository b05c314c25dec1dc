"""MindSpore's own layers whose compiled form the rules could not read, in a spelling that they can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from slimkit_ms import bridge
from slimkit_ms.attention import PrunedMultiheadAttention

from mindspore import nn, ops

__all__ = ["bridge", "spelled_out"]


class RecurrentShapes(nn.layer.rnns._RNNBase):
    """What nn.RNN, nn.GRU and nn.LSTM read and make, without the steps through time: for tracing, never for results.

    Every gate and the state have the hidden width, which the recurrent weights read again; one number says that width
    for all layers and directions.
    """

    def construct(self, x: Any, hx: Any = None, seq_length: Any = None) -> Any:
        """The shapes of outputs and last states."""
        n_gates = self.w_hh_list[0].shape[0] // self.hidden_size
        n_sides = 2 if self.bidirectional else 1
        n_batch = x.shape[0] if self.batch_first else x.shape[1]
        start: Any = None
        if hx is not None:
            start = (hx[0] + hx[1]).mean((0, 1)) if self.is_lstm else hx.mean((0, 1))  # (hidden,)
        for layer in range(self.num_layers):
            sides: Any = ()
            for side in range(n_sides):
                place = layer * n_sides + side
                y = self.gates(ops.matmul(x, self.w_ih_list[place].T), self.b_ih_list, place, n_gates)
                y = y + self.gates(ops.matmul(y, self.w_hh_list[place].T), self.b_hh_list, place, n_gates)
                if start is not None:
                    y = y + start
                start = y.mean((0, 1))
                sides = (*sides, y)  # (time, batch, hidden) or (batch, time, hidden)
            x = ops.concat(sides, 2) if n_sides > 1 else sides[0]
        state = ops.broadcast_to(start.reshape((1, 1, -1)), (self.num_layers * n_sides, n_batch, self.hidden_size))
        return x, ((state, state) if self.is_lstm else state)

    def gates(self, y: Any, biases: Any, place: int, n_gates: int) -> Any:
        """The gates' values, (..., gates * hidden), as one of them."""
        if self.has_bias:
            y = y + biases[place]
        if n_gates == 1:
            return y
        parts = ops.split(y, self.hidden_size, axis=2)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


SPELLINGS: dict[type, type] = {
    nn.MultiheadAttention: PrunedMultiheadAttention,
    nn.RNN: RecurrentShapes,
    nn.GRU: RecurrentShapes,
    nn.LSTM: RecurrentShapes,
}


@contextlib.contextmanager
def spelled_out(model: nn.Cell) -> Iterator[None]:
    """The layers of the table are of our own classes while the context is open.

    So the operators that are compiled before a cut are those that are compiled after it.
    """
    turned = [(cell, type(cell)) for _, cell in model.cells_and_names() if type(cell) in SPELLINGS]
    try:
        for cell, kind in turned:
            cell.__class__ = SPELLINGS[kind]
        yield
    finally:
        for cell, kind in turned:
            cell.__class__ = kind
