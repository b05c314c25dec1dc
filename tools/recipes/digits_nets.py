"""A small VGG and a small ResNet for the digits task; data and metric are those of digits.py."""

from __future__ import annotations

import itertools

from digits import Residual, accuracy, data  # noqa: F401  # the recipes name them in this file

import torch
from torch import nn


class VGG(nn.Module):
    """Plain 3x3 convolutions in three stages, and two linear layers: 0.3 M parameters at width 32."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 1
        for stage in range(3):
            n_out = width * 2**stage
            for _ in range(2):
                layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
                n_in = n_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_in), nn.ReLU(), nn.Linear(n_in, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class ResNet(nn.Module):
    """A stem and three stages of two residual blocks each: 0.7 M parameters at width 32."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Residual(n_in, n_out, 1 if n_in == n_out else 2), Residual(n_out, n_out))
                for n_in, n_out in itertools.pairwise(widths)
            )
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def vgg(width: int = 32) -> nn.Module:
    """The VGG, freshly initialised."""
    return VGG(width)


def resnet(width: int = 32) -> nn.Module:
    """The ResNet, freshly initialised."""
    return ResNet(width)
