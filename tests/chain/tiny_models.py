"""Tiny models for the command line's tests: Hugging Face directories with a tokenizer, nets behind factories, text."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "the a cat dog sat ran on mat good bad very not is was big small red blue over under".split()

TORCH_NET = """
import torch
from torch import nn


def net(width=32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )


def batches():
    return [torch.ones(2, 3, 8, 8) * i for i in range(1, 4)]


def nothing():
    return 3
"""

# The same small classifier in both frameworks, for the commands that train networks of one's own.
TORCH_PLAIN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


def net(width=16):
    return Net(width)


def wide(width=16):
    return nn.Linear(5, 3)


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, generator=generator)
    return [(x[i : i + 8], x[i : i + 8, :3].argmax(1)) for i in range(0, 32, 8)]


def inputs():
    return [x for x, _ in batches()]


def margin(model, batch):
    return ((model(batch[0]) - 1) ** 2).mean()
"""

MS_PLAIN = """
import mindspore as ms
import numpy as np
from mindspore import nn, ops


class Net(nn.Cell):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Dense(6, width), nn.BatchNorm1d(width), nn.Dense(width, 3)

    def construct(self, x):
        return self.fc2(ops.relu(self.norm(self.fc1(x))))


def net(width=16):
    return Net(width)


def wide(width=16):
    return nn.Dense(5, 3)


def batches():
    x = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    y = x[:, :3].argmax(1).astype(np.int32)
    return [(ms.Tensor(x[i : i + 8]), ms.Tensor(y[i : i + 8])) for i in range(0, 32, 8)]


def inputs():
    return [x for x, _ in batches()]


def margin(model, batch):
    return ((model(batch[0]) - 1) ** 2).mean()
"""

MS_NET = """
import mindspore as ms
from mindspore import nn


class Net(nn.Cell):
    def __init__(self, width):
        super().__init__()
        padded = {"pad_mode": "pad", "padding": 1, "has_bias": True}
        self.c1, self.b1 = nn.Conv2d(3, width, 3, **padded), nn.BatchNorm2d(width)
        self.c2, self.relu, self.f = nn.Conv2d(width, width, 3, **padded), nn.ReLU(), nn.Dense(width, 10)

    def construct(self, x):
        x = self.relu(self.b1(self.c1(x)))
        return self.f(self.relu(self.c2(x)).mean((2, 3)))


def net(width=32):
    ms.set_seed(0)
    return Net(width)
"""


def hugging_face(folder: Path, family: str, **changes: int) -> Path:
    """A model directory of random weights with a word-level tokenizer, as `save_pretrained` leaves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    import torch
    import transformers as hf

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": len(vocabulary), "max_position_embeddings": 32, **changes,
    }  # fmt: skip
    tower = {k: v for k, v in sizes.items() if k not in ("vocab_size", "max_position_embeddings")}
    image = {**tower, "image_size": 16, "patch_size": 8}
    speech = {
        "vocab_size": len(vocabulary), "num_mel_bins": 8, "d_model": 32, "max_source_positions": 16,
        "max_target_positions": 16, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
        "decoder_start_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
        **{f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in
           (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))},
    }  # fmt: skip
    t5 = {"vocab_size": len(vocabulary), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = {
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, decoder_start_token_id=0)),
        "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**speech)),
        "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config={**sizes, **ends}, vision_config=image)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**image)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **sizes)),
        "bert": lambda: hf.BertModel(hf.BertConfig(**sizes)),
    }[family]()
    target = folder / family
    model.save_pretrained(target)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(target)
    return target


def text(file: Path, count: int = 24, labels: bool = True) -> Path:
    """Lines of words; the label says which of two words is in the line."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        good = draw.random() < 0.5
        words = [w for w in draw.choices(WORDS, k=draw.randint(6, 12)) if w not in ("good", "bad")]
        words.insert(1, "good" if good else "bad")
        row = {"text": " ".join(words), **({"label": "pos" if good else "neg"} if labels else {})}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    return file
