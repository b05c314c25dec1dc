"""Run by test_kills.py: a writer is killed before each of its system calls in turn, and what it left is read.

Usage: python killed.py WRITER [no-exchange]. Prints how many kills left the old files and how many the new ones.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.openweights import open_weights, refuse_torch
from slimkit.core.checkpoint.weightfile import Entry
from tests.kills import MOVES, killed_at

CALLS = (*MOVES, "os.mkdir", "os.link", "os.chmod", "os.symlink", "ctypes.dlsym")


def bundle(folder, value):
    from slimkit.core.delta.bundle import write_bundle

    write_bundle(folder, [{"name": "d", "alpha": value}], {"a": np.full(3, value, np.float32)}, [], {})


def read_bundle(folder):
    from slimkit.core.delta.bundle import read_bundle as read

    manifest, tensors = read(folder)
    assert (folder / "README.md").read_text() == "kept"  # other files in the folder stay
    assert manifest["deltas"][0]["alpha"] == tensors["a"][0]
    return tensors["a"][0]


def peft(folder, value):
    from slimkit.core.delta.peft import write_files

    write_files(folder, {"peft_type": "LORA", "lora_alpha": value}, {"a": np.full(3, value, np.float32)})


def read_peft(folder):
    from slimkit.core.delta.peft import read_files

    files.settle(folder)  # as `load_delta` does
    config, tensors = read_files(folder)
    assert config["lora_alpha"] == tensors["a"][0]
    return tensors["a"][0]


def w16a16s(folder, value):
    from slimkit.core.ascend.w16a16s import save_arrays

    save_arrays(folder, {"fc.weight": np.eye(4) * value, "b": np.full(2, value)}, {"model_type": str(value)})


def read_w16a16s(folder):
    from slimkit.core.ascend.w16a16s import load_w16a16s

    found = load_w16a16s(folder)
    assert float(found.config["model_type"]) == found.tensors["b"][0] == found.tensors["fc.weight"][0, 0]
    return found.tensors["b"][0]


def whole_folder(folder, value):
    """What save_pruned, a trainer's checkpoint and a run's stage do: a folder replaced with all that is in it."""
    with files.atomic_directory(folder) as new:
        files.write_json(new / "plan.json", value)
        (new / "more").mkdir()
        files.write_tensors(new / "more" / f"x{value}.safetensors", {"a": np.full(2, value)})


def read_whole_folder(folder):
    value = files.read_json(folder / "plan.json")
    left = sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))
    expected = ["more", f"more/x{value}.safetensors", "plan.json"]
    assert left == expected or (value == 1 and left == sorted(["README.md", *expected]))
    return value


def checkpoint(ending, **options):
    def write(folder, value):
        items = saving.Items()
        for name, shift in (("w", 0), ("v", 1)):
            array = np.full(3, value + shift, np.float32)
            items.add(name, Entry("F32", (3,)), array.copy)
        with_manifest = options.get("manifest", True) or value == 1
        saving.write_items(folder / f"x{ending}", items, with_manifest=with_manifest)

    def read(folder):
        with open_weights(folder / f"x{ending}", refuse_torch) as source:
            held = loading.check_manifest(source)
            found = {name: source.raw(name).copy() for name in source.entries}
        assert (found["v"] == found["w"] + 1).all()
        assert held or (not options.get("manifest", True) and found["w"][0] == 2)  # what vouches for it is never lost
        return found["w"][0]

    return write, read


def onnx_model(folder, value):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from slimkit.core.onnxfile import Proof, publish

    weight = numpy_helper.from_array(np.full((20, 20), value, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 20])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 20])], [weight],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    proto.ir_version = 8
    onnx.checker.check_model(proto)
    x = np.ones((1, 20), np.float32)
    proof = Proof({"x": x}, {"y": x @ np.full((20, 20), value, np.float32)})
    publish(proto, folder / "net.onnx", 13, [proof], 1e-5, external_data=True)


def read_onnx_model(folder):
    import onnx

    weight = onnx.numpy_helper.to_array(onnx.load(str(folder / "net.onnx")).graph.initializer[0])
    assert (weight == weight[0, 0]).all()
    return weight[0, 0]


WRITERS = {
    "bundle": (bundle, read_bundle),
    "peft": (peft, read_peft),
    "w16a16s": (w16a16s, read_w16a16s),
    "whole_folder": (whole_folder, read_whole_folder),
    "safetensors": checkpoint(".safetensors"),
    "ckpt": checkpoint(".ckpt"),
    "without_manifest": checkpoint(".safetensors", manifest=False),
    "onnx": (onnx_model, read_onnx_model),
}


def main() -> None:
    write, read = WRITERS[sys.argv[1]]
    if "no-exchange" in sys.argv:
        files.exchange = lambda one, other: False
    write(Path(tempfile.mkdtemp(), "warm"), 2) if sys.argv[1] == "onnx" else None  # imports are no part of the write
    counts = {1: 0, 2: 0}
    turn, going = 1, True
    while going:
        folder = Path(tempfile.mkdtemp(), "d")
        write(folder, 1)
        (folder / "README.md").write_text("kept")
        going = killed_at(turn, partial(write, folder, 2), CALLS)
        found = int(read(folder))
        assert going or found == 2
        counts[found] += 1
        write(folder, 2)  # what a kill left stands in no one's way
        assert int(read(folder)) == 2
        shutil.rmtree(folder.parent)
        turn += 1
    print(counts[1], counts[2])


if __name__ == "__main__":
    main()
