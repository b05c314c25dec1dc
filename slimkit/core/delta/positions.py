"""Positions that start behind a prefix: which modules are given them, and what a file's prefix asks for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from slimkit.core.errors import UnsupportedError
from slimkit.core.log import logger

# What Hugging Face calls the modules that are given position numbers.
_COUNTING = ("wpe", "position_embeddings", "position_embedding", "embed_positions", "rotary_emb")


class NoPositionsError(UnsupportedError):
    """A module named in `positions` was called without whole numbers."""


def recognised(paths: Iterable[str]) -> list[str]:
    """The modules that are given position numbers, by the names that Hugging Face gives them.

    Example:
        >>> recognised(["words", "layers.0", "model.rotary_emb"])
        ['model.rotary_emb']
    """
    return [p for p in paths if p.rpartition(".")[2] in _COUNTING]


def no_positions(class_name: str) -> str:
    """What to say where a module was called without positions."""
    return (
        f"{class_name} was named as a module that gets positions, but no tensor of whole numbers was passed to it. "
        f"Let it take the positions as a tensor, or name another module in positions=[...]."
    )


def unknown_positions(where: str) -> str:
    """What to say where a file's prefix shifts positions and nothing in the model is known to hold them."""
    return (
        f"with the prefix in {where} positions start behind it, as in Hugging Face models; this model has no module "
        f"named like one that is given positions ({', '.join(_COUNTING)}). Name it with load_delta(..., "
        f"positions=[...]); positions=[] leaves positions as they are, and outputs differ."
    )


def shifted_source(parameters: Sequence[inspect.Parameter], class_name: str) -> str:
    """The source of a construct that shifts the positions among its inputs and calls the cell's own.

    It calls ``is_position(input)``, ``shifted(input)`` and ``construct_unshifted(...)`` of the object.

    Raises:
        UnsupportedError: the construct collects its inputs with ``*`` or ``**``, or has none.

    Example:
        >>> ids = inspect.Parameter("ids", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        >>> print(shifted_source([ids.replace(name="self"), ids], "Net").splitlines()[-1].strip())
        return self.construct_unshifted(self.shifted(ids))
    """
    names = [p.name for p in parameters[1:]]
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    if not names or any(p.kind not in plain for p in parameters):
        raise UnsupportedError(f"positions cannot be shifted in {class_name}: it needs plain arguments.")
    signature = [p.name if p.default is p.empty else f"{p.name}=None" for p in parameters[1:]]
    return (
        f"class {class_name}:\n"
        f"    def construct({', '.join(['self', *signature])}):\n"
        f"        if not ({' or '.join(f'self.is_position({n})' for n in names)}):\n"
        f"            raise TypeError({no_positions(class_name)!r})\n"
        f"        return self.construct_unshifted({', '.join(f'self.shifted({n})' for n in names)})"
    )


def positions_for(access: Any, model: Any, shift: bool, given: Any, where: str) -> Any:
    """What `apply_delta` shall take for `positions`, so that they start behind a file's prefix as they did there."""
    if given is not None:
        return given
    if not shift:
        return []
    known = access.positions(model)
    if known == []:
        raise UnsupportedError(unknown_positions(where))
    if known is not None:
        logger.info("positions given to %s start behind the prefix", ", ".join(known))
    return known


def counted(access: Any, model: Any, delta: dict[str, Any], given: Any, where: str) -> dict[str, Any]:
    """The record of a prefix, with the modules that count positions here in place of whether they are shifted."""
    if delta.get("kind") != "prefix":
        return delta
    shift = any(record.get("shift") for record in delta["layers"].values())
    found = positions_for(access, model, shift, given, where)
    layers = {p: {k: v for k, v in r.items() if k != "shift"} for p, r in delta["layers"].items()}
    return {**delta, "layers": {p: {**r, "positions": found} for p, r in layers.items()}}
