"""Trace + analysis + cut against Torch-Pruning in the same run: `python tools/bench/prune.py [--peer DIR] [net ...]`.

Nets have the shapes of their namesakes (torchvision is not needed). Each tool prunes half the parameters of a copy;
times are medians of alternating repeats. `--memory` measures instead, in a fresh process a net and tool, how far the
resident memory rises while pruning, against the model's size (Linux). `--llama` analyses a 7 B Llama configuration on
the meta device. `--peer` is a folder with torch-pruning (pip install --no-deps --target DIR torch-pruning).
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import nn


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for n in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.MaxPool2d(2)] if n == 0 else [nn.Conv2d(width, n, 3, padding=1), nn.ReLU(True)]
        width = n or width
    head = [
        nn.Linear(25088, 4096),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(True),
        nn.Linear(4096, 1000),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head)


class Bottleneck(nn.Module):
    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c3, self.b3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.down = None
        if stride > 1 or n_in != 4 * width:
            self.down = nn.Sequential(nn.Conv2d(n_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))))
        return F.relu(self.b3(self.c3(y)) + (x if self.down is None else self.down(x)))


def resnet50() -> nn.Module:
    body: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for stage, number in enumerate((3, 4, 6, 3)):
        for k in range(number):
            body.append(Bottleneck(width, 64 << stage, 2 if stage and k == 0 else 1))
            width = 256 << stage
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class DenseBlock(nn.Module):
    def __init__(self, n_in: int, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(n_in + 32 * k), nn.ReLU(True), nn.Conv2d(n_in + 32 * k, 128, 1, bias=False),
                nn.BatchNorm2d(128), nn.ReLU(True), nn.Conv2d(128, 32, 3, padding=1, bias=False),
            )
            for k in range(number)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xs = [x]
        for layer in self.layers:
            xs.append(layer(torch.cat(xs, 1)))
        return torch.cat(xs, 1)


def densenet121() -> nn.Module:
    body: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for stage, number in enumerate((6, 12, 24, 16)):
        body.append(DenseBlock(width, number))
        width += 32 * number
        if stage < 3:
            body += [nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(
        *body, nn.BatchNorm2d(width), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)
    )


class Inverted(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, expand: int, squeeze: bool = False) -> None:
        super().__init__()
        wide = n_in * expand
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [nn.Conv2d(n_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU()]
        self.a = nn.Sequential(*layers)
        n_se = max(8, n_in // 4)
        self.se = None
        if squeeze:
            self.se = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, n_se, 1), nn.SiLU(), nn.Conv2d(n_se, wide, 1), nn.Sigmoid()
            )
        self.b = nn.Sequential(nn.Conv2d(wide, n_out, 1, bias=False), nn.BatchNorm2d(n_out))
        self.add = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.se is not None:
            y = y * self.se(y)
        y = self.b(y)
        return x + y if self.add else y


def inverted(squeeze: bool) -> nn.Module:
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    body: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
    width = 32
    for expand, n_out, number, stride in rows:
        for k in range(number):
            body.append(Inverted(width, n_out, stride if k == 0 else 1, expand, squeeze))
            width = n_out
    body += [
        nn.Conv2d(width, 1280, 1, bias=False),
        nn.BatchNorm2d(1280),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*body, nn.Linear(1280, 1000))


class ConvNextBlock(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(n, n, 7, padding=3, groups=n), nn.LayerNorm(n)
        self.a, self.b, self.scale = nn.Linear(n, 4 * n), nn.Linear(4 * n, n), nn.Parameter(torch.full((n,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(F.gelu(self.a(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        return x + (y * self.scale).permute(0, 3, 1, 2)


def convnext_tiny() -> nn.Module:
    body: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4)]
    width = 96
    for stage, number in enumerate((3, 3, 9, 3)):
        if stage:
            body.append(nn.Conv2d(width, 2 * width, 2, 2))
            width *= 2
        body += [ConvNextBlock(width) for _ in range(number)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class Attention(nn.Module):
    def __init__(self, n: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, n // heads
        self.q, self.k, self.v, self.out = (nn.Linear(n, n) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Layer(nn.Module):
    def __init__(self, n: int, heads: int, wide: int) -> None:
        super().__init__()
        self.att, self.n1, self.n2 = Attention(n, heads), nn.LayerNorm(n), nn.LayerNorm(n)
        self.a, self.b = nn.Linear(n, wide), nn.Linear(wide, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.att(self.n1(x))
        return x + self.b(F.gelu(self.a(self.n2(x))))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 768, 16, 16)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 768)), nn.Parameter(torch.zeros(1, 197, 768))
        self.body = nn.Sequential(*(Layer(768, 12, 3072) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.body(x))[:, 0])


class Bert(nn.Module):
    """BERT-base shapes without its vocabulary, which no tool prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(768, 768)
        self.body = nn.Sequential(*(Layer(768, 12, 3072) for _ in range(12)))
        self.head = nn.Linear(768, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x))[:, 0])


IMAGE = (1, 3, 224, 224)
NETS = {
    "vgg16": (vgg16, IMAGE),
    "resnet50": (resnet50, IMAGE),
    "densenet121": (densenet121, IMAGE),
    "mobilenet_v2": (lambda: inverted(False), IMAGE),
    "efficientnet": (lambda: inverted(True), IMAGE),
    "convnext_tiny": (convnext_tiny, IMAGE),
    "vit_b_16": (Vit, IMAGE),
    "bert_base": (Bert, (1, 128, 768)),
}


def ours(net: nn.Module, x: torch.Tensor) -> None:
    from slimkit.prune import PruneTorch

    PruneTorch(net, x).set_importance_evaluation_function("l1").set_node_reserved_ratio(0.25).prune(0.5)


def theirs(net: nn.Module, x: torch.Tensor) -> None:
    import torch_pruning as tp

    heads = {}
    for module in net.modules():
        if isinstance(module, Attention):
            heads.update({module.q: 12, module.k: 12, module.v: 12})
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.MagnitudePruner(
        net, x, importance=tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.29, ignored_layers=[last],
        round_to=16, num_heads=heads, prune_num_heads=bool(heads), head_pruning_ratio=0.29,
    )  # fmt: skip
    pruner.step()


TOOLS = {"slimkit": ours, "torch-pruning": theirs}


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def memory_of(name: str, tool: str) -> None:
    """Print what pruning one net adds to the resident memory, once everything is imported and warm."""
    make, shape = NETS[name]
    TOOLS[tool](NETS["mobilenet_v2"][0]().eval(), torch.randn(IMAGE))
    net, x = make().eval(), torch.randn(shape)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    gc.collect()
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the high-water mark begins anew
    TOOLS[tool](net, x)
    peak = _resident("VmHWM") - before
    print(f"{name:14s} {tool}: model {size >> 20} MB, extra {peak >> 20} MB, {peak / size:.2f} times", flush=True)


def llama() -> None:
    """Analyse Llama-2-7B's configuration on the meta device: seconds, and memory beyond the imports."""
    from slimkit.prune import PruneTorch

    from transformers import LlamaConfig, LlamaForCausalLM

    began, before = time.perf_counter(), _resident("VmRSS")
    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig())
    left, _ = PruneTorch(net, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}).analysis(0.5)
    params = sum(p.numel() for p in net.parameters())
    print(
        f"llama: {params / 1e9:.2f} B parameters, {left / params:.3f} left, {time.perf_counter() - began:.1f} s, "
        f"{(_resident('VmHWM') - before) >> 20} MB beyond the imports"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS))
    parser.add_argument("--peer", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--child", choices=list(TOOLS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        sys.path.insert(0, given.peer)
    tools = {t: f for t, f in TOOLS.items() if t == "slimkit" or given.peer}
    if given.child:
        return memory_of(given.nets[0], given.child)
    if given.llama:
        return llama()
    if given.memory:
        again = [sys.executable, __file__, *(["--peer", given.peer] if given.peer else [])]
        for name in given.nets:
            for tool in tools:
                subprocess.run([*again, name, "--child", tool], check=True)
        return None
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"seconds, median of {given.repeats}"
    )
    for name in given.nets:
        make, shape = NETS[name]
        net, x = make().eval(), torch.randn(shape)
        before = sum(p.numel() for p in net.parameters())
        times: dict[str, list[float]] = {t: [] for t in tools}
        cpu: dict[str, list[float]] = {t: [] for t in tools}
        kept: dict[str, float] = {}
        for repeat in range(given.repeats + 1):
            for tool, run in tools.items():
                copied = copy.deepcopy(net)
                gc.collect()
                began = time.perf_counter(), time.process_time()
                try:
                    run(copied, x)
                except Exception as error:  # noqa: BLE001
                    kept[tool] = float("nan")
                    print(f"  {tool} on {name}: {type(error).__name__}: {error}")
                    continue
                if repeat:  # the first round warms up imports and kernels
                    times[tool].append(time.perf_counter() - began[0])
                    cpu[tool].append(time.process_time() - began[1])
                kept[tool] = sum(p.numel() for p in copied.parameters()) / before
        middle = {t: (statistics.median(times[t]), statistics.median(cpu[t])) for t in tools if times[t]}
        row = "  ".join(f"{t} {w:.3f} wall {c:.3f} cpu, keeps {kept[t]:.3f};" for t, (w, c) in middle.items())
        if len(middle) == 2:
            (a, b), (c, d) = middle.values()
            row += f"  faster {c / a:.1f}x wall, {d / b:.1f}x cpu"
        print(f"{name:14s} {row}", flush=True)
    return None


if __name__ == "__main__":
    main()
