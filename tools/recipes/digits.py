"""The digits task: scikit-learn's handwritten digits and a residual CNN that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import torch
from torch import nn


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the shortcut is projected where the width changes."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class Inverted(nn.Module):
    """Expand, convolve each channel by itself (depthwise), project back, and add."""

    def __init__(self, width: int, factor: int = 4) -> None:
        super().__init__()
        inner = width * factor
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class DigitsNet(nn.Module):
    """8x8 grey digits to 10 classes; 0.5 M parameters at width 40."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = Residual(width, width)
        self.stage2 = nn.Sequential(Residual(width, 2 * width, 2), Inverted(2 * width))
        self.stage3 = Residual(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(x.mean((2, 3)))


def build(width: int = 40) -> nn.Module:
    """The network, freshly initialised."""
    return DigitsNet(width)


def data(limit: int | None = None) -> dict[str, Any]:
    """1,438 digits to train on, 359 to test on, the same split every time; training pixels are shifted at random.

    Args:
        limit: train on so many digits only.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16.0)[:, None]
    labels = torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    test, train = order[:359], order[359:][:limit]
    return {
        "train": Shifted(images[train], labels[train]),
        "test": (images[test], labels[test]),
        "calibration": list(images[train].split(128)),
        "example": images[test][:16],
    }


_SHIFTS = torch.tensor([0, 1, 1, 1, 1, 2])


class Shifted(torch.utils.data.Dataset):
    """Digits moved by at most one pixel each way, which is how handwriting varies most."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = nn.functional.pad(images, (1, 1, 1, 1)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Along each axis two digits in three stay where they are, as the test digits do.
        down, right = _SHIFTS[torch.randint(0, 6, (2,))].tolist()
        return self.images[at, :, down : down + 8, right : right + 8], self.labels[at]


def accuracy(model: nn.Module, data: dict[str, Any], dense: nn.Module) -> dict[str, float]:
    """Share of the test digits that the model names."""
    images, labels = data["test"]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    for module, mode in modes.items():
        module.training = mode
    return {"accuracy": right}
