"""The MindSpore twin of delta_train.py: an own BERT-like Cell with MiniLM's converted weights, in graph mode.

    python tools/bench/delta_train_ms.py [--task packages] [--steps 60] [--seeds 1] [--kinds full,lora_all]

Data, batches, schedule, head and learning rates are those of delta_train.py; each way
and seed trains in a process of its own.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GLOG_v", "3")

import json
import subprocess
import sys
import tempfile
import time

import delta_task
import delta_train
import numpy as np
import peak

WAYS = (
    "full", "lora_all", "lora_r64", "lora_r128", "lora_words", "prefix", "prompt", "adapter", "low_rank_adapter",
    "bitfit", "lora_qv", "dora", "rslora", "lora_plus", "pissa", "rdrop", "head",
)  # fmt: skip


def body(settings):
    """BERT's encoder as an own Cell, with Hugging Face's names but one (graph mode cannot read a cell named self)."""
    from mindspore import nn, ops

    width, heads = settings["hidden_size"], settings["num_attention_heads"]

    def norm():
        return nn.LayerNorm((width,), epsilon=settings["layer_norm_eps"])

    class Embeddings(nn.Cell):
        def __init__(self):
            super().__init__()
            self.word_embeddings = nn.Embedding(settings["vocab_size"], width)
            self.position_embeddings = nn.Embedding(settings["max_position_embeddings"], width)
            self.token_type_embeddings = nn.Embedding(settings["type_vocab_size"], width)
            self.LayerNorm = norm()

        def construct(self, ids):
            places = self.position_embeddings(ops.arange(ids.shape[1]))
            return self.LayerNorm(self.word_embeddings(ids) + places + self.token_type_embeddings(ops.zeros_like(ids)))

    class SelfAttention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Dense(width, width) for _ in range(3))
            self.num_heads, self.scale = heads, (width // heads) ** -0.5

        def split(self, x):
            return x.reshape((x.shape[0], x.shape[1], self.num_heads, -1)).swapaxes(1, 2)

        def construct(self, x, mask):
            q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
            scores = ops.matmul(q, k.swapaxes(2, 3)) * self.scale + mask
            return ops.matmul(ops.softmax(scores, -1), v).swapaxes(1, 2).reshape(x.shape)

    class Output(nn.Cell):
        def __init__(self, n_in):
            super().__init__()
            self.dense, self.LayerNorm = nn.Dense(n_in, width), norm()
            self.dropout = nn.Dropout(p=settings["hidden_dropout_prob"])

        def construct(self, x, residual):
            return self.LayerNorm(self.dropout(self.dense(x)) + residual)

    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner, self.output = SelfAttention(), Output(width)

        def construct(self, x, mask):
            return self.output(self.inner(x, mask), x)

    class Intermediate(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense, self.act = nn.Dense(width, settings["intermediate_size"]), nn.GELU(approximate=False)

        def construct(self, x):
            return self.act(self.dense(x))

    class Layer(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention, self.intermediate = Attention(), Intermediate()
            self.output = Output(settings["intermediate_size"])

        def construct(self, x, mask):
            x = self.attention(x, mask)
            return self.output(self.intermediate(x), x)

    class Encoder(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layer = nn.CellList([Layer() for _ in range(settings["num_hidden_layers"])])

        def construct(self, x, mask):
            for layer in self.layer:
                x = layer(x, mask)
            return x

    class Body(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embeddings, self.encoder = Embeddings(), Encoder()

        def construct(self, ids, mask):
            hidden = (1.0 - mask.reshape((mask.shape[0], 1, 1, mask.shape[1])).float()) * -1e4
            return self.encoder(self.embeddings(ids), hidden)

    return Body()


def minilm():
    """The Cell with MiniLM's weights, converted by slimkit itself."""
    import slimkit_ms

    import mindspore as ms

    folder = delta_task.model_folder()
    net = body(json.loads((folder / "config.json").read_text()))
    with tempfile.TemporaryDirectory() as place:
        slimkit_ms.convert_checkpoint(
            str(folder / "model.safetensors"),
            f"{place}/minilm.ckpt",
            choice_func=lambda name: "pooler" not in name and "position_ids" not in name,
            name_map={r"re:attention\.self\.": "attention.inner."},
            manifest=False,
        )
        missing, unused = ms.load_param_into_net(net, ms.load_checkpoint(f"{place}/minilm.ckpt"))
    if missing or unused:
        raise SystemExit(f"the weights do not fit: missing {missing}, unused {unused}")
    return net


def build(way):
    import slimkit_ms

    import mindspore as ms
    from mindspore import nn

    class Classifier(nn.Cell):
        def __init__(self, inner, width):
            super().__init__()
            self.body, self.head = inner, nn.Dense(width, delta_task.CLASSES)

        def construct(self, ids, mask):
            hidden = self.body(ids, mask)
            extra = hidden.shape[1] - mask.shape[1]
            mask = mask.float()
            if extra > 0:  # a prompt stands in front
                mask = ms.ops.concat((ms.ops.ones((mask.shape[0], extra), mask.dtype), mask), 1)
            mask = mask.expand_dims(-1)
            return self.head((hidden * mask).sum(1) / mask.sum(1))

    inner = minilm()
    model = Classifier(inner, inner.embeddings.word_embeddings.embedding_size)
    if way == "head":
        slimkit_ms.freeze_modules(model, include=["body"])
    elif way == "bitfit":
        slimkit_ms.freeze_delta(model, "bitfit", exclude=["head"])
    elif way != "full":
        kind, targets, more = delta_train.OURS[way]
        if kind == "prefix":
            few = ms.Tensor(np.ones((2, 4), np.int32))
            more = {**more, "inputs": (few, few)}
        where = inner if kind == "prompt" else model
        slimkit_ms.apply_delta(where, kind, targets, **more, **({} if where is inner else {"also_train": ["head"]}))
    for name, parameter in model.parameters_and_names():
        parameter.name = name
    return model


def optimizer_of(way, model, rate, steps):
    """Adam over the head and what the way trains, each with its own rate on the common schedule."""
    import slimkit_ms

    from mindspore import nn

    def rates(base):
        return [base * delta_task.schedule(i, steps) for i in range(steps)]

    inner = [p for p in model.trainable_params() if not p.name.startswith("head")]
    head = rate if way == "head" else delta_train.HEAD_RATE
    groups = [{"params": [p for p in model.trainable_params() if p.name.startswith("head")], "lr": rates(head)}]
    if way == "lora_plus":
        found = slimkit_ms.lora_plus_groups(model.body, rate, 16.0)
        groups += [{"params": g["params"], "lr": rates(g["lr"])} for g in found]
    elif inner:
        groups += [{"params": inner, "lr": rates(rate)}]
    return nn.Adam(groups, learning_rate=1e-3), inner


def train(way, options):
    import slimkit_ms

    import mindspore as ms
    from mindspore import nn, ops

    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(options.seed)
    parts = delta_task.data(options.task, *delta_train.sizes(options), options.length)
    learn, check = parts["train"], parts["test"]
    model = build(way)
    everything = sum(p.size for p in model.get_parameters())
    rate = delta_train.rate_of(way, options)
    optimizer, inner = optimizer_of(way, model, rate, options.steps)

    class WithLoss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.model, self.rdrop = model, slimkit_ms.RDropLoss()
            self.doubled = way == "rdrop"

        def construct(self, ids, mask, labels):
            if self.doubled:
                ids, mask, labels = (ops.concat((t, t), 0) for t in (ids, mask, labels))
                return self.rdrop(self.model(ids, mask), labels, 1)
            return ops.cross_entropy(self.model(ids, mask), labels)

    before = [(p.name, p, p.asnumpy().copy()) for p in model.trainable_params()]
    step = nn.TrainOneStepCell(WithLoss(), optimizer).set_train()
    losses, began = [], 0.0
    for i, rows in enumerate(delta_task.batches(len(learn.labels), options.batch, options.steps, options.seed)):
        if i == 1:  # the first step compiles the graph
            began = time.process_time()
        losses.append(float(step(*(ms.Tensor(part[rows].astype(np.int32)) for part in learn)).asnumpy()))
    seconds = (time.process_time() - began) / max(options.steps - 1, 1)
    model.set_train(False)
    hits = []
    for i in range(0, len(check.labels), 100):
        ids, mask, labels = (part[i : i + 100] for part in check)
        short = (0, 100 - len(labels))  # the last rows are filled up, so that one compiled graph serves all
        filled = (ms.Tensor(np.pad(part, (short, (0, 0)), "edge").astype(np.int32)) for part in (ids, mask))
        hits += (model(*filled).asnumpy()[: len(labels)].argmax(-1) == labels).astype(int).tolist()
    tenth = max(options.steps // 10, 1)
    return {
        "way": way,
        "rate": rate,
        "trained, % of all": round(100 * sum(p.size for p in inner) / everything, 3),
        "loss first -> last tenth": f"{np.mean(losses[:tenth]):.2f} -> {np.mean(losses[-tenth:]):.2f}",
        "CPU s a step": round(seconds, 3),
        "peak MB": round(peak.memory_mb("VmHWM")),
        "parameters that never moved": [n for n, p, old in before if np.array_equal(old, p.asnumpy())],
        "hits": hits,
    }


def spawned(ways, options):
    """The row of each way, every seed from a process of its own; loss, seconds and memory are the first's."""
    same = [f"--{k}={v}" for k, v in vars(options).items() if k not in ("kinds", "child", "seed", "seeds")]
    for way in ways:
        rows = []
        for seed in range(options.seeds):
            command = [sys.executable, __file__, "--child", way, "--seed", str(seed), *same]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            if out.returncode:
                yield way, out.stderr
                break
            rows.append(json.loads(out.stdout.strip().splitlines()[-1]))
        else:
            yield way, {**rows[0], "hits": [row["hits"] for row in rows]}


def main():
    parser = delta_train.arguments(__doc__, WAYS, 60)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(options.child, options)))
        return
    delta_train.show(spawned(options.kinds.split(","), options))


if __name__ == "__main__":
    main()
