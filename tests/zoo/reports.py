"""Nets that public reports are about: learned queries, masked tokens, auxiliary heads, folded heads, states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Detr(nn.Module):
    """A convolutional backbone, a sine table, an encoder layer, and a decoder whose queries are parameters alone."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.backbone, self.queries = nn.Conv2d(3, width, 8, 8), nn.Embedding(6, width)
        self.register_buffer("sine", torch.randn(64, width))
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.own, self.cross = (nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.classes, self.boxes = nn.Linear(width, 5), nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x):
        x = self.backbone(x).flatten(2).transpose(1, 2)
        x = self.encoder(x + self.sine[: x.shape[1]])
        q = self.queries.weight.unsqueeze(0).repeat(len(x), 1, 1)
        q = self.first(q + self.own(q, q, q)[0])
        q = self.second(q + self.cross(q, x, x, need_weights=False)[0])
        return self.classes(q), self.boxes(q).sigmoid()


class QFormer(nn.Module):
    """Learned queries that attend to one another, then to an image, in the plain way of Hugging Face's layers."""

    def __init__(self, width: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.tokens, self.norm = nn.Parameter(torch.randn(1, 4, width)), nn.LayerNorm(width)
        self.seen, self.out = nn.Linear(24, width), nn.Linear(width, 7)
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(2))

    def attend(self, layer, x, seen):
        q, k, v = (f(t).view(len(t), -1, self.heads, self.size).transpose(1, 2) for f, t in zip(layer, (x, seen, seen)))
        mixed = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1) @ v
        return x + layer[3](mixed.transpose(1, 2).reshape(len(x), -1, self.heads * self.size))

    def forward(self, x):
        q = self.tokens.expand(len(x), -1, -1)
        q = self.attend(self.layers[0], q, q)
        return self.out(self.norm(self.attend(self.layers[1], q, self.seen(x))))


class Block(nn.Module):
    """A published vision transformer's block: the size of a head is read off the width that comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = x + self.proj((q @ k.transpose(-2, -1) * 0.25).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, width: int = 64, heads: int = 8, masked: bool = False) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 65, width))
        self.mask = nn.Parameter(torch.randn(width)) if masked else None
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.training and self.mask is not None:
            hidden = torch.rand(x.shape[:2], device=x.device) < 0.5
            x = torch.where(hidden.unsqueeze(-1), self.mask, x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + self.pos[:, : x.shape[1]]
        return self.head(self.norm(self.blocks(x))[:, 0])


class GoogLeNet(nn.Module):
    """Inception branches, and an auxiliary head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32)
        self.a, self.b = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.aux, self.aux_head = nn.Conv2d(64, 24, 1), nn.Linear(24, 10)
        self.last, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(torch.cat([self.a(x), self.b(x)], 1))
        aux = self.aux_head(F.relu(self.aux(x)).mean((2, 3))) if self.training else None
        x = self.head(F.relu(self.last(x)).mean((2, 3)))
        return (x, aux) if self.training else x


class Speech(nn.Module):
    """Convolutions, two-way recurrence over them, a second recurrence with a given state, and a gated head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(16, 48, 3, padding=1), nn.BatchNorm1d(48)
        self.ahead, self.again = (
            nn.LSTM(48, 32, 2, batch_first=True, bidirectional=True),
            nn.GRU(64, 40, batch_first=True),
        )
        self.start, self.gate, self.head = nn.Linear(64, 40), nn.Linear(40, 64), nn.Linear(32, 12)

    def forward(self, x):
        x, _ = self.ahead(F.relu(self.norm(self.conv(x))).transpose(1, 2))
        x, _ = self.again(x, torch.tanh(self.start(x.mean(1))).unsqueeze(0))
        return self.head(F.glu(self.gate(x)))


def _hugging_face(name: str):
    def make():
        import transformers

        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128}
        if name == "t5":
            config = transformers.T5Config(
                vocab_size=96, d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=8, decoder_start_token_id=0,
                tie_word_embeddings=False,
            )  # fmt: skip
            return transformers.T5ForConditionalGeneration(config)
        config = transformers.Wav2Vec2Config(
            vocab_size=32, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.5, mask_time_length=2,
            layerdrop=0.0, **small,
        )  # fmt: skip
        return transformers.Wav2Vec2ForCTC(config)

    return make


IMAGE = (2, 3, 32, 32)
NETS = {
    "detr": (Detr, IMAGE),
    "qformer": (QFormer, (2, 9, 24)),
    "vit": (Vit, IMAGE),
    "mae": (lambda: Vit(96, 3, masked=True), IMAGE),
    "googlenet": (GoogLeNet, IMAGE),
    "speech": (Speech, (2, 16, 11)),
    "wav2vec2": (_hugging_face("wav2vec2"), {"input_values": (2, 400)}),
    "t5": (_hugging_face("t5"), {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}),
}


def build(name: str):
    """(network in eval mode whose norms and biases matter, example input)."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if parameter.dim() == 1 and "parametrizations" not in path:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer in net.buffers():
            if buffer.dim() == 1 and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) * 0.2)
    if isinstance(shape, dict):
        return net, {k: torch.randint(3, 90, s) if "ids" in k else torch.randn(s) for k, s in shape.items()}
    return net, torch.randn(shape)
