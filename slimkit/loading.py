"""Data sets as batches of torch tensors: map-style ones, streams and ready batches, shared between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)
from slimkit.core import check
from slimkit.core.errors import ConfigError
from slimkit.core.train.loading import LoaderOptions, is_samples, plan_batches, samples_in, shared_out

import torch


def batches_of(dataset: Any, batch_size: int, options: LoaderOptions) -> Iterable[Any]:
    """The batches of this process for one epoch, whichever kind of data set they come from."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        if hasattr(dataset, "set_epoch"):  # a stream that shuffles itself, as the datasets library's do
            dataset.set_epoch(options.epoch)
        loader: Any = torch.utils.data.DataLoader(
            dataset, batch_size, drop_last=options.drop_last, collate_fn=options.collate_fn, **options.rest
        )
        return Ready(loader, options)
    if is_samples(dataset):
        batches = plan_batches(len(dataset), batch_size, options)
        return Ready(
            torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=options.collate_fn, **options.rest),
            options,
            sharded=True,
        )
    if not isinstance(dataset, Iterable) or isinstance(dataset, (Iterator, str, bytes, Mapping, torch.Tensor)):
        check.wrong_type("dataset", "a data set of samples, a list of batches or a data loader", dataset)
    return Ready(dataset, options)


class Ready:
    """Ready batches: the order that a loader draws follows seed and epoch, and the model's own draws do not move."""

    def __init__(self, batches: Iterable[Any], options: LoaderOptions, sharded: bool = False) -> None:
        self.batches, self.options = batches, options
        sampler = getattr(batches, "sampler", None)
        self.sharded = sharded or isinstance(sampler, torch.utils.data.DistributedSampler)

    def __len__(self) -> int:
        n = len(self.batches)  # type: ignore[arg-type]
        return n if self.sharded else -(-n // self.options.world)

    def __iter__(self) -> Iterator[Any]:
        options = self.options
        sampler = getattr(self.batches, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(options.epoch)
        with torch.random.fork_rng(devices=[]):
            # A loader seeds its workers and its shuffling from the global generator, at the first batch.
            torch.manual_seed(options.seed * 1_000_003 + options.epoch)
            for source in (self.batches, sampler):
                if isinstance(generator := getattr(source, "generator", None), torch.Generator):
                    generator.manual_seed(options.seed * 1_000_003 + options.epoch)
            iterator = iter(self.batches)
            first = next(iterator, iterator)
        if first is iterator:
            return
        if self.sharded or options.world == 1:
            yield first
            yield from iterator
            return
        yield from shared_out(chain([first], iterator), options)


def in_pieces(dataset: Any, world: int) -> Any:
    """A data set for processes that together make the updates of one: each learns from its rows of a ready batch.

    Args:
        dataset: as `batches_of` takes it. Samples and streams are batched for so many processes anyway.
        world: how many there are.
    """
    split = isinstance(getattr(dataset, "sampler", None), torch.utils.data.DistributedSampler)
    streamed = isinstance(dataset, torch.utils.data.IterableDataset)
    return dataset if world == 1 or split or streamed or is_samples(dataset) else Pieces(dataset, world)


class Pieces:
    """Ready batches in `world` pieces each, so that what deals pieces out to processes splits every batch.

    Args:
        batches: a list of them, or a loader.
        world: pieces of a batch. Where its samples do not come out even, its first ones fill it up.

    Raises:
        ConfigError: while it is read: something in a batch is not one row, or value, for each of its samples.
    """

    def __init__(self, batches: Any, world: int) -> None:
        self._batches, self._world = batches, world

    @property
    def sampler(self) -> Any:
        """What orders a loader's samples, so that the order can be set from outside."""
        return getattr(self._batches, "sampler", None)

    @property
    def generator(self) -> Any:
        """What a loader draws its order from."""
        return getattr(self._batches, "generator", None)

    def __len__(self) -> int:
        return len(self._batches) * self._world

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            n = samples_in(batch)
            share = -(-n // self._world)
            for at in range(0, share * self._world, share):
                yield _rows(batch, [i % n for i in range(at, at + share)], n)


def _rows(value: Any, rows: list[int], n: int) -> Any:
    """Some of a batch's `n` samples."""
    if isinstance(value, Mapping):
        return {key: _rows(part, rows, n) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_rows(part, rows, n) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if value is None or isinstance(value, (bool, int, float)) or getattr(value, "ndim", None) == 0:
        return value
    if not getattr(value, "ndim", 0) or len(value) != n:
        what = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ConfigError(
            f"several processes share every ready batch out by its samples, {n} here, and a batch holds {what}: give "
            "tensors whose first axis are the samples, or a data set of samples (len and indexing)"
        )
    return value[rows]
