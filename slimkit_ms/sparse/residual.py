"""Where a layer's output has joined the residual stream of its block, found by trying rather than by names."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from slimkit.core.sparse.call_order import TOLERANCE
from slimkit_ms import bridge
from slimkit_ms.chain import first_tensor, hooks

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


@contextlib.contextmanager
def arriving(
    model: nn.Cell, places: Collection[str], blocks: Collection[str], seen: Callable[[str, ms.Tensor], None]
) -> Iterator[None]:
    """Call ``seen(path, tensor)`` with what enters the cells at those paths; a block's path stands for its output."""

    def entering(path: str) -> Callable[..., None]:
        return lambda _cell, inputs: seen(path, inputs[0]) if inputs else None

    def leaving(path: str) -> Callable[..., None]:
        return lambda _cell, _inputs, output: seen(path, first_tensor(output))

    with hooks() as handles:
        for path in places:
            cell = bridge.get_module(model, path)
            if path in blocks:
                handles.append(cell.register_forward_hook(leaving(path)))
            else:
                handles.append(cell.register_forward_pre_hook(entering(path)))
        yield


def chained(model: nn.Cell, run: Callable[[], None], blocks: Sequence[str]) -> bool:
    """Whether each block's first input is the output of the block before."""
    passed: dict[str, tuple[Any, Any]] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(_cell: nn.Cell, inputs: Any, output: Any) -> None:
            passed[path] = inputs[0] if inputs else None, first_tensor(output)

        return note

    with hooks() as handles:
        handles += [bridge.get_module(model, b).register_forward_hook(hook(b)) for b in blocks]
        run()
    pairs = itertools.pairwise(blocks)
    return len(passed) == len(blocks) > 1 and all(_same(passed[a][1], passed[b][0]) for a, b in pairs)


def _same(one: ms.Tensor, other: ms.Tensor | None) -> bool:
    # Hooks may be handed another object for the same tensor, so its values decide.
    return other is not None and one.shape == other.shape and bool((one == other).all())


def joints(model: nn.Cell, run: Callable[[], None], layers: Sequence[str], blocks: Sequence[str]) -> dict[str, str]:
    """For each layer the first place behind it that sees its output plus something else, unchanged.

    The output of each layer is disturbed in turn. Where the disturbance arrives as it was, the value there is
    the output plus a part that the layer does not decide: the residual stream.

    Args:
        model: the cell, in PyNative and eval mode.
        run: sends one batch through it.
        layers: paths of layers inside blocks.
        blocks: the blocks' paths, a chain.

    Returns:
        layer -> path of the cell that is called with the sum, or of the block that it leaves; layers without such a
        place are left out.
    """
    leaves = [path for path, cell in model.cells_and_names() if not any(cell.cells())]
    places = {b: [p for p in leaves if p.startswith(b + ".")] + [b] for b in blocks}

    def look(block: str, layer: str | None, by: Array | None) -> dict[str, Array]:
        found: dict[str, Array] = {}  # in the order of the calls

        def note(path: str, x: ms.Tensor) -> None:
            found.setdefault(path, bridge.as_numpy(x.astype(ms.float32)))

        with hooks() as handles, arriving(model, places[block], blocks, note):
            if layer is not None:
                cell = bridge.get_module(model, layer)
                handles.append(cell.register_forward_hook(lambda _c, _i, out: out + ms.Tensor(by).astype(out.dtype)))
            run()
        return found

    outputs: dict[str, Array] = {}

    def output_of(layer: str) -> Callable[..., None]:
        return lambda _cell, _inputs, out: outputs.update({layer: bridge.as_numpy(out.astype(ms.float32))})

    with hooks() as handles:
        handles += [bridge.get_module(model, n).register_forward_hook(output_of(n)) for n in layers]
        run()
    found: dict[str, str] = {}
    for block in blocks:
        calm = look(block, None, None)
        for layer in (n for n in layers if n.startswith(block + ".") and n in outputs):
            y = outputs[layer]
            noise = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
            noise *= np.sqrt(np.square(y).mean())
            for path, x in look(block, layer, noise).items():
                before = calm.get(path)
                if path == layer or before is None or before.shape != y.shape or np.array_equal(before, y):
                    continue
                if np.linalg.norm(x - before - noise) < TOLERANCE * np.linalg.norm(noise):
                    found[layer] = path
                    break
    return found
