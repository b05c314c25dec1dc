"""Torch files: what loads, and what must never be executed or believed."""

import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest

from slimkit.checkpoint import load_checkpoint, save_checkpoint
from slimkit.core.errors import FileFormatError
from slimkit.core.weights.blocks import PruneConfig
from slimkit.torchfile import TorchWeightFile, restored, stored, write_torch
from slimkit.weights import prune_model_weight

import torch

FUZZED = int(os.environ.get("SLIMKIT_FUZZ", "300"))


@pytest.mark.parametrize("ending", ["pt", "pth", "pkl", "bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_ending_and_both_formats_load(tmp_path, ending, zipped):
    large, small = torch.nn.Linear(4, 4), torch.nn.Linear(3, 2)
    path = tmp_path / f"w.{ending}"
    torch.save(large.state_dict(), path, _use_new_zipfile_serialization=zipped)
    prune_model_weight(small, PruneConfig().set_steps(["prune_bert_intra_block"]), path)
    assert torch.equal(small.weight, large.weight[:2, :3])


def test_a_training_checkpoint_is_unwrapped(tmp_path):
    layer = torch.nn.Linear(2, 2)
    torch.save({"epoch": 3, "model": {"state_dict": layer.state_dict()}, "optimizer": {"state": {}}}, tmp_path / "c.pt")
    with TorchWeightFile(tmp_path / "c.pt") as weights:
        assert set(weights.entries) == {"weight", "bias"}


def test_numbers_strings_and_bfloat16_survive(tmp_path):
    tensors = {"w": torch.arange(6.0).reshape(2, 3).bfloat16(), "i": torch.tensor([1, 2])}
    write_torch(tmp_path / "w.pt", tensors, {"epoch": 3, "note": "hé", "flag": True})
    with TorchWeightFile(tmp_path / "w.pt") as weights:
        assert weights.values == {"epoch": 3, "note": "hé", "flag": True}
        assert weights.entries["w"].dtype == "BF16"
        assert np.array_equal(weights.read("w"), np.arange(6, dtype=np.float32).reshape(2, 3))
        assert torch.equal(restored(weights.raw("w"), "BF16"), tensors["w"])
    assert stored(tensors["i"]).tolist() == [1, 2]


class Evil:
    def __reduce__(self):
        return (open, ("executed.txt", "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_execute_code_is_refused_and_not_executed(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "x": Evil()}, "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match="weights_only=True"):
        TorchWeightFile("evil.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(FileFormatError, match="weights_only=True"):
        TorchWeightFile("plain.pkl")
    assert not (tmp_path / "executed.txt").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    plain = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 16
    with pytest.raises(FileFormatError, match="compressed"):
        TorchWeightFile(tmp_path / "bomb.pt")


def test_a_stride_of_zero_does_not_make_terabytes(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.pt")
    with pytest.raises(FileFormatError, match="claims"):
        TorchWeightFile(tmp_path / "wide.pt")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04.", b"no weights at all" * 40, b"PK\x05\x06" + b"\0" * 18])
def test_no_torch_file_is_told_by_its_content(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"x\.bin"):
        TorchWeightFile(tmp_path / "x.bin")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(FileFormatError, match="not a dict"):
        TorchWeightFile(tmp_path / "list.pt")
    torch.save({"epoch": None}, tmp_path / "none.pt")  # numbers alone are a checkpoint; this holds nothing
    with pytest.raises(FileFormatError, match="no tensor"):
        TorchWeightFile(tmp_path / "none.pt")
    torch.save({"w": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(FileFormatError, match="'w'"):
        TorchWeightFile(tmp_path / "sparse.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_fuzzed_torch_files_end_in_an_error_or_in_the_very_values(tmp_path, zipped):
    from slimkit.core.checkpoint import manifest
    from slimkit.core.errors import SlimkitError

    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2, 3])}
    path = save_checkpoint(tensors, tmp_path / "w.pt").path
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    good, chance, refused = path.read_bytes(), random.Random(0), 0
    assert manifest.sidecar(path).exists()
    for _ in range(FUZZED):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 2, 6))):
            at = chance.randrange(len(bad))
            if chance.random() < 0.8:
                bad[at] = chance.randrange(256)
            else:
                del bad[at : at + chance.randrange(1, 9)]
        path.write_bytes(bytes(bad))
        try:
            found = load_checkpoint(path)
        except SlimkitError:
            refused += 1
        else:
            assert all(torch.equal(found[n], t) for n, t in tensors.items())
    assert refused > 0.3 * FUZZED  # much of a zip is padding that nothing depends on


def test_a_torch_that_reads_pickles_unsafely_is_refused(tmp_path):
    from types import SimpleNamespace

    from slimkit.core.checkpoint.torchfile import TorchFile
    from slimkit.core.errors import UnsupportedError

    torch.save({"a": torch.ones(2)}, tmp_path / "net.pt")
    for version in ("2.9.1+cpu", "1.13.0"):
        with pytest.raises(UnsupportedError, match=r"from 2\.10 on"):
            TorchFile(tmp_path / "net.pt", SimpleNamespace(__version__=version))
