"""What is known of experts that a module keeps in one parameter with three axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimkit.core.sparse.maths.backend import Array, device_of, namespace, to_numpy

# The two ways in which the weight of an expert may lie: (out, in) and (in, out).
OTHER_KIND = {"linear": "conv1d", "conv1d": "linear"}


@dataclass(frozen=True)
class Fused:
    """The parameters of one module that hold all of its experts.

    Args:
        keys: their names in the module.
        kind: the core's word for one expert: "linear" for (out, in), "conv1d" for (in, out).
        told: whether the module itself says its layout; otherwise it is a guess.
        unclear: parameters with three axes of which the module does not say that they hold experts.
    """

    keys: tuple[str, ...]
    kind: str
    told: bool
    unclear: tuple[str, ...] = ()


UNCLEAR = "it has three axes, and its module names no experts (a number of them, or its class)"


def fused(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> Fused:
    """The parameters with three axes of a module that says that it has experts.

    It says so by its class's name, or by a number of experts among its attributes that the first axis has.

    Args:
        module: a module of any framework.
        shapes: its own parameters' shapes by name.

    Example:
        >>> class Experts:
        ...     pass
        >>> fused(Experts(), {"up": (4, 24, 16), "down": (4, 16, 24), "bias": (4, 24)})
        Fused(keys=('up', 'down'), kind='linear', told=False, unclear=())
    """
    counts = {v for k, v in vars(module).items() if "expert" in k and type(v) is int}
    named = "expert" in type(module).__name__.lower()
    deep = {key: shape for key, shape in shapes.items() if len(shape) == 3 and min(shape) > 1}
    found = {key: shape for key, shape in deep.items() if named or shape[0] in counts}
    told = getattr(module, "is_transposed", None)  # transformers' word for (experts, in, out)
    transposed = told if isinstance(told, bool) else _fit_transposed(found.values())
    unclear = tuple(key for key in deep if key not in found)
    return Fused(tuple(found), "conv1d" if transposed else "linear", isinstance(told, bool), unclear)


def _fit_transposed(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether two parameters only fit together as (experts, in, out): what the first gives out, the second takes in.

    A gate makes the first one wider than what the second takes, so the hidden width alone is in both.
    """
    pairs = [shape[1:] for shape in shapes]
    if len(pairs) != 2:
        return False
    (a, b), (c, d) = pairs
    return a == d and b != c


def learn_layouts(
    layers: dict[str, Any],
    slots: dict[str, Any],
    dataset: Iterable[Any] | None,
    watch: Callable[[Mapping[str, Any], Any, Callable[[str], None]], None],
) -> None:
    """Correct, in place, guessed layouts of experts that a batch shows to be the other one.

    Args:
        layers: the layers by name.
        slots: where their weights lie; a slot says by `learn` whether its kind is a guess, and by `place` which
            parameter it is in, since the experts of one lie alike.
        dataset: batches, of which one is sent through; None when none may be.
        watch: sends a batch through and calls its last argument with each of these slots' layers that is read turned.
    """
    guessed = {name: slot for name, slot in slots.items() if slot.learn and name in layers}
    turned: set[tuple[str, str]] = set()
    for batch in itertools.islice(() if dataset is None else dataset, 1 if guessed else 0):
        watch(guessed, batch, lambda name: turned.add(guessed[name].place))
    for name, slot in guessed.items():
        if slot.place in turned:
            kind = OTHER_KIND[layers[name].kind]
            slots[name], layers[name] = replace(slot, kind=kind), replace(layers[name], kind=kind)


def routed(rows: Array, picked: Array | None, valid: Array | None) -> tuple[Array, Array | None]:
    """The rows of an expert that count, and which tokens they are.

    Args:
        rows: (rows, n_in) what the expert's weight is multiplied with.
        picked: the tokens that were gathered last; they are the rows' if there are as many.
        valid: (samples, tokens) which tokens of the batch are no padding; None when all count.

    Returns:
        The rows, and the numbers of their tokens: None when all tokens are there, or which is not known.
    """
    xp = namespace(rows)
    # Tokens of other experts come as zeros where all experts are multiplied at once.
    alive = xp.any(rows != 0, axis=1)
    tokens = picked
    if tokens is None or tokens.shape[0] != rows.shape[0]:
        tokens = None if bool(xp.all(alive)) else xp.arange(rows.shape[0], device=device_of(rows))
    if valid is not None and tokens is not None and bool(xp.all(tokens < valid.shape[0] * valid.shape[1])):
        alive = alive & valid.reshape(-1)[tokens]
    return rows[alive], None if tokens is None else tokens[alive]


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer.

    Args:
        x: its input.
        rest: what else reaches the sum that its output joins; None when unknown.
        tokens: for each row of the input which token it is; None when the rows are the same in every model.
    """

    x: Array
    rest: Array | None = None
    tokens: Array | None = None


class Pairs:
    """Puts the uses of a layer in the dense and in the sparse model side by side, one batch long.

    Args:
        seen: gets name, x, dense x and drift for each use in the sparse model.
        paired: whether there is a dense model.
    """

    def __init__(self, seen: Any, paired: bool) -> None:
        self._seen, self._paired = seen, paired
        self._waiting: dict[str, list[LayerCall]] = {}

    def dense(self, name: str, use: LayerCall) -> None:
        """A layer of the dense model is used."""
        self._waiting.setdefault(name, []).append(use)

    def sparse(self, name: str, use: LayerCall) -> None:
        """The same layer of the sparse model is used, as many uses of its later."""
        queue = self._waiting.get(name)
        dense = queue.pop(0) if queue else None
        if dense is None:
            # An expert that the dense model gave none of these tokens has nothing to be fitted to.
            if not self._paired or use.tokens is None:
                self._seen(name, use.x, None, None)
            return
        use, dense = same_tokens(use, dense)
        ours, theirs = use.rest, dense.rest
        drift = None
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            drift = theirs - ours
        self._seen(name, use.x, dense.x, drift)


def same_tokens(use: LayerCall, dense: LayerCall) -> tuple[LayerCall, LayerCall]:
    """Only the tokens that both models send to the layer, in one order: routing changes as a model becomes sparse.

    Example:
        >>> ours = LayerCall(np.array([[5.0], [1.0]]), tokens=np.array([5, 1]))
        >>> dense = LayerCall(np.array([[3.0], [5.5]]), tokens=np.array([3, 5]))
        >>> [found.x.tolist() for found in same_tokens(ours, dense)]
        [[[5.0]], [[5.5]]]
    """
    if use.tokens is None or dense.tokens is None:
        return use, dense
    mine, theirs = to_numpy(use.tokens), to_numpy(dense.tokens)
    if np.array_equal(mine, theirs):
        return use, dense
    _, own, other = np.intersect1d(mine, theirs, return_indices=True)

    def only(one: LayerCall, place: np.ndarray[Any, Any]) -> LayerCall:
        assert one.tokens is not None
        index = namespace(one.tokens).asarray(place, device=device_of(one.tokens))
        return LayerCall(one.x[index], tokens=one.tokens[index])

    return only(use, own), only(dense, other)
