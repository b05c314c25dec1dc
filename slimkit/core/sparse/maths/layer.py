"""What the core knows of a layer: how its weight is a matrix, and how its input is a set of rows for that matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slimkit.core.sparse.maths.backend import Array, namespace

KINDS = ("linear", "conv1d", "conv2d")

# Rows of an unfolded convolution input are made in pieces of about this many numbers.
PIECE = 1 << 25


@dataclass(frozen=True)
class SparseLayer:
    """One layer that can be made sparse.

    Args:
        name: its dotted path; a layer that shares its weight with others carries the first path.
        kind: "linear" (weight (out, in)), "conv1d" (Hugging Face's, weight (in, out)) or "conv2d".
        shape: the weight's shape.
        groups: groups of a convolution; each has its own inputs.
        stride: (vertical, horizontal) step of a convolution.
        dilation: (vertical, horizontal) spacing of a convolution.
        has_bias: whether a bias is added to its output.
        aliases: other paths with the same weight.
        family: what its siblings have in common that are fed by the same call and never by each other, such as the
            experts of one parameter; empty without siblings.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    has_bias: bool = False
    aliases: tuple[str, ...] = ()
    family: str = ""

    @property
    def n_out(self) -> int:
        """Outputs of one group."""
        return self.shape[1] if self.kind == "conv1d" else self.shape[0] // self.groups

    @property
    def n_in(self) -> int:
        """Columns of one group's matrix."""
        if self.kind == "conv2d":
            return self.shape[1] * self.shape[2] * self.shape[3]
        return self.shape[0] if self.kind == "conv1d" else self.shape[1]

    @property
    def n_channels(self) -> int:
        """Input channels of one group: what an n:m pattern runs along."""
        return self.shape[1] if self.kind == "conv2d" else self.n_in

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.groups * self.n_out * self.n_in

    def to_matrix(self, weight: Array) -> Array:
        """(groups, outputs, columns); a convolution's columns run over kernel places, then input channels.

        Channels come last so that an n:m group lies along input channels, as the hardware wants it.
        """
        xp = namespace(weight)
        if self.kind == "conv1d":
            weight = weight.T
        elif self.kind == "conv2d":
            weight = xp.permute_dims(weight, (0, 2, 3, 1))
        return weight.reshape(self.groups, self.n_out, self.n_in)

    def from_matrix(self, matrix: Array) -> Array:
        """The weight again from what `to_matrix` gave."""
        xp = namespace(matrix)
        if self.kind == "conv1d":
            return matrix.reshape(self.n_out, self.n_in).T
        if self.kind == "conv2d":
            out, channels, height, width = self.shape
            return xp.permute_dims(matrix.reshape(out, height, width, channels), (0, 3, 1, 2))
        return matrix.reshape(self.shape)

    def rows(self, x: Array) -> Iterator[Array]:
        """Pieces (groups, rows, columns) of the layer's input, which is already padded for a convolution."""
        if self.kind != "conv2d":
            yield x.reshape(1, -1, self.n_in)
            return
        if x.ndim == 3:
            x = x.reshape(1, *x.shape)
        _, _, high, wide = x.shape
        kernel, stride, dilation = self.shape[2:], self.stride, self.dilation
        out_high = (high - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        out_wide = (wide - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
        per_sample = max(1, out_high * out_wide * self.n_in * self.groups)
        step = max(1, PIECE // per_sample)
        for start in range(0, x.shape[0], step):
            yield self._unfold(x[start : start + step], out_high, out_wide)

    def _unfold(self, x: Array, out_high: int, out_wide: int) -> Array:
        xp = namespace(x)
        n, channels = x.shape[:2]
        places = []
        for i in range(self.shape[2]):
            for j in range(self.shape[3]):
                top, left = i * self.dilation[0], j * self.dilation[1]
                places.append(
                    x[
                        :,
                        :,
                        top : top + self.stride[0] * (out_high - 1) + 1 : self.stride[0],
                        left : left + self.stride[1] * (out_wide - 1) + 1 : self.stride[1],
                    ]
                )
        patches = xp.stack(places, axis=2)  # (n, channels, places, high, wide)
        patches = patches.reshape(n, self.groups, channels // self.groups, len(places), out_high * out_wide)
        patches = xp.permute_dims(patches, (1, 0, 4, 3, 2))  # (groups, n, high*wide, places, channels of the group)
        return patches.reshape(self.groups, n * out_high * out_wide, self.n_in)
