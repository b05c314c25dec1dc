"""MindSpore twins of four architectures, written the way MindSpore users write them."""

import numpy as np

import mindspore as ms
from mindspore import nn, ops


class Block(nn.Cell):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, pad_mode="pad", padding=1)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, pad_mode="pad", padding=1)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.down = None
        if stride != 1:
            self.down = nn.SequentialCell(nn.Conv2d(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))

    def construct(self, x):
        y = self.bn2(self.conv2(ops.relu(self.bn1(self.conv1(x)))))
        return ops.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Cell):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, pad_mode="pad", padding=1)
        self.stem_bn = nn.BatchNorm2d(8)
        self.layer1 = nn.SequentialCell(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.SequentialCell(Block(8, 16, 2))
        self.head = nn.Dense(16, 5)

    def construct(self, x):
        x = self.layer2(self.layer1(ops.relu(self.stem_bn(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Cell):
    def __init__(self, width, heads, names=("query", "key", "value", "out"), bias=True, causal=False):
        super().__init__()
        self.heads = heads
        self.names = names
        self.causal = causal
        for name in names:
            setattr(self, name, nn.Dense(width, width, has_bias=bias))

    def construct(self, x):
        b, n, w = x.shape
        query, key, value, out = (getattr(self, name) for name in self.names)
        q, k, v = (f(x).reshape(b, n, self.heads, -1).transpose(0, 2, 1, 3) for f in (query, key, value))
        score = ops.matmul(q, k.transpose(0, 1, 3, 2)) / (w // self.heads) ** 0.5
        if self.causal:
            score = score + ms.Tensor(np.triu(np.full((n, n), -1e9, np.float32), 1))
        score = ops.softmax(score, -1)
        return out(ops.matmul(score, v).transpose(0, 2, 1, 3).reshape(b, n, w))


class BertLayer(nn.Cell):
    def __init__(self, width, heads, ffn, epsilon=1e-12, attention=None):
        super().__init__()
        self.attention = (attention or Attention)(width, heads)
        self.norm1 = nn.LayerNorm((width,), epsilon=epsilon)
        self.up, self.down = nn.Dense(width, ffn), nn.Dense(ffn, width)
        self.norm2 = nn.LayerNorm((width,), epsilon=epsilon)
        self.gelu = nn.GELU(approximate=False)

    def construct(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(self.gelu(self.up(x))))


class Bert(nn.Cell):
    def __init__(self, vocab=64, width=32, layers=2, heads=4, ffn=48, positions=16, attention=None):
        super().__init__()
        self.words, self.positions, self.types = (nn.Embedding(n, width) for n in (vocab, positions, 2))
        self.norm = nn.LayerNorm((width,), epsilon=1e-12)
        made = (BertLayer(width, heads, ffn, attention=attention) for _ in range(layers))
        self.layers = nn.SequentialCell(*made)

    def construct(self, ids):
        places = ops.arange(ids.shape[1])
        x = self.words(ids) + self.types(ops.zeros_like(ids)) + self.positions(places)[None]
        return self.layers(self.norm(x))


class FusedAttention(nn.Cell):
    """Query, key and value in one matrix, as the other framework's twin has them apart."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Dense(width, 3 * width), nn.Dense(width, width)

    def construct(self, x):
        b, n, w = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        score = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) / (w // self.heads) ** 0.5, -1)
        return self.out(ops.matmul(score, v).transpose(0, 2, 1, 3).reshape(b, n, w))


class Gpt(nn.Cell):
    """GPT-2 with query, key and value apart."""

    def __init__(self, vocab=64, width=32, layers=2, heads=4, ffn=48, positions=16):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.layers = nn.CellList([ViTLayer(width, heads, ffn, 1e-5, tanh=True, causal=True) for _ in range(layers)])
        self.norm = nn.LayerNorm((width,), epsilon=1e-5)

    def construct(self, ids):
        x = self.words(ids) + self.positions(ops.arange(ids.shape[1]))[None]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Encoder(nn.Cell):
    """torch's encoder layers, with query, key and value apart."""

    def __init__(self, width=32, layers=2, heads=4, ffn=48):
        super().__init__()
        self.layers = nn.SequentialCell(*(BertLayer(width, heads, ffn, 1e-5) for _ in range(layers)))

    def construct(self, x):
        return self.layers(x)


class ViT(nn.Cell):
    def __init__(self, width=32, layers=2, heads=4, ffn=48, patches=4):
        super().__init__()
        self.cls_token = ms.Parameter(ms.Tensor(np.zeros((1, 1, width), np.float32)))
        self.position_embeddings = ms.Parameter(ms.Tensor(np.zeros((1, patches + 1, width), np.float32)))
        self.patch = nn.Conv2d(3, width, 8, 8, pad_mode="valid", has_bias=True)
        self.layers = nn.CellList([ViTLayer(width, heads, ffn) for _ in range(layers)])
        self.norm = nn.LayerNorm((width,), epsilon=1e-12)

    def construct(self, x):
        x = self.patch(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 2, 1)
        cls = ops.tile(self.cls_token, (x.shape[0], 1, 1))
        x = ops.cat((cls, x), 1) + self.position_embeddings
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ViTLayer(nn.Cell):
    def __init__(self, width, heads, ffn, epsilon=1e-12, tanh=False, causal=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm((width,), epsilon=epsilon), nn.LayerNorm((width,), epsilon=epsilon)
        self.attention = Attention(width, heads, causal=causal)
        self.up, self.down = nn.Dense(width, ffn), nn.Dense(ffn, width)
        self.gelu = nn.GELU(approximate=tanh)

    def construct(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class RMSNorm(nn.Cell):
    def __init__(self, width):
        super().__init__()
        self.gamma = ms.Parameter(ms.Tensor(np.ones(width, np.float32)))

    def construct(self, x):
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + 1e-6) * self.gamma


class LlamaAttention(nn.Cell):
    def __init__(self, width, heads, keys):
        super().__init__()
        self.heads, self.keys, self.size = heads, keys, width // heads
        self.q_proj = nn.Dense(width, width, has_bias=False)
        self.k_proj = nn.Dense(width, keys * self.size, has_bias=False)
        self.v_proj = nn.Dense(width, keys * self.size, has_bias=False)
        self.o_proj = nn.Dense(width, width, has_bias=False)

    def construct(self, x, cos, sin, mask):
        b, n, w = x.shape
        q = self.turn(self.q_proj(x).reshape(b, n, self.heads, -1).transpose(0, 2, 1, 3), cos, sin)
        k = self.turn(self.k_proj(x).reshape(b, n, self.keys, -1).transpose(0, 2, 1, 3), cos, sin)
        v = self.v_proj(x).reshape(b, n, self.keys, -1).transpose(0, 2, 1, 3)
        share = self.heads // self.keys
        k, v = (t.repeat_interleave(share, 1) for t in (k, v))
        score = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) / self.size**0.5 + mask, -1)
        return self.o_proj(ops.matmul(score, v).transpose(0, 2, 1, 3).reshape(b, n, w))

    def turn(self, x, cos, sin):
        half = self.size // 2
        return x * cos + ops.cat((-x[..., half:], x[..., :half]), -1) * sin


class LlamaLayer(nn.Cell):
    def __init__(self, width, heads, keys, ffn):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.self_attn = LlamaAttention(width, heads, keys)
        self.gate_proj = nn.Dense(width, ffn, has_bias=False)
        self.up_proj = nn.Dense(width, ffn, has_bias=False)
        self.down_proj = nn.Dense(ffn, width, has_bias=False)

    def construct(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        y = self.post_attention_layernorm(x)
        gate = self.gate_proj(y)
        return x + self.down_proj(gate * ops.sigmoid(gate) * self.up_proj(y))


def positions(n, size):
    """Cosines, sines and the causal mask of n tokens."""
    frequency = 1.0 / 10000.0 ** (np.arange(0, size, 2) / size)
    angle = np.outer(np.arange(n), frequency)
    angle = np.concatenate([angle, angle], -1)
    cos, sin = ms.Tensor(np.cos(angle).astype(np.float32)), ms.Tensor(np.sin(angle).astype(np.float32))
    return cos, sin, ms.Tensor(np.triu(np.full((n, n), -1e9, np.float32), 1))


class LlamaStem(nn.Cell):
    """What stands before the layers, and what each of them takes."""

    def __init__(self, vocab=64, width=32, heads=4):
        super().__init__()
        self.embed_tokens, self.size = nn.Embedding(vocab, width), width // heads

    def construct(self, ids):
        return self.embed_tokens(ids), *positions(ids.shape[1], self.size)


class Llama(nn.Cell):
    """With tied embeddings, the output matrix is the embedding table; or without any."""

    def __init__(self, vocab=64, width=32, layers=2, heads=4, keys=2, ffn=48, head=True):
        super().__init__()
        self.head = head
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.CellList([LlamaLayer(width, heads, keys, ffn) for _ in range(layers)])
        self.norm = RMSNorm(width)
        self.size = width // heads

    def construct(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, *positions(ids.shape[1], self.size))
        x = self.norm(x)
        return ops.matmul(x, self.embed_tokens.embedding_table.transpose(1, 0)) if self.head else x


class Sequence(nn.Cell):
    """Recurrent and one-dimensional layers."""

    def __init__(self, kind):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, pad_mode="pad", padding=1, has_bias=True)
        self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(4, 5, 2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm((10,), epsilon=1e-5)
        self.act = nn.PReLU()
        self.head = nn.Dense(10, 2)

    def construct(self, x):
        y = self.rnn(self.conv(x).transpose(0, 2, 1))[0]
        return self.head(self.act(self.norm(y).transpose(0, 2, 1)).transpose(0, 2, 1))
