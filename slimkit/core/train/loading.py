"""How data is read: which samples make which batch, for any number of processes and any resume, alike in both wings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ConfigError


def epoch_batches(
    n_samples: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
) -> list[list[int]]:
    """The batches of one process in one epoch, as lists of sample indices.

    Processes together read the batches of `batch_size * world` samples that a single process would read, so two
    processes with batches of 4 see what one sees with batches of 8.

    Args:
        n_samples: size of the data set.
        batch_size: samples a process reads at a time.
        seed: seed of the whole run.
        epoch: number of the epoch, counted from 1; each has its own order.
        shuffle: False keeps the data set's order.
        drop_last: leave out a last batch that is not full.
        rank: number of this process.
        world: number of processes.

    Returns:
        As many batches in every process. When the last samples cannot be shared out evenly, the first samples of the
        epoch are read again to fill up, so that no process waits for another.

    Example:
        >>> epoch_batches(5, 2, seed=0, epoch=1, shuffle=False)
        [[0, 1], [2, 3], [4]]
        >>> epoch_batches(5, 1, seed=0, epoch=1, shuffle=False, rank=1, world=2)
        [[1], [3], [0]]
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_samples) if shuffle else np.arange(n_samples)
    whole = batch_size * world
    found = []
    for start in range(0, n_samples, whole):
        members = order[start : start + whole]
        if len(members) < whole:
            if drop_last:
                break
            missing = -len(members) % world
            members = np.concatenate([members, np.resize(order, missing)])
        share = len(members) // world
        found.append([int(i) for i in members[rank * share : (rank + 1) * share]])
    return found


class LoaderOptions:
    """How a data set is read in one epoch by one process."""

    def __init__(
        self,
        seed: int,
        epoch: int,
        rank: int,
        world: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        rest = dict(kwargs)
        self.seed, self.epoch, self.rank, self.world, self.collate_fn = seed, epoch, rank, world, collate_fn
        self.shuffle = check.boolean(rest.pop("shuffle"), "dataloader_kwargs['shuffle']")
        self.drop_last = check.boolean(rest.pop("drop_last", False), "dataloader_kwargs['drop_last']")
        self.rest = rest


def plan_batches(n_samples: int, batch_size: int, options: LoaderOptions) -> list[list[int]]:
    """The batches of this process: an epoch of training, or its share of an evaluation, where nothing is read twice.

    Args:
        n_samples: size of the data set.
        batch_size: samples a process reads at a time.
        options: seed, process, and the epoch, which is 0 for an evaluation.
    """
    evaluates = options.epoch == 0
    batches = epoch_batches(
        n_samples,
        batch_size,
        seed=options.seed,
        epoch=options.epoch,
        shuffle=options.shuffle,
        drop_last=options.drop_last,
        rank=0 if evaluates else options.rank,
        world=1 if evaluates else options.world,
    )
    return batches[options.rank :: options.world] if evaluates else batches


def shared_out(batches: Iterable[Any], options: LoaderOptions) -> Iterator[Any]:
    """Every world-th of ready batches; the last round of an epoch is filled up with the first batch, that of an
    evaluation is not: there nothing is read twice.

    Example:
        >>> how = {"shuffle": False}
        >>> [list(shared_out("abc", LoaderOptions(0, 1, rank, 2, None, how))) for rank in (0, 1)]
        [['a', 'c'], ['b', 'a']]
        >>> [list(shared_out("abc", LoaderOptions(0, 0, rank, 2, None, how))) for rank in (0, 1)]
        [['a', 'c'], ['b']]
    """
    first, turn = None, []
    for batch in batches:
        first = batch if first is None else first
        turn.append(batch)
        if len(turn) == options.world:
            yield turn[options.rank]
            turn = []
    if options.rank < len(turn):
        yield turn[options.rank]
    elif turn and options.epoch:
        yield first


def samples_in(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor.

    Example:
        >>> samples_in({"ids": (np.zeros((3, 2)), np.zeros(4))})
        3
    """
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    for value in values:
        if isinstance(value, (Mapping, tuple, list)):
            return samples_in(value)
        if getattr(value, "ndim", 0):  # a tensor of any framework, or an array
            return len(value)
    return 1


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch for `loss_func`: the last of a tuple, or the key labels or targets of a mapping.

    Example:
        >>> split_batch(("x", "y"))
        ('x', 'y')
    """
    if isinstance(batch, Mapping):
        for key in ("labels", "targets"):
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise ConfigError(f"loss_func needs targets: a mapping's key labels or targets. Received: {sorted(batch)}")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise ConfigError(
        f"loss_func needs batches of (inputs, targets). Received: {type(batch).__name__}. "
        "Give compute_loss(model, batch) for anything else."
    )


def is_samples(dataset: Any) -> bool:
    """Whether a data set holds samples to be batched (`len` and indexing), and not ready batches.

    Example:
        >>> is_samples([1, 2])
        False
    """
    return not isinstance(dataset, (list, tuple)) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
