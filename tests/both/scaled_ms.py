"""A custom loss cell for tests: the graph compiler wants cells in files."""

import mindspore as ms
from mindspore import nn, ops


class Scaled(nn.Cell):
    """Mean absolute difference with a trained scale."""

    def __init__(self):
        super().__init__()
        self.scale = ms.Parameter(ops.ones((), ms.float32), name="scale")

    def construct(self, s, t):
        return ops.abs(self.scale * s - t).mean()
