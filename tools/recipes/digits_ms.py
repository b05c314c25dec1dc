"""The digits task in MindSpore: the residual CNN of digits.py as a cell, on the same split of the same digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import mindspore as ms
from mindspore import nn, ops


def _conv(n_in: int, n_out: int, size: int, stride: int = 1, group: int = 1) -> nn.SequentialCell:
    """A convolution without bias, padded by half its size, and its batch norm."""
    conv = nn.Conv2d(n_in, n_out, size, stride, pad_mode="pad", padding=size // 2, group=group, has_bias=False)
    return nn.SequentialCell(conv, nn.BatchNorm2d(n_out))


class Residual(nn.Cell):
    """Two 3x3 convolutions beside a shortcut; the shortcut is projected where the width changes."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _conv(n_in, n_out, 3, stride)
        self.second = _conv(n_out, n_out, 3)
        self.relu = nn.ReLU()
        self.projects = stride != 1 or n_in != n_out
        self.shortcut = _conv(n_in, n_out, 1, stride) if self.projects else None

    def construct(self, x):
        inner = self.second(self.relu(self.first(x)))
        if self.projects:
            x = self.shortcut(x)
        return self.relu(inner + x)


class Inverted(nn.Cell):
    """Expand, convolve each channel by itself (depthwise), project back, and add."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        inner = width * factor
        self.expand = _conv(width, inner, 1)
        self.depthwise = _conv(inner, inner, 3, group=inner)
        self.project = _conv(inner, width, 1)
        self.relu = nn.ReLU6()

    def construct(self, x):
        return x + self.project(self.relu(self.depthwise(self.relu(self.expand(x)))))


class DigitsNet(nn.Cell):
    """8x8 grey digits to 10 classes; 0.2 M parameters at width 24."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = _conv(1, width, 3)
        self.relu = nn.ReLU()
        self.stage1 = Residual(width, width)
        self.stage2 = nn.SequentialCell(Residual(width, 2 * width, 2), Inverted(2 * width))
        self.stage3 = Residual(2 * width, 4 * width, 2)
        self.hidden = nn.Dense(4 * width, 4 * width)
        self.head = nn.Dense(4 * width, 10)

    def construct(self, x):
        x = self.stage3(self.stage2(self.stage1(self.relu(self.stem(x)))))
        return self.head(self.relu(self.hidden(x.mean((2, 3)))))


def build(width: int = 24) -> nn.Cell:
    """The network, freshly initialised."""
    return DigitsNet(width)


def data(limit: int | None = None) -> dict[str, Any]:
    """1,438 digits to train on, 359 to test on, the same split every time; training pixels are shifted at random.

    Args:
        limit: train on so many digits only.
    """
    digits = load_digits()
    images = (digits.images.astype(np.float32) / 16.0)[:, None]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:359], order[359:][:limit]
    return {
        "train": Shifted(images[train], labels[train]),
        "test": (images[test], labels[test]),
        "calibration": [ms.Tensor(images[train[i : i + 128]]) for i in range(0, len(train), 128)],
        "example": ms.Tensor(images[test][:16]),
    }


class Shifted:
    """Digits moved by at most one pixel each way, which is how handwriting varies most."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1))), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[np.ndarray, np.int32]:
        # Along each axis two digits in three stay where they are, as the test digits do.
        down, right = np.array([0, 1, 1, 1, 1, 2])[np.random.randint(0, 6, 2)]
        return self.images[at, :, down : down + 8, right : right + 8], self.labels[at]


def loss(model: nn.Cell, batch: tuple[ms.Tensor, ms.Tensor]) -> ms.Tensor:
    """Cross-entropy of the digits named."""
    return ops.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Cell, data: dict[str, Any], dense: nn.Cell) -> dict[str, float]:
    """Share of the test digits that the cell names."""
    images, labels = data["test"]
    modes = {cell: cell.training for _, cell in model.cells_and_names()}
    model.set_train(False)
    found = model(ms.Tensor(images)).asnumpy().argmax(1)
    for cell, mode in modes.items():
        cell.training = mode
    return {"accuracy": float((found == labels).mean())}
