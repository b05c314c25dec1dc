"""Own definitions of convolutional families: each is small, and prunes by the same rules as its full-size namesake."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv(n_in: int, n_out: int, size: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n_out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Vgg(nn.Module):
    """Chain with a flatten into Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(256, 96), nn.ReLU(), nn.Dropout(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Residual(nn.Module):
    """Residual block with optional groups and squeeze-and-excitation."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1, groups: int = 1, squeeze: bool = False) -> None:
        super().__init__()
        self.a = conv(n_in, n_out, 3, stride, groups)
        self.b = conv(n_out, n_out, 3, 1, 1, act=False)
        self.short = conv(n_in, n_out, 1, stride, act=False) if stride != 1 or n_in != n_out else nn.Identity()
        self.squeeze = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(n_out, 16, 1), nn.ReLU(), nn.Conv2d(16, n_out, 1), nn.Sigmoid()
            )
            if squeeze
            else None
        )

    def forward(self, x):
        y = self.b(self.a(x))
        if self.squeeze is not None:
            y = y * self.squeeze(y)
        return F.relu(y + self.short(x))


def resnet(groups: int = 1, squeeze: bool = False) -> nn.Module:
    return nn.Sequential(
        conv(3, 32), Residual(32, 32, 1, groups, squeeze), Residual(32, 64, 2, groups, squeeze),
        Residual(64, 64, 1, groups, squeeze), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def mobilenet() -> nn.Module:
    class Inverted(nn.Module):
        def __init__(self, n_in: int, n_out: int, stride: int) -> None:
            super().__init__()
            wide = n_in * 4
            self.add = stride == 1 and n_in == n_out
            self.body = nn.Sequential(
                conv(n_in, wide, 1), conv(wide, wide, 3, stride, wide), conv(wide, n_out, 1, act=False)
            )

        def forward(self, x):
            return x + self.body(x) if self.add else self.body(x)

    return nn.Sequential(
        conv(3, 16), Inverted(16, 32, 2), Inverted(32, 32, 1), Inverted(32, 48, 2), Inverted(48, 48, 1),
        conv(48, 96, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, xs):
        x = torch.cat(xs, 1)
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, growth: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.one = nn.ModuleList(DenseLayer(32 + k * growth, growth) for k in range(3))
        self.bn, self.mid = nn.BatchNorm2d(80), nn.Conv2d(80, 48, 1)
        self.two = nn.ModuleList(DenseLayer(48 + k * growth, growth) for k in range(3))
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        xs = [self.stem(x)]
        for layer in self.one:
            xs.append(layer(xs))
        xs = [F.avg_pool2d(self.mid(F.relu(self.bn(torch.cat(xs, 1)))), 2)]
        for layer in self.two:
            xs.append(layer(xs))
        return self.head(F.relu(torch.cat(xs, 1)).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32)
        self.a, self.b = conv(32, 16, 1), nn.Sequential(conv(32, 24, 1), conv(24, 32))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(32, 16, 1))
        self.d = conv(64, 64, 3)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.d(torch.cat([self.a(x), self.b(x), self.c(x)], 1))
        return self.head(x.mean((2, 3)))


def squeezenet() -> nn.Module:
    class Fire(nn.Module):
        def __init__(self, n_in: int, squeezed: int, wide: int) -> None:
            super().__init__()
            self.s, self.e1 = nn.Conv2d(n_in, squeezed, 1), nn.Conv2d(squeezed, wide, 1)
            self.e3 = nn.Conv2d(squeezed, wide, 3, padding=1)

        def forward(self, x):
            x = F.relu(self.s(x))
            return torch.cat([F.relu(self.e1(x)), F.relu(self.e3(x))], 1)

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), Fire(32, 16, 32), Fire(64, 16, 32), nn.Conv2d(64, 10, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    def __init__(self, n: int, stride: int, native: bool) -> None:
        super().__init__()
        self.stride, self.native = stride, native
        half = n // 2
        self.right = nn.Sequential(
            conv(half if stride == 1 else n // 2, half, 1),
            conv(half, half, 3, stride, half, act=False),
            conv(half, half, 1),
        )
        self.left = (
            nn.Sequential(conv(half, half, 3, stride, half, act=False), conv(half, half, 1)) if stride > 1 else None
        )
        self.mix = nn.ChannelShuffle(2)

    def forward(self, x):
        if self.stride == 1:
            a, b = x.chunk(2, dim=1)
            out = torch.cat([a, self.right(b)], 1)
        else:
            out = torch.cat([self.left(x), self.right(x)], 1)
        if self.native:
            return self.mix(out)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def shufflenet(native: bool = False) -> nn.Module:
    return nn.Sequential(
        conv(3, 32), ShuffleUnit(64, 2, native), ShuffleUnit(64, 1, native), ShuffleUnit(64, 1, native),
        conv(64, 96, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class UNet(nn.Module):
    """Skip concatenation, transposed convolution and group norm."""

    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = conv(3, 32), conv(32, 64, 3, 2), conv(64, 96, 3, 2)
        self.norm = nn.GroupNorm(groups, 96)
        self.u2, self.c2 = nn.ConvTranspose2d(96, 64, 2, 2), conv(128, 64)
        self.u1, self.c1 = nn.ConvTranspose2d(64, 32, 2, 2), conv(64, 32)
        self.out = nn.Conv2d(32, 2, 1)

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(a)
        c = self.norm(self.mid(b))
        b = self.c2(torch.cat([self.u2(c), b], 1))
        return self.out(self.c1(torch.cat([self.u1(b), a], 1)))


class Csp(nn.Module):
    """YOLO-style: split, bottlenecks, concatenation, SPPF, upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cv1 = conv(3, 32, 3, 2), conv(32, 64, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(32, 32), conv(32, 32)) for _ in range(2))
        self.cv2, self.p1, self.p2 = conv(128, 64, 1), conv(64, 32, 1), conv(128, 64, 1)
        self.head = nn.Conv2d(64 + 32, 12, 1)

    def forward(self, x):
        x = self.stem(x)
        parts = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            parts.append(parts[-1] + m(parts[-1]))
        y = self.p1(self.cv2(torch.cat(parts, 1)))
        pools = [y]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        y = self.p2(torch.cat(pools, 1))
        y = F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0)
        return self.head(torch.cat([y, x], 1)).flatten(2)


class Pixels(nn.Module):
    """Pixel shuffle in both directions, PReLU, instance norm and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Conv2d(3, 32, 3, padding=1), nn.PReLU(32)
        self.b, self.up = nn.Conv2d(32, 128, 3, padding=1), nn.PixelShuffle(2)
        self.norm, self.shared = nn.InstanceNorm2d(32, affine=True), nn.Conv2d(32, 32, 3, padding=1)
        self.down, self.c = nn.PixelUnshuffle(2), nn.Conv2d(128, 48, 1)
        self.d = nn.Conv2d(48, 3, 1)

    def forward(self, x):
        x = self.up(self.b(self.act(self.a(x))))
        x = self.norm(self.shared(F.relu(self.shared(x))))
        return self.d(F.relu(self.c(self.down(x))))


class Conv1d3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv3d(3, 32, 3, padding=1), nn.BatchNorm3d(32)
        self.b = nn.Conv3d(32, 32, 3, padding=1, groups=4)
        self.c, self.n2 = nn.Conv1d(32, 64, 3, padding=1), nn.BatchNorm1d(64)
        self.t = nn.ConvTranspose1d(64, 32, 2, 2, groups=2)
        self.d = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.n1(self.a(x)))))
        x = self.t(F.relu(self.n2(self.c(x.flatten(3).mean(2)))))
        return self.d(x.transpose(1, 2)).mean(1)


class Einsum(nn.Module):
    """Attention written with einsum and raw parameters, RMS norm by hand, gated MLP."""

    def __init__(self, dim: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(16, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Parameter(torch.randn(dim, dim) * 0.1)
        self.scale = nn.Parameter(torch.ones(dim))
        self.gate_up, self.down = nn.Linear(dim, 256), nn.Linear(128, dim)
        self.head = nn.Linear(dim, 7)

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        q, k, v = self.qkv(y).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        w = torch.einsum("bhid,bhjd->bhij", q, k).mul(8**-0.5).softmax(-1)
        y = torch.einsum("bhij,bhjd->bihd", w, v).reshape(b, t, -1)
        x = x + torch.einsum("btc,dc->btd", y, self.out)
        a, g = self.gate_up(x).chunk(2, -1)
        return self.head((x + self.down(a * F.silu(g))).mean(1))


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder: nn.MultiheadAttention with packed weights."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=first, norm_first=first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 9)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


IMAGE = (2, 3, 16, 16)
NETS = {
    "vgg": (Vgg, IMAGE),
    "resnet": (resnet, IMAGE),
    "resnext_se": (lambda: resnet(4, True), IMAGE),
    "mobilenet": (mobilenet, IMAGE),
    "densenet": (DenseNet, IMAGE),
    "inception": (Inception, IMAGE),
    "squeezenet": (squeezenet, IMAGE),
    "shufflenet": (shufflenet, IMAGE),
    "shufflenet_native": (lambda: shufflenet(True), IMAGE),
    "unet": (UNet, IMAGE),
    "csp": (Csp, (2, 3, 32, 32)),
    "pixels": (Pixels, IMAGE),
    "conv1d3d": (Conv1d3d, (2, 3, 4, 4, 4)),
    "einsum": (Einsum, (2, 5, 16)),
    "encoder": (TorchEncoder, None),
    "encoder_batch_first": (lambda: TorchEncoder(True), None),
}


def build(name: str):
    """(network in eval mode with settled statistics, example input)."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make()
    x = torch.randn(shape) if shape else torch.randint(0, 50, (2, 6))
    if shape:
        net.train()
        with torch.no_grad():
            for _ in range(3):
                net(torch.randn(shape))
    return net.eval(), x
