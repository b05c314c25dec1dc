"""Prefixes for the attention cells of a model nobody edits: found in their source, extended where attention runs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.delta import prefix as rules
from slimkit.core.delta.named import OneAdapter
from slimkit.core.delta.prompt import call_with
from slimkit.core.errors import UnsupportedError
from slimkit.core.source.attention_method import edited_method, softmax_method
from slimkit.core.weights.heads import heads_told_by
from slimkit_ms import bridge, kinds
from slimkit_ms.delta.layer import DeltaLayer
from slimkit_ms.delta.multihead import METHODS, PrefixedMultiheadAttention
from slimkit_ms.delta.positions import shifted_classes, start_behind
from slimkit_ms.delta.prefix import PrefixLayer
from slimkit_ms.delta.prompt_model import token_table

import mindspore as ms
from mindspore import nn, ops

__all__ = ["Prefixed", "bridge", "find_attention", "put_prefix"]

ROWS = rules.ROWS


class Rows(nn.Cell):
    """A prefix as plain parameters: keys and values (tokens, heads * width)."""

    def __init__(self, key: Any, value: Any) -> None:
        super().__init__()
        self.key, self.value = ms.Parameter(key, name="key"), ms.Parameter(value, name="value")

    def construct(self) -> tuple[Any, Any]:
        return self.key, self.value


class ExtendingCell(nn.Cell):
    """What the edited source of an attention cell calls."""

    delta_acts: bool
    prefix_heads: int
    query_heads: int

    def prefix_rows(self) -> tuple[Any, Any]:
        """Keys and values (tokens, heads * width) of the prefix; nothing while it does not act."""
        if not self.delta_acts:
            return (None, None)
        return self.mindpet_delta_prefixtuning()

    def prefix_keys(self, keys: Any, transposed: bool, rows: Any) -> Any:
        """Keys with the prefix in front: (..., tokens, width), or (..., width, tokens) where not `transposed`."""
        if not self.delta_acts:
            return keys
        if transposed:
            return ops.concat((self._front(rows[0], keys), keys), -2)
        return ops.concat((self._front(rows[0], keys).swapaxes(-1, -2), keys), -1)

    def prefix_values(self, values: Any, rows: Any) -> Any:
        """Values (..., tokens, width) with the prefix in front."""
        if not self.delta_acts:
            return values
        return ops.concat((self._front(rows[1], values), values), -2)

    def prefix_mask(self, mask: Any, neutral: Any) -> Any:
        """A mask over the keys, wider by columns that change nothing; numbers and what broadcasts pass as they are."""
        if not self.delta_acts or not isinstance(mask, ms.Tensor):
            return mask
        if mask.ndim == 0 or mask.shape[-1] == 1:
            return mask
        return ops.concat((ops.full(mask.shape[:-1] + (self.prefix_tokens,), neutral, dtype=mask.dtype), mask), -1)

    def _front(self, rows: Any, like: Any) -> Any:
        """(tokens, heads * width) as the leading axes of `like` want it, tokens last but one."""
        count, heads = rows.shape[0], self.prefix_heads
        front = ops.cast(rows, like.dtype).reshape((count, heads, -1)).swapaxes(0, 1)  # (heads, tokens, width)
        width = front.shape[-1]
        if like.ndim == 2:
            return front[0]
        wanted = like.shape[1] if like.ndim == 4 else self.query_heads
        if wanted != heads:
            share = (heads, wanted // heads, count, width)
            front = ops.broadcast_to(front.reshape((heads, 1, count, width)), share)
            front = front.reshape((wanted, count, width))
        if like.ndim == 4:
            return ops.broadcast_to(front.reshape((1, wanted, count, width)), (like.shape[0], wanted, count, width))
        return ops.tile(front, (like.shape[0] // wanted, 1, 1))


class Prefixed(OneAdapter, DeltaLayer, ExtendingCell):
    """An attention cell with a prefix: the same object under a subclass of its own class."""

    delta_kind = "prefix"

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Path below the layer -> tensor of everything the prefix consists of."""
        rows = self._cells[ROWS]
        return {f"{ROWS}.{rules.torch_name(n)}": p for n, p in rows.parameters_and_names()}

    def keys_and_values(self) -> tuple[Any, Any]:
        """Keys and values (tokens, heads * width), as they are now."""
        return self._cells[ROWS]()

    @property
    def built_as_delta(self) -> bool:
        """Whether there is no plain layer to go back to: never, it is the same object."""
        return False

    def take_off_deltas(self) -> None:
        """Take the prefix off again, in place."""
        del self._cells[ROWS]
        for name in ("delta_specs", "active_deltas", "delta_acts", "prefix_heads", "query_heads", "prefix_tokens"):
            del self.__dict__[name]
        self.__class__ = type(self).__bases__[1]


class _Watched(ExtendingCell):
    """Notes the keys and values that an attention cell multiplies, and changes nothing."""

    def prefix_rows(self) -> tuple[Any, Any]:
        return (None, None)

    def prefix_keys(self, keys: Any, transposed: bool, rows: Any) -> Any:
        self.__dict__["seen_keys"] = keys if transposed else keys.swapaxes(-1, -2)
        return keys

    def prefix_values(self, values: Any, rows: Any) -> Any:
        self.__dict__["seen_values"] = values
        return values

    def prefix_mask(self, mask: Any, neutral: Any) -> Any:
        return mask


def _extended(cell: nn.Cell, kind: type) -> type:
    """The class of an attention cell with its keys and values extended by the methods of `kind`."""
    if isinstance(cell, nn.MultiheadAttention):
        PrefixedMultiheadAttention.check(cell)
        return type(f"{kind.__name__}{type(cell).__name__}", (kind, type(cell)), dict(METHODS))
    turned = frozenset(n for n, p in cell._primitives.items() if getattr(p, "transpose_b", False))
    name, method = edited_method(type(cell), "mindspore", turned)
    return type(f"{kind.__name__}{type(cell).__name__}", (kind, type(cell)), {name: method})


def _candidates(model: nn.Cell) -> tuple[dict[str, nn.Cell], dict[str, str]]:
    """Attention cells by path, and what looks like one but cannot be extended, with the reason."""
    fit: dict[str, nn.Cell] = {}
    unfit: dict[str, str] = {}
    for path, cell in model.cells_and_names():
        if not isinstance(cell, nn.MultiheadAttention) and softmax_method(type(cell), "mindspore") is None:
            continue
        try:
            rules.refuse_replaced([path] if "construct" in vars(cell) else [], "construct")
            _extended(cell, _Watched)
        except UnsupportedError as error:
            unfit[path] = str(error)
        else:
            fit[path] = cell
    return fit, unfit


def find_attention(model: nn.Cell, inputs: Any) -> dict[str, rules.Seen]:
    """Run the model once and see what its attention cells multiply.

    Args:
        model: any model whose attention is written as two products around a softmax, or is nn.MultiheadAttention.
        inputs: one batch.

    Returns:
        Path -> heads, width, and the keys and values of the first sample, of every attention cell that ran.

    Raises:
        ArgumentError: no inputs to run on.
        UnsupportedError: no attention was found; the message says what each candidate lacks.
    """
    cells, unfit = _candidates(model)
    if not cells:
        raise UnsupportedError(rules.nothing_found("a softmax between two matrix products", unfit))
    if inputs is None:
        check.wrong_value("inputs", "one batch to run the model on, to see where its attention is", inputs)
    classes = {path: type(cell) for path, cell in cells.items()}
    found = {}
    try:
        for cell in {id(c): c for c in cells.values()}.values():
            cell.__class__ = _extended(cell, _Watched)
        with bridge.pynative(), bridge.evaluating(model):
            bridge.run(model, inputs)
        batch = _batch_of(inputs)
        for path, cell in cells.items():
            if "seen_values" in cell.__dict__:
                found[path] = _seen(cell, cell.__dict__["seen_keys"], cell.__dict__["seen_values"], batch)
    finally:
        for path, cell in cells.items():
            cell.__class__ = classes[path]
            cell.__dict__.pop("seen_keys", None)
            cell.__dict__.pop("seen_values", None)
    if not found:
        raise UnsupportedError(rules.nothing_found("a softmax between two matrix products", unfit))
    return found


def _batch_of(inputs: Any) -> int:
    args, kwargs = as_call(inputs)
    parts = (*args, *kwargs.values())
    return next((int(p.shape[0]) for p in parts if isinstance(p, ms.Tensor) and p.ndim), 1)


def _seen(cell: nn.Cell, keys: Any, values: Any, batch: int) -> rules.Seen:
    """Heads and width by the shapes: (batch, heads, tokens, width), (batch * heads, tokens, width), (tokens, width)."""
    told = heads_told_by(cell) or heads_told_by(getattr(cell, "config", None))
    heads = int(keys.shape[1]) if keys.ndim == 4 else int(keys.shape[0]) // batch if keys.ndim == 3 else 1
    few = told.keys if told is not None and told.keys and heads % told.keys == 0 else heads
    first = [bridge.as_numpy(t.astype(ms.float32)).reshape((-1, heads, *t.shape[-2:]))[0] for t in (keys, values)]
    rows = [t[:: heads // few].transpose(1, 0, 2).reshape(t.shape[1], -1) for t in first]
    return rules.Seen(few, int(keys.shape[-1]), heads, rows[0], rows[1])


def sizes_by_config(model: nn.Cell, heads: int, key_width: int) -> dict[str, tuple[int, int, int]]:
    """Every attention cell with heads of its keys, width of a head and heads of its queries, as PEFT counts them."""
    cells, _ = _candidates(model)
    told = {path: heads_told_by(cell) for path, cell in cells.items()}
    return {path: (heads, key_width // heads, t.queries if t else heads) for path, t in told.items()}


def put_prefix(model: nn.Cell, targets: Any, *, name: str, dtype: Any, strict: bool, **options: Any) -> Any:
    """Give attention cells a prefix, in place; see `apply_delta`. Returns path -> options of each layer."""
    plan = rules.checked(**options)
    plan = replace(plan, text_ids=plan.ids(lambda: len(kinds.weight_of(token_table(model)))))
    inputs = plan.inputs if plan.text_ids is None else _text(model, plan.text_ids)
    seen = rules.given_sizes(plan, _candidates(model)[0] if plan.sizes else {}) or find_attention(model, inputs)
    seen = rules.chosen(seen, targets, strict)
    cells = {path: bridge.get_module(model, path) for path in seen}
    rules.refuse_taken([p for p, c in cells.items() if isinstance(c, DeltaLayer)])
    rules.refuse_replaced([p for p, c in cells.items() if "construct" in vars(c)], "construct")
    made = {path: _rows(seen[path], plan, dtype or ms.float32) for path in seen}
    classes = {path: _extended(cell, Prefixed) for path, cell in cells.items()}
    counting = shifted_classes(model, plan.counting(p for p, _ in model.cells_and_names()) or ())
    described = {}
    for path, cell in cells.items():
        cell.__class__ = classes[path]
        cell.insert_child_to_cell(ROWS, made[path])
        for key, parameter in made[path].parameters_and_names():
            parameter.name = f"{path}.{ROWS}.{key}" if path else f"{ROWS}.{key}"
        cell.prefix_heads, cell.query_heads = seen[path].heads, seen[path].query_heads
        cell.prefix_tokens = plan.prefix_token_num
        described[path] = plan.record(seen[path], bool(counting))
        cell.carry_delta(described[path], name)
    start_behind(model, plan.prefix_token_num, counting)
    bridge.forget_graphs(model)
    return described


def _text(model: nn.Cell, ids: list[int]) -> dict[str, Any]:
    """What the model is called with to read a text alone."""
    parameters = list(inspect.signature(type(model).construct).parameters.values())
    read = call_with(parameters, type(model).__name__, ids)
    return {name: ms.Tensor(value, ms.int32) for name, value in read.items()}


def _rows(seen: rules.Seen, plan: rules.PrefixOptions, dtype: Any) -> nn.Cell:
    width = seen.heads * seen.width
    if plan.projection:
        return PrefixLayer(plan.prefix_token_num, 1, seen.heads, width, width, plan.mid_dim, plan.dropout_rate)
    if plan.text_ids is not None:
        return Rows(ms.Tensor(seen.key, dtype), ms.Tensor(seen.value, dtype))
    shape = (plan.prefix_token_num, width)
    return Rows(ops.standard_normal(shape).astype(dtype), ops.standard_normal(shape).astype(dtype))
