"""Data sets as batches of MindSpore tensors: map-style ones, pipelines and ready batches, shared between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from slimkit.core.train.loading import LoaderOptions, shared_out
from slimkit_ms import bridge  # noqa: F401  (says in one line that MindSpore is missing)

import mindspore as ms


class BatchedSamples:
    """A map-style data set in batches."""

    def __init__(self, dataset: Any, batches: list[list[int]], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.batches, self.collate = dataset, batches, collate

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield self.collate([self.dataset[i] for i in batch])


class Shared:
    """Ready batches: every world-th; the last round of an epoch is filled up with the first batch."""

    def __init__(self, batches: Iterable[Any], options: LoaderOptions) -> None:
        self.batches, self.options = batches, options

    def __len__(self) -> int:
        return _share(len(self.batches), self.options.world)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return shared_out(self.batches, self.options)


class Pipeline(Shared):
    """A mindspore.dataset pipeline; its shuffling follows seed and epoch, and rows of single samples are batched."""

    def __init__(self, dataset: Any, batch_size: int, options: LoaderOptions) -> None:
        super().__init__(dataset, options)
        self.batch_size = None if is_batched(dataset) else batch_size

    def __len__(self) -> int:
        n: int = self.batches.get_dataset_size()  # type: ignore[attr-defined]
        if self.batch_size is not None:
            n = n // self.batch_size if self.options.drop_last else _share(n, self.batch_size)
        return _share(n, self.options.world)

    def _grouped(self, rows: Iterator[Any], size: int) -> Iterator[Any]:
        collate = self.options.collate_fn or stack
        group: list[Any] = []
        for row in rows:  # and never once more: past its end a pipeline's iterator fails
            group.append(tuple(row))
            if len(group) == size:
                yield collate(group)
                group = []
        if group and not self.options.drop_last:
            yield collate(group)

    def __iter__(self) -> Iterator[Any]:
        before = ms.dataset.config.get_seed()
        ms.dataset.config.set_seed((self.options.seed * 1_000_003 + self.options.epoch) % 2**32)
        pipeline: Any = self.batches
        rows = pipeline.create_tuple_iterator(num_epochs=1)
        self.batches = rows if self.batch_size is None else self._grouped(iter(rows), self.batch_size)
        ms.dataset.config.set_seed(before)
        try:
            yield from super().__iter__()
        finally:
            self.batches = pipeline


def is_batched(pipeline: Any) -> bool:
    """Whether some step of a mindspore.dataset pipeline makes batches; without one its rows are single samples."""
    made = ("BatchDataset", "PaddedBatchDataset", "BucketBatchByLengthDataset")
    return type(pipeline).__name__ in made or any(map(is_batched, pipeline.children))


def _share(n_batches: int, world: int) -> int:
    return -(-n_batches // world)


def stack(samples: list[Any]) -> Any:
    """A batch out of samples, structure kept."""
    first = samples[0]
    if isinstance(first, Mapping):
        return {k: stack([s[k] for s in samples]) for k in first}
    if isinstance(first, (tuple, list)):
        return tuple(stack(list(column)) for column in zip(*samples))
    return ms.Tensor(np.stack([s.asnumpy() if isinstance(s, ms.Tensor) else np.asarray(s) for s in samples]))
