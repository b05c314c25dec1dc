"""Small MindSpore networks, one for each way in which channels get coupled."""

from __future__ import annotations

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops


def images(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def tokens(*shape: int, n: int = 40, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).integers(0, n, shape).astype(np.int32))


def randomise(model: nn.Cell, seed: int = 0) -> nn.Cell:
    """Every parameter at random, biases and running statistics too, so that nothing is hidden by a zero."""
    rng = np.random.default_rng(seed)
    for p in model.get_parameters():
        values = rng.standard_normal(p.shape) * 0.3
        if p.name.endswith("moving_variance"):
            values = np.abs(values) + 0.5
        p.set_data(Tensor(values.astype(np.float32)))
    return model


def conv(n_in: int, n_out: int, size: int = 3, stride: int = 1, group: int = 1) -> nn.SequentialCell:
    pad = (size - 1) // 2
    return nn.SequentialCell(
        nn.Conv2d(n_in, n_out, size, stride, "pad", pad, group=group, has_bias=False), nn.BatchNorm2d(n_out), nn.ReLU()
    )


class Residual(nn.Cell):
    """Two residual stages with a projection, then a linear head."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = conv(3, width)
        self.a1, self.a2 = conv(width, width), conv(width, width)
        self.b1, self.b2 = conv(width, 2 * width, stride=2), conv(2 * width, 2 * width)
        self.down = nn.Conv2d(width, 2 * width, 1, 2, "pad", 0)
        self.fc = nn.Dense(2 * width, 10)

    def construct(self, x):
        x = self.stem(x)
        x = x + self.a2(self.a1(x))
        x = self.down(x) + self.b2(self.b1(x))
        return self.fc(ops.mean(x, (2, 3)))


class Inverted(nn.Cell):
    """An inverted residual: depthwise convolution and squeeze-and-excitation inside."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = conv(3, width)
        self.expand, self.depth = conv(width, 4 * width, 1), conv(4 * width, 4 * width, 3, group=4 * width)
        self.squeeze, self.excite = nn.Conv2d(4 * width, 8, 1, has_bias=True), nn.Conv2d(8, 4 * width, 1, has_bias=True)
        self.project = nn.SequentialCell(nn.Conv2d(4 * width, width, 1), nn.BatchNorm2d(width))
        self.fc = nn.Dense(width, 10)

    def construct(self, x):
        x = self.stem(x)
        y = self.depth(self.expand(x))
        y = y * ops.sigmoid(self.excite(ops.relu(self.squeeze(ops.mean(y, (2, 3), keep_dims=True)))))
        x = x + self.project(y)
        return self.fc(ops.mean(x, (2, 3)))


class Concat(nn.Cell):
    """DenseNet: every layer reads all that came before, through its own norm."""

    def __init__(self, growth: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norms = nn.CellList([nn.BatchNorm2d(16 + i * growth) for i in range(3)])
        self.convs = nn.CellList([nn.Conv2d(16 + i * growth, growth, 3) for i in range(3)])
        self.fc = nn.Dense(16 + 3 * growth, 10)

    def construct(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs):
            x = ops.cat((x, layer(ops.relu(norm(x)))), 1)
        return self.fc(ops.mean(x, (2, 3)))


class Grouped(nn.Cell):
    """Grouped convolutions, a channel shuffle written with reshapes, and a split into halves."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = conv(3, width)
        self.g1, self.g2 = conv(width, 2 * width, group=4), conv(2 * width, 2 * width, group=2)
        self.left = conv(width, width)
        self.fc = nn.Dense(2 * width, 10)

    def construct(self, x):
        x = self.g1(self.stem(x))
        b, c, h, w = x.shape
        x = x.reshape(b, 2, c // 2, h, w).transpose(0, 2, 1, 3, 4).reshape(b, c, h, w)
        x = self.g2(x)
        a, b = ops.chunk(x, 2, axis=1)
        return self.fc(ops.mean(ops.cat((self.left(a), b), 1), (2, 3)))


class Flat(nn.Cell):
    """VGG: convolutions, then flattened pixels into dense layers."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.features = nn.SequentialCell(
            nn.Conv2d(3, width, 3, has_bias=True),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(width, 2 * width, 3, has_bias=True),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        )
        self.flatten = nn.Flatten()
        self.classifier = nn.SequentialCell(
            nn.Dense(2 * width * 4, 64, activation="relu"), nn.Dropout(p=0.1), nn.Dense(64, 10)
        )

    def construct(self, x):
        return self.classifier(self.flatten(self.features(x)))


class UNet(nn.Cell):
    """Down, up by a transposed convolution, and a skip connection joined by concatenation."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.one, self.two = conv(3, width), conv(width, 2 * width, stride=2)
        self.up = nn.Conv2dTranspose(2 * width, width, 2, 2, "valid", has_bias=True)
        self.join, self.head = conv(2 * width, width), nn.Conv2d(width, 2, 1, has_bias=True)

    def construct(self, x):
        a = self.one(x)
        return self.head(self.join(ops.cat((a, ops.relu(self.up(self.two(a)))), 1)))


class SelfAttention(nn.Cell):
    """BERT's attention: separate projections, and sizes kept as attributes."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.head_size = heads, width // heads
        self.all_head_size = width
        self.query, self.key, self.value = nn.Dense(width, width), nn.Dense(width, width), nn.Dense(width, width)
        self.output = nn.Dense(width, width)
        self.scale = self.head_size**-0.5

    def heads(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_size).transpose(0, 2, 1, 3)

    def construct(self, x):
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        y = ops.matmul(ops.softmax(ops.matmul(q, k.swapaxes(2, 3)) * self.scale, -1), v).transpose(0, 2, 1, 3)
        return self.output(y.reshape(x.shape[0], x.shape[1], self.all_head_size))


class BertLayer(nn.Cell):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention, self.norm1 = SelfAttention(width, heads), nn.LayerNorm((width,), epsilon=1e-5)
        self.intermediate, self.output = nn.Dense(width, inner), nn.Dense(inner, width)
        self.norm2 = nn.LayerNorm((width,), epsilon=1e-5)

    def construct(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.output(ops.gelu(self.intermediate(x))))


class Bert(nn.Cell):
    """Embeddings, encoder layers, and a classifier that reads the first token."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, inner: int = 64):
        super().__init__()
        self.words, self.places = nn.Embedding(40, width), nn.Embedding(16, width)
        self.norm = nn.LayerNorm((width,), epsilon=1e-5)
        self.layers = nn.CellList([BertLayer(width, heads, inner) for _ in range(layers)])
        self.pooler, self.classifier = nn.Dense(width, width), nn.Dense(width, 5)

    def construct(self, ids):
        x = self.norm(self.words(ids) + self.places(ops.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return self.classifier(ops.tanh(self.pooler(x[:, 0])))


class RMSNorm(nn.Cell):
    def __init__(self, width: int):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(width, np.float32)), name="weight")

    def construct(self, x):
        return x * ops.rsqrt(ops.mean(ops.square(x), -1, keep_dims=True) + 1e-6) * self.weight


class GroupedAttention(nn.Cell):
    """Llama's attention: rotary positions, and key heads that several query heads share."""

    def __init__(self, width: int, heads: int, kv_heads: int, length: int = 16):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, width // heads
        self.groups = heads // kv_heads
        self.q_proj = nn.Dense(width, width, has_bias=False)
        self.k_proj = nn.Dense(width, kv_heads * self.head_dim, has_bias=False)
        self.v_proj = nn.Dense(width, kv_heads * self.head_dim, has_bias=False)
        self.o_proj = nn.Dense(width, width, has_bias=False)
        angles = np.outer(np.arange(length), 100.0 ** (-np.arange(self.head_dim // 2) / (self.head_dim // 2)))
        angles = np.concatenate([angles, angles], 1).astype(np.float32)
        self.cos, self.sin = Tensor(np.cos(angles)), Tensor(np.sin(angles))

    def turn(self, x):
        n = x.shape[2]
        half = self.head_dim // 2
        turned = ops.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos[:n] + turned * self.sin[:n]

    def share(self, x):
        b, h, t, d = x.shape
        return ops.broadcast_to(x[:, :, None], (b, h, self.groups, t, d)).reshape(b, h * self.groups, t, d)

    def construct(self, x):
        b, t, _ = x.shape
        q = self.turn(self.q_proj(x).reshape(b, t, self.num_heads, self.head_dim).transpose(0, 2, 1, 3))
        k = self.turn(self.k_proj(x).reshape(b, t, self.num_key_value_heads, self.head_dim).transpose(0, 2, 1, 3))
        v = self.v_proj(x).reshape(b, t, self.num_key_value_heads, self.head_dim).transpose(0, 2, 1, 3)
        scores = ops.matmul(q, self.share(k).swapaxes(2, 3)) * self.head_dim**-0.5
        y = ops.matmul(ops.softmax(scores, -1), self.share(v))
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(b, t, -1))


class LlamaLayer(nn.Cell):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int):
        super().__init__()
        self.input_norm, self.attention = RMSNorm(width), GroupedAttention(width, heads, kv_heads)
        self.post_norm = RMSNorm(width)
        self.gate, self.up = nn.Dense(width, inner, has_bias=False), nn.Dense(width, inner, has_bias=False)
        self.down = nn.Dense(inner, width, has_bias=False)

    def construct(self, x):
        x = x + self.attention(self.input_norm(x))
        y = self.post_norm(x)
        return x + self.down(ops.silu(self.gate(y)) * self.up(y))


class Llama(nn.Cell):
    """A decoder whose output layer is the embedding table itself, a cell that shares it, or a cell of its own."""

    def __init__(
        self, width: int = 32, heads: int = 4, kv_heads: int = 2, layers: int = 2, inner: int = 48, head: str = "table"
    ):
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.layers = nn.CellList([LlamaLayer(width, heads, kv_heads, inner) for _ in range(layers)])
        self.norm = RMSNorm(width)
        self.head = None if head == "table" else nn.Dense(width, 40, has_bias=False)
        if head == "shared":
            self.head.weight = self.embed.embedding_table

    def construct(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        if self.head is not None:
            return self.head(self.norm(x))
        return ops.matmul(self.norm(x), self.embed.embedding_table.T)


class FusedAttention(nn.Cell):
    """Attention as mindcv's vision transformer writes it: the result takes the input's width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Dense(width, 3 * width), nn.Dense(width, width)

    def construct(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).transpose(2, 0, 3, 1, 4)
        q, k, v = ops.unstack(qkv)
        y = ops.matmul(ops.softmax(ops.matmul(q, k.swapaxes(2, 3)) * self.head_dim**-0.5, -1), v)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(b, n, c))


class Vit(nn.Cell):
    """Patches, a class token, position parameters and blocks of fused attention."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4, "valid", has_bias=True)
        self.token = Parameter(Tensor(np.zeros((1, 1, width), np.float32)), name="token")
        self.places = Parameter(Tensor(np.zeros((1, 17, width), np.float32)), name="places")
        self.norms = nn.CellList([nn.LayerNorm((width,)) for _ in range(2 * layers)])
        self.attentions = nn.CellList([FusedAttention(width, heads) for _ in range(layers)])
        self.mlps = nn.CellList(
            [
                nn.SequentialCell(nn.Dense(width, 4 * width), nn.GELU(), nn.Dense(4 * width, width))
                for _ in range(layers)
            ]
        )
        self.norm, self.head = nn.LayerNorm((width,)), nn.Dense(width, 10)

    def construct(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).swapaxes(1, 2)
        x = ops.cat((ops.broadcast_to(self.token, (x.shape[0], 1, x.shape[2])), x), 1) + self.places
        for i in range(len(self.attentions)):
            x = x + self.attentions[i](self.norms[2 * i](x))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(self.norm(x)[:, 0])


ZOO = {
    "residual": (Residual, lambda: images(2, 3, 8, 8)),
    "inverted": (Inverted, lambda: images(2, 3, 8, 8)),
    "concat": (Concat, lambda: images(2, 3, 8, 8)),
    "grouped": (Grouped, lambda: images(2, 3, 8, 8)),
    "flat": (Flat, lambda: images(2, 3, 8, 8)),
    "unet": (UNet, lambda: images(2, 3, 8, 8)),
    "bert": (Bert, lambda: tokens(2, 7)),
    "llama": (Llama, lambda: tokens(2, 7)),
    "vit": (Vit, lambda: images(2, 3, 16, 16)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Cell, Tensor]:
    """A network of the zoo with random parameters, and its input."""
    ms.set_seed(seed)
    make, inputs = ZOO[name]
    return randomise(make(), seed), inputs()
