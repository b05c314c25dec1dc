"""Repair of a pruned torch model from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit import bridge, kinds
from slimkit.chain import BlockChain, find_blocks
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import SAME, RepairStage, parted, repair
from slimkit.replay import replaying
from slimkit.signals import input_rows, output_rows, padding_of, real_rows, unsuited

import torch
from torch import nn

Array = np.ndarray[Any, Any]


def compensate(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PrunePlan,
    layers: Sequence[str],
    data: Iterable[Any],
    damping: float | None,
) -> dict[str, Any]:
    """Refit ordinary Conv2d and Linear layers of a pruned model to their originals' outputs, in place.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.repair`.

    Returns:
        What `slimkit.core.prune.refit.repair` reports.
    """
    return repair(TorchRepair(dense, pruned, data), layers, plan, damping)


class TorchRepair:
    """A torch model before and after its cut, as compensation sees it.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, data: Iterable[Any]) -> None:
        self._dense, self._pruned, self._data = dense, pruned, data
        known = bridge.parameters(pruned)
        self._tied: dict[str, str] = {}
        for place, further in known.further.items():
            self._tied.update(dict.fromkeys(further, known.names[place]))
            self._tied[known.names[place]] = further[0]

    def unsuited(self, path: str) -> str | None:
        if f"{path}.weight" in self._tied:
            # Fitted as a layer it would change what it is elsewhere.
            return f"its weight is {self._tied[f'{path}.weight']} too"
        return unsuited(bridge.get_module(self._pruned, path))

    def made_axis(self, path: str) -> int:
        return int(kinds.is_in_out(bridge.get_module(self._pruned, path)))

    def values(self, path: str) -> tuple[Array, Array | None]:
        module = bridge.get_module(self._pruned, path)
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        weight = weight.t() if kinds.is_in_out(module) else weight.reshape(len(weight), -1)
        return _float64(weight), None if bias is None else _float64(bias.detach())

    def stages(self, layers: Sequence[str], behind: Collection[str]) -> Iterator[RepairStage]:
        batch = next(iter(self._data), None)
        blocks = [] if batch is None else find_blocks(self._dense, batch)
        before, inside, after = parted(layers, blocks, behind)
        if before:
            yield WholePair(self._dense, self._pruned, before, self._data)
        pair = ChainPair(self._dense, self._pruned, blocks, list(self._data)) if any(inside) else None
        for number, (own, further) in enumerate(zip(inside, after)):
            if pair is not None:
                yield pair.stage(number, own)
            if further:
                yield WholePair(self._dense, self._pruned, further, self._data)

    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        module = bridge.get_module(self._pruned, path)
        values = torch.from_numpy(weight).to(module.weight)
        with torch.no_grad():
            module.weight.copy_(values.t() if kinds.is_in_out(module) else values.reshape(module.weight.shape))
            if bias is not None:
                module.bias.copy_(torch.from_numpy(bias).to(module.bias))


class WholePair:
    """Both models whole: every layer costs a forward of each.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        layers: of this part.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, layers: Sequence[str], data: Iterable[Any]) -> None:
        self._dense, self._pruned, self.layers, self._data = dense, pruned, list(layers), data

    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        with replaying(self._dense, ()) as before, replaying(self._pruned, ()) as after:
            for batch in self._data:
                with _watching(self._dense, [path], batch, False) as said:
                    before(batch)
                with _watching(self._pruned, [path], batch, True) as seen:
                    after(batch)
                yield from zip(seen.get(path, []), said.get(path, []))


class ChainPair:
    """Both models as chains of the same blocks, and the hidden states of every batch between two of them.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        blocks: the blocks' paths.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, blocks: Sequence[str], data: Sequence[Any]) -> None:
        self.dense, self.pruned, self.data = dense, pruned, data
        self.chains = BlockChain(dense, blocks), BlockChain(pruned, blocks)
        self.hidden: list[list[torch.Tensor | None]] = [[None] * len(data), [None] * len(data)]
        self._done = 0
        self._blocks = list(blocks)

    def stage(self, number: int, layers: Sequence[str]) -> BlockPair:
        """A block, once the one before it is done with."""
        while self._done < number:
            self.advance(1, self._done)
            self._done += 1
        return BlockPair(self, number, layers)

    def advance(self, which: int, number: int) -> None:
        """What leaves a block becomes what enters the next one."""
        with self.chains[which].at(number) as send:
            for index, batch in enumerate(self.data):
                self.hidden[which][index] = send(batch, self.hidden[which][index])

    def joins(self, number: int, path: str) -> bool:
        """Whether a layer's output is added to what else leaves its block."""
        layer, batch, hidden = bridge.get_module(self.pruned, path), self.data[0], self.hidden[1][0]
        with self.chains[1].at(number) as send:
            calm = send(batch, hidden)
            assert calm is not None
            noise = torch.randn(calm.shape, generator=torch.Generator().manual_seed(0)).to(calm) * calm.std()
            hook = layer.register_forward_hook(
                lambda _m, _a, output: output + noise if output.shape == noise.shape else output
            )
            try:
                moved = send(batch, hidden)
            finally:
                hook.remove()
        assert moved is not None
        return bool((moved - calm - noise).norm() < SAME * noise.norm())

    def norms(self, number: int) -> list[str]:
        """The norms of a block."""
        block = self._blocks[number]
        inside = bridge.get_module(self.pruned, block).named_modules()
        return [f"{block}.{name}" for name, module in inside if name and kinds.is_norm(module)]

    def meets(self, number: int, path: str) -> str:
        """The norm that is given a layer's output added to something, as blocks have it whose norms come last; "" for
        none."""
        norms, batch, hidden = self.norms(number), self.data[0], self.hidden[1][0]
        layer, noises = bridge.get_module(self.pruned, path), list[torch.Tensor]()

        def stir(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            chance = torch.Generator().manual_seed(0)
            noises.append(torch.randn(output.shape, generator=chance).to(output) * output.std())
            return output + noises[-1]

        with self.chains[1].at(number) as send:
            with _watching(self.pruned, norms, batch, True) as calm:
                send(batch, hidden)
            hook = layer.register_forward_hook(stir)
            try:
                with _watching(self.pruned, norms, batch, True) as moved:
                    send(batch, hidden)
            finally:
                hook.remove()
        if len(noises) != 1:
            return ""
        noise = _rows_of(real_rows(padding_of(self.pruned, batch), path, noises[0]))
        for norm in norms:
            before, after = calm.get(norm, []), moved.get(norm, [])
            one = len(before) == len(after) == 1 and before[0].shape == noise.shape
            if one and np.linalg.norm(after[0] - before[0] - noise) < SAME * np.linalg.norm(noise):
                return norm
        return ""


class BlockPair:
    """One block before and after the cut: the dense one runs once, the cut one as far as each layer in turn.

    The last layer, where its output joins the residual stream, is asked to make up as well for what the stream has lost
    before it: that costs nothing, and without it the losses of all blocks would add up. In a block whose norms come
    last (BERT's) every layer whose output a norm is given, added to the stream, makes up for it.

    Args:
        pair: both models.
        number: of the block.
        layers: of this block.
    """

    def __init__(self, pair: ChainPair, number: int, layers: Sequence[str]) -> None:
        self._pair, self._number, self.layers = pair, number, list(layers)
        self._wanted: dict[tuple[str, int], list[Array]] = {}
        self._normed: dict[tuple[str, int], list[Array]] = {}
        # Where the stream goes through norms inside the block, what goes into them is the stream.
        self._joins = bool(self.layers) and pair.joins(number, self.layers[-1])
        norms = [] if self._joins or not self.layers else pair.norms(number)
        with pair.chains[0].at(number) as send:
            for index, batch in enumerate(pair.data):
                with (
                    _watching(pair.dense, self.layers, batch, False) as seen,
                    _watching(pair.dense, norms, batch, True) as given,
                ):
                    pair.hidden[0][index] = send(batch, pair.hidden[0][index])
                for path, rows in seen.items():
                    self._wanted[path, index] = rows
                for path, rows in given.items():
                    self._normed[path, index] = rows

    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        pair, number = self._pair, self._number
        layer = bridge.get_module(pair.pruned, path)
        whole = path == self.layers[-1] and self._joins
        # A convolution's outputs lie otherwise than a norm's rows.
        norm = "" if self._joins or kinds.is_kind(layer, "conv") else pair.meets(number, path)
        until = bridge.get_module(pair.pruned, norm) if norm else layer
        with pair.chains[1].at(number, None if whole else until) as send:
            for index, batch in enumerate(pair.data):
                said = contextlib.nullcontext(dict[str, list[Array]]())
                with (
                    _watching(pair.pruned, [path], batch, True) as seen,
                    _watching(pair.pruned, [path], batch, False) if whole or norm else said as own,
                    _watching(pair.pruned, [norm], batch, True) if norm else said as normed,
                ):
                    left = send(batch, pair.hidden[1][index])
                wanted = self._wanted.pop((path, index), [])
                before = pair.hidden[0][index]
                # Not where the stream itself was cut: its lost features are wanted nowhere.
                same = left is not None and before is not None and left.shape == before.shape
                if same and len(own.get(path, [])) == 1:
                    padding = padding_of(pair.pruned, batch)
                    lost, now = (_rows_of(real_rows(padding, path, x)) for x in (before, left))
                    wanted = [lost - now + own[path][0]]
                if norm and len(own.get(path, [])) == 1:
                    full, short = self._normed.get((norm, index), []), normed.get(norm, [])
                    if len(full) == len(short) == 1 and full[0].shape == short[0].shape:
                        wanted = [full[0] - short[0] + own[path][0]]
                yield from zip(seen.get(path, []), wanted)


class _watching:
    """Rows of the inputs (`given`) or outputs of some layers, layer -> one array a call."""

    def __init__(self, model: nn.Module, paths: Sequence[str], batch: Any, given: bool) -> None:
        self._modules: Mapping[str, nn.Module] = {p: bridge.get_module(model, p) for p in paths}
        self._padding, self._given = padding_of(model, batch), given
        self._seen: dict[str, list[Array]] = {}
        self._hooks = bridge.hooked(self._modules, self._note)

    def __enter__(self) -> dict[str, list[Array]]:
        self._hooks.__enter__()
        return self._seen

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, path: str, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        module = self._modules[path]
        x = (args[0] if args else kwargs["input"]) if self._given else output
        x = real_rows(self._padding, path, x).detach()
        rows = (input_rows if self._given else output_rows)(module, x)
        # A copy: what follows, such as an activation, may work in the memory of it.
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._seen.setdefault(path, []).append(np.array(rows.cpu().numpy()))


def _rows_of(hidden: torch.Tensor) -> Array:
    """Hidden states as an array (n, width)."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    found: Array = (rows if rows.dtype == torch.float64 else rows.float()).cpu().numpy()
    return found


def _float64(tensor: torch.Tensor) -> Array:
    values: Array = tensor.double().cpu().numpy()
    return values
