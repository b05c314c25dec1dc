"""Virtual tokens in front of a model nobody edits: its inputs grow, and its token embedding answers with the prompt."""

from __future__ import annotations

import inspect
from typing import Any

from slimkit.core.delta import prompt as rules
from slimkit.core.delta.named import OneAdapter
from slimkit.core.delta.prefix import refuse_replaced, torch_name
from slimkit.core.source.generated import method_from
from slimkit_ms import bridge, kinds
from slimkit_ms.delta.layer import DeltaLayer
from slimkit_ms.delta.prompt import PromptTuning

import mindspore as ms
from mindspore import nn, ops

__all__ = ["PromptFront", "bridge", "put_prompt"]

FRONT = rules.FRONT


class PromptFront(OneAdapter, DeltaLayer, PromptTuning):
    """The virtual tokens of one model, as a child of its token embedding."""

    delta_kind = "prompt"

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Path below the layer -> tensor of everything the prompt consists of."""
        return {torch_name(n): p for n, p in self.parameters_and_names()}

    @property
    def built_as_delta(self) -> bool:
        """Whether there is nothing to go back to: never, it stands beside the model."""
        return False

    def set_active_deltas(self, weights: dict[str, float]) -> None:
        """Let the prompt act if it is among these, in place."""
        super().set_active_deltas(weights)
        for cell in self.__dict__["_owners"]:
            cell.prompt_acts = self.delta_acts

    def take_off_deltas(self) -> None:
        """Take the prompt off its model, in place."""
        model, embedding = self.__dict__["_owners"]
        del embedding._cells[FRONT]
        for cell in (model, embedding):
            del cell.__dict__["prompt_tokens"], cell.__dict__["prompt_acts"]
            cell.__class__ = type(cell).__bases__[-1]


class _Prompted(nn.Cell):
    """An embedding whose first tokens are the prompt: the same object under a subclass of its own class."""

    def construct(self, input_ids: Any) -> Any:
        out = self.construct_without_prompt(input_ids)
        if not self.prompt_acts:
            return out
        rows = self.mindpet_delta_prompttuning.mindpet_delta_prompttuning_embedding.embedding_table
        rows = ops.cast(rows, out.dtype).reshape((1,) * (out.ndim - 2) + rows.shape)
        rows = ops.broadcast_to(rows, out.shape[:-2] + rows.shape[-2:])
        return ops.concat((rows, out[..., self.prompt_tokens :, :]), -2)


class _Fronted(nn.Cell):
    """A model whose inputs grow by the prompt's length: the same object under a subclass of its own class."""

    def prompt_fill(self, given: Any, value: Any) -> Any:
        """(batch, tokens) with `value` in front for every virtual token; None stays None."""
        if given is None or not self.prompt_acts:
            return given
        if given.ndim != 2:
            raise ValueError("a prompt needs ids and masks of shape (batch, tokens)")
        return ops.concat((ops.full((given.shape[0], self.prompt_tokens), value, dtype=given.dtype), given), 1)

    def prompt_places(self, given: Any, value: Any) -> Any:
        """(batch, tokens) positions that begin behind the virtual tokens."""
        if given is None or not self.prompt_acts:
            return given
        front = ops.arange(self.prompt_tokens).astype(given.dtype).reshape((1, -1))
        front = ops.broadcast_to(front, (given.shape[0], self.prompt_tokens))
        return ops.concat((front, given + self.prompt_tokens), 1)


def token_table(model: nn.Cell, targets: Any = None) -> nn.Cell:
    """The cell that turns token ids into vectors."""
    cells = {p: c for p, c in model.cells_and_names() if kinds.is_kind(c, "embedding")}
    tables = {p: c for p, c in cells.items() if not isinstance(c, DeltaLayer)}
    return tables[rules.embedding_path({p: len(kinds.weight_of(c)) for p, c in tables.items()}, targets)]


def put_prompt(model: nn.Cell, targets: Any, *, name: str, dtype: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """Put virtual tokens in front of a model, in place; see `apply_delta`. Returns path -> options of the prompt."""
    plan = rules.checked(**options)
    tokens, embedding = plan.tokens, token_table(model, targets)
    rules.refuse_taken(FRONT in embedding._cells or hasattr(model, "prompt_tokens"))
    replaced = {"the token embedding": embedding, "": model}
    refuse_replaced([path for path, cell in replaced.items() if "construct" in vars(cell)], "construct")
    inputs = list(inspect.signature(type(model).construct).parameters.values())
    source = rules.fronted_source(inputs, type(model).__name__)
    table = kinds.weight_of(embedding)
    ids = plan.ids(len(table))
    front: Any = PromptFront(tokens, int(table.shape[1]))
    rows = front.mindpet_delta_prompttuning_embedding.embedding_table
    values = bridge.as_numpy(rows if ids is None else table.astype(ms.float32))
    rows.set_data(ms.Tensor(values if ids is None else values[ids], dtype or ms.float32))
    rows.set_dtype(dtype or ms.float32)
    construct = method_from(source, type(model).__name__, _outer(model))
    path = next(p for p, c in model.cells_and_names() if c is embedding)
    prefix = f"{path}.{FRONT}" if path else FRONT
    front.carry_delta({"num_virtual_tokens": tokens}, name)
    front.__dict__["_owners"] = (model, embedding)
    embedding.insert_child_to_cell(FRONT, front)
    for key, parameter in front.parameters_and_names():
        parameter.name = f"{prefix}.{key}"
    for cell, extra, methods in (
        (embedding, _Prompted, {"construct": _Prompted.construct}),
        (model, _Fronted, {"construct": construct}),
    ):
        cell.prompt_tokens, cell.prompt_acts = tokens, True
        own = {**methods, "construct_without_prompt": type(cell).construct}
        cell.__class__ = type(f"Prompted{type(cell).__name__}", (extra, type(cell)), own)
    bridge.forget_graphs(model)
    return {prefix: {"num_virtual_tokens": tokens}}


def _outer(model: nn.Cell) -> Any:
    """The construct that the model had, whose globals and defaults the new one takes."""
    return inspect.unwrap(type(model).construct)
