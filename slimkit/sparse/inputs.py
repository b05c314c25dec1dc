"""What calibration data is to a torch model: calls of its blocks, tokens that count, forwards that may end early."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimkit import bridge, kinds
from slimkit.core import replay
from slimkit.core.batch import Call
from slimkit.core.errors import UnsupportedError
from slimkit.replay import TENSORS, entering, replaying
from slimkit.sparse.residual import input_of

import torch
import torch.nn.functional as F


class Enough(Exception):
    """Raised inside a forward to end it: every layer that was watched has been seen."""


def enough(*_: Any) -> None:
    """A hook that ends the forward."""
    raise Enough


def as_input(module: torch.nn.Module, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """A layer's input as the core takes it: padded for a convolution, without the rows of padding tokens."""
    x = x.detach()
    if kinds.is_ordinary_conv2d(module):
        pads = module._reversed_padding_repeated_twice
        if any(pads):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, pads, mode=mode)
    elif valid is not None and x.ndim == 3 and x.shape[:2] == valid.shape:
        x = x[valid.to(x.device)]
    return x


def head_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The layer that makes logits of hidden states, where the model says which: no block comes behind it."""
    find = getattr(model, "get_output_embeddings", None)
    with contextlib.suppress(NotImplementedError, AttributeError):  # models without one may raise
        head = find() if callable(find) else None
        return head if isinstance(head, torch.nn.Module) else None
    return None


def valid_tokens(batch: Any) -> torch.Tensor | None:
    """Which tokens of a batch are no padding: its 2-D attention mask of zeros and ones, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


class _Hidden:
    """Stands where a call takes the hidden states."""


HIDDEN = _Hidden()


class _Copies:
    """Copies of what the blocks of one forward are called with: what all of them get is copied once."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def of(self, value: Any) -> Any:
        """A copy of a call's arguments as they are now."""
        return replay.fresh(value, self)

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is copied by `clone`."""
        return TENSORS.is_tensor(value)

    def is_module(self, value: Any) -> bool:
        """Whether a value stays itself."""
        return value is HIDDEN or TENSORS.is_module(value)

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, the same for equal tensors."""
        made = self._made.setdefault((tensor.shape, tensor.dtype), [])
        same = next((copy for copy in made if copy.device == tensor.device and torch.equal(copy, tensor)), None)
        if same is None:
            same = TENSORS.clone(tensor)
            made.append(same)
        return same


Others = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]  # block -> its arguments but the hidden states


class BlockInputs:
    """What every batch gives every block: hidden states, which move on, and the other arguments, which stay.

    Args:
        blocks: the blocks' paths, a chain.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self.valid: list[torch.Tensor | None] = []
        self.paired = False
        self._blocks = blocks
        self._hidden: dict[bool, Any] = {False: [], True: []}
        self._others: list[Others] = []
        self._dense_others: list[Others] = []
        self._aims: Any = {}  # number -> what training draws a block's output to
        self._copies = _Copies()

    def begin(self, batch: Any) -> None:
        """A batch enters the model."""
        self.valid.append(valid_tokens(batch))
        self._others.append({})
        self._copies = _Copies()

    def note(self, path: str, args: Any, kwargs: Any) -> None:
        """A block is called, and not at work yet: it may add to its input in place, and a cache grows with each."""
        x = input_of(args, kwargs)
        if path == self._blocks[0]:
            self._hidden[False].append(x.detach().clone())
        blank = {k: HIDDEN if v is x else v for k, v in kwargs.items()}
        self._others[-1][path] = self._copies.of((tuple(HIDDEN if a is x else a for a in args), blank))

    def pair(self, dense: torch.nn.Module, dataset: Iterable[Any]) -> None:
        """Keep what was noted for the dense model too; one batch shows that its copy runs its own blocks."""
        trial = BlockInputs(self._blocks)
        trial.capture(dense, list(itertools.islice(dataset, 1)), "a deep copy of the model")
        self.paired, self._dense_others = True, self._others
        self._hidden[True] = list(self._hidden[False])

    def capture(self, model: torch.nn.Module, dataset: Iterable[Any], what: str = "model") -> None:
        """Note anew how the model calls its blocks, such as after layers before them have changed."""
        self.valid, self._others, self._hidden[False] = [], [], []

        def began(path: str, args: Any, kwargs: Any) -> None:
            self.note(path, args, kwargs)
            if len(self._others[-1]) == len(self._blocks):
                raise Enough

        with replaying(model) as run, entering({b: bridge.get_module(model, b) for b in self._blocks}, began):
            for batch in dataset:
                self.begin(batch)
                with contextlib.suppress(Enough):
                    run(batch)
                n = len(self._others[-1])
                if n != len(self._blocks):
                    raise UnsupportedError(f"{what} must run its own {len(self._blocks)} blocks. It ran {n} of them")

    def call(self, path: str, index: int, dense: bool = False) -> Any:
        """One batch's call of a block."""
        args, kwargs = (self._dense_others if dense and self.paired else self._others)[index][path]
        hidden = self._hidden[dense and self.paired][index]
        return Call(
            tuple(hidden if a is HIDDEN else a for a in args),
            {k: hidden if v is HIDDEN else v for k, v in kwargs.items()},
        )

    def dense_hidden(self, index: int) -> torch.Tensor:
        """The hidden states of the dense model as they stand."""
        found: torch.Tensor = self._hidden[True][index]
        return found

    def aim(self, index: int) -> torch.Tensor:
        """What training draws the block's output to, as it was put."""
        found: torch.Tensor = self._aims[index]
        return found

    def put_aim(self, index: int, aim: torch.Tensor) -> None:
        """Keep what training draws the block's output to."""
        self._aims[index] = aim

    def put(self, index: int, hidden: torch.Tensor, dense: bool = False) -> None:
        """The hidden states that the next block gets."""
        self._hidden[dense][index] = hidden
