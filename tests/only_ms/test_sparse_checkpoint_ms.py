"""A stack of cells block by block from files: as the whole in memory, resumed to the same bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint.weightfile import encode
from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse import SparseConfig

BLOCKS = [f"blocks.{i}" for i in range(3)]

pytestmark = pytest.mark.parametrize("kit", ["mindspore"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def stack(kit):
    from tests.only_ms import stacks_ms

    return stacks_ms.filled(stacks_ms.Stack())


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def values(cell):
    from slimkit_ms import bridge

    return {names[0]: bridge.as_numpy(p).copy() for p, names in bridge.parameter_paths(cell)}


def batches():
    import mindspore as ms

    rng = np.random.default_rng(1)
    return [ms.Tensor(rng.integers(0, 20, (4, 12)).astype(np.int32)) for _ in range(3)]


def theirs(name):
    """Hugging Face's names."""
    for ours, other in ((".gamma", ".weight"), (".beta", ".bias"), (".embedding_table", ".weight")):
        name = name.replace(ours, other)
    return name


def saved(stack, folder, form):
    """The stack in files, in one of the forms that are read; where they are."""
    import mindspore as ms

    folder.mkdir()
    own = values(stack)
    if form == "ckpt":
        ms.save_checkpoint([{"name": n, "data": ms.Tensor(v)} for n, v in own.items()], str(folder / "model.ckpt"))
        return folder
    if form == "file":
        files.write_tensors(folder / "model.safetensors", own)
        return folder / "model.safetensors"
    found = {theirs(n): v for n, v in own.items()} if form == "index" else own
    (folder / "config.json").write_text("{}")
    table, shards = {}, ({}, {})
    for place, (name, value) in enumerate(found.items()):
        shard = place % 2
        table[name] = f"part{shard}.safetensors" if form == "map" else f"model-0000{shard + 1}-of-00002.safetensors"
        shards[shard][name] = value
    for shard, held in enumerate(shards):
        files.write_tensors(folder / sorted(set(table.values()))[shard], held)
    name, text = (
        ("param_name_map.json", table) if form == "map" else ("model.safetensors.index.json", {"weight_map": table})
    )
    (folder / name).write_text(json.dumps(text))
    return folder


def read(out, form):
    import mindspore as ms

    if form == "ckpt":
        return {n: p.asnumpy() for n, p in ms.load_checkpoint(str(out / "model.ckpt")).items()}
    return {n: v for file in out.glob("*.safetensors") for n, v in files.read_tensors(file)[0].items()}


def stems(path):
    from tests.only_ms import stacks_ms

    return stacks_ms.built(path)


def named(name):
    """The stem stands under its own name in the whole."""
    return f"stem.{name}" if name.startswith("embed.") else name


@pytest.mark.parametrize(
    ("form", "method"), [("index", "par"), ("map", "hessian"), ("ckpt", "hessian"), ("file", "magnitude")]
)
def test_block_by_block_equals_the_whole(kit, stack, form, method, tmp_path):
    from slimkit_ms import Compressor, sparsify_checkpoint
    from tests.only_ms import stacks_ms

    config = SparseConfig(method=method, min_tokens=1)
    names = (lambda n: theirs(named(n))) if form == "index" else named
    report = sparsify_checkpoint(
        saved(stack, tmp_path / "src", form),
        tmp_path / "out",
        config,
        batches(),
        build=stems,
        blocks=BLOCKS,
        names=names,
    )
    assert report["ratio"] == 0.5
    whole = stacks_ms.filled(stacks_ms.Stack())
    Compressor(whole, SparseConfig(method=method, min_tokens=1, ignore=["head"])).compress(batches())
    found = read(tmp_path / "out", form)
    for name, value in values(whole).items():
        other = found[theirs(name) if form == "index" else name]
        np.testing.assert_allclose(other, value, atol=1e-5, err_msg=name)  # the same text on the same numbers
    if form in ("index", "map"):
        assert (tmp_path / "out" / "config.json").exists()
        assert (
            tmp_path / "out" / ("param_name_map.json" if form == "map" else "model.safetensors.index.json")
        ).exists()


TRAINED = {"method": "block", "options": {"passes": 3, "rate": 0.001}}


@pytest.mark.parametrize(
    "kw", [TRAINED, {"method": "hessian", "uniform": "dlp"}, {"method": "wanda", "uniform": False}]
)
def test_trained_blocks_and_ratios_of_a_rule_equal_the_whole(kit, stack, kw, tmp_path, monkeypatch):
    from slimkit.core.sparse import allocate, reconstruct
    from slimkit_ms import Compressor, sparsify_checkpoint
    from tests.only_ms import stacks_ms

    monkeypatch.setattr(allocate, "SHARE", 1)
    monkeypatch.setattr(reconstruct, "LEAST", 10**6)  # the rows that train judge, too: there is something to gain
    monkeypatch.setattr(reconstruct, "HOLD_OUT", 10**6)
    config = SparseConfig(min_tokens=1, **kw)
    source = saved(stack, tmp_path / "src", "map")
    report = sparsify_checkpoint(source, tmp_path / "out", config, batches(), build=stems, blocks=BLOCKS, names=named)
    whole = stacks_ms.filled(stacks_ms.Stack(head=False))  # its parameters are drawn in the same order
    other = Compressor(whole, config).compress(batches())
    if config.allocation:
        told, expected = report["allocation"], other["allocation"]
        assert told["kept"] == expected["kept"]
        assert told[f"{config.allocation}_error"] == pytest.approx(expected[f"{config.allocation}_error"], rel=1e-4)
    else:
        assert min(row["passes"] for row in report["layers"].values()) > 0
    found = read(tmp_path / "out", "map")
    for name, value in values(whole).items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)  # the same text on the same numbers
    moved = {name for name, value in values(stack).items() if not np.array_equal(found[name], value)}
    assert any("gamma" in name for name in moved) == config.row.reconstructs


@pytest.mark.parametrize("kw", [{"method": "par"}, TRAINED])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(kit, stack, kw, tmp_path, monkeypatch):
    from slimkit.core.sparse import reconstruct
    from slimkit_ms.sparse import checkpoint

    monkeypatch.setattr(reconstruct, "LEAST", 10**6)
    monkeypatch.setattr(reconstruct, "HOLD_OUT", 10**6)
    source = saved(stack, tmp_path / "src", "map")
    config = SparseConfig(min_tokens=1, **kw)

    def work(out, build=stems):
        return checkpoint.sparsify_checkpoint(source, out, config, batches(), build=build, blocks=BLOCKS, names=named)

    work(tmp_path / "whole")
    write = checkpoint.CheckpointCells._write

    def stop(self, index, *rest):
        write(self, index, *rest)
        if index == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointCells, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path / "out")
    assert (tmp_path / "out" / ".slimkit-sparse" / "block-00000.json").exists()
    assert work(tmp_path / "out")["ratio"] == 0.5
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    with pytest.raises(UnsupportedError, match="must return a Cell"):
        work(tmp_path / "none", lambda _path: None)
    with pytest.raises(UnsupportedError, match="hold a tensor"):
        checkpoint.sparsify_checkpoint(
            source, tmp_path / "bad", config, batches(), build=stems, blocks=["layers.0"], names=named
        )


def test_bfloat16_files_stay_bfloat16(kit, stack, tmp_path):
    from slimkit.core.checkpoint.weightfile import Entry, Safetensors, stream_safetensors
    from slimkit_ms import sparsify_checkpoint

    own = values(stack)
    entries = {name: Entry("BF16", v.shape) for name, v in own.items()}
    stored = {name: encode(v, "BF16") for name, v in own.items()}
    (tmp_path / "src").mkdir()
    stream_safetensors(tmp_path / "src" / "model.safetensors", entries, stored.items())
    config = SparseConfig(method="hessian", min_tokens=1)
    sparsify_checkpoint(tmp_path / "src", tmp_path / "out", config, batches(), build=stems, blocks=BLOCKS, names=named)
    with Safetensors(tmp_path / "out" / "model.safetensors") as made:
        assert made.entries == entries
        assert (made.read("blocks.0.up.weight") == 0).mean() == 0.5
        assert (made.raw("head.weight") == stored["head.weight"]).all()
