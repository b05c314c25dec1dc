"""Data sets as batches of torch tensors: map-style ones, streams and ready batches, shared between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)
from slimkit.core import check
from slimkit.core.train.loading import LoaderOptions, is_samples, plan_batches, shared_out

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
