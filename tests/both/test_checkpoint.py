"""Saving by hand and loading on both frameworks: the uses of the checkpoint document, and what damage is caught."""

import json

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint import manifest
from slimkit.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileFormatError,
    LinkPathError,
    PatternError,
    PlanError,
    UnsupportedError,
)


@pytest.fixture
def room(kit):
    return kit.room("checkpoint")


ENDINGS = {"torch": (".safetensors", ".pt"), "mindspore": (".ckpt", ".safetensors")}


def net(kit, seed=0):
    return kit.fill(kit.named(conv=kit.conv(2, 3, 3), bn=kit.batch_norm(3), fc=kit.linear(4, 2)), seed)


def same(kit, one, two):
    first, second = kit.values(one), kit.values(two)
    return first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("number", [0, 1])
def test_a_net_saved_by_hand_comes_back(kit, room, tmp_path, number):
    path = tmp_path / f"net{ENDINGS[kit.name][number]}"
    saved, fresh = net(kit), net(kit, 1)
    assert room.save_checkpoint(saved, path).wait() == path
    report = room.load_param_into_net(fresh, path, strict_load=True)
    assert same(kit, saved, fresh)
    assert report.verified
    assert report.missing == report.unused == []
    assert report.mismatched == {}
    json.dumps(report.as_dict())


def test_a_name_without_ending_gets_the_frameworks_own(kit, room, tmp_path):
    path = room.save_checkpoint(net(kit), tmp_path / "net").path
    assert path.suffix == ENDINGS[kit.name][0]
    with pytest.raises(ArgumentError, match="must end in"):
        room.save_checkpoint(net(kit), tmp_path / "net.txt")


def test_a_sub_network_is_saved_and_lands_under_its_longer_name(kit, room, tmp_path):
    saved, fresh = net(kit), net(kit, 1)
    path = room.save_checkpoint(
        {n: v for n, v in kit.params(saved).items() if n.startswith("fc.")}, tmp_path / "fc"
    ).path
    short = {n.removeprefix("fc."): v for n, v in room.load_checkpoint(path).items()}
    before = kit.values(fresh)
    report = room.load_param_into_net(fresh, {f"fc.{n}": v for n, v in short.items()})
    assert sorted(report.loaded) == ["fc.bias", "fc.weight"]
    after = kit.values(fresh)
    assert np.array_equal(after["fc.weight"], kit.values(saved)["fc.weight"])
    assert all(np.array_equal(before[n], after[n]) for n in before if not n.startswith("fc."))
    assert set(report.missing) >= {"conv.weight"}


def test_suffixes_match_in_both_directions_only_when_not_strict(kit, room, tmp_path):
    saved = net(kit)
    longer = {f"net.backbone.{n}": v for n, v in kit.params(saved).items()}
    fresh = net(kit, 1)
    report = room.load_param_into_net(fresh, longer)
    assert report.renamed["fc.weight"] == "net.backbone.fc.weight"
    assert np.array_equal(kit.values(fresh)["fc.weight"], kit.values(saved)["fc.weight"])
    wrapped = kit.named(net=net(kit, 2))
    room.load_param_into_net(wrapped, dict(kit.params(saved)))
    assert np.array_equal(kit.values(wrapped)["net.fc.weight"], kit.values(saved)["fc.weight"])
    before = kit.values(fresh)
    with pytest.raises(PlanError, match="no place in the network"):
        room.load_param_into_net(fresh, longer, strict_load=True)
    assert all(np.array_equal(before[n], v) for n, v in kit.values(fresh).items())


def test_an_ambiguous_suffix_matches_nothing(kit, room):
    two = kit.named(a=kit.linear(2, 2), b=kit.linear(2, 2))
    with pytest.raises(PlanError, match="'weight'"):
        room.load_param_into_net(two, {"weight": kit.tensor(np.ones((2, 2), np.float32))})
    report = room.load_param_into_net(two, {"weight": kit.tensor(np.ones((2, 2), np.float32))}, report_only=True)
    assert report.loaded == []
    assert report.unused == ["weight"]


@pytest.mark.parametrize("number", [0, 1])
def test_numbers_and_strings_survive_a_round_trip(kit, room, tmp_path, number):
    path = tmp_path / f"hyper{ENDINGS[kit.name][number]}"
    values = {
        "epoch_size": 10,
        "learning_rate": 0.01,
        "note": "hé – 中文",
        "done": True,
        "empty": "",
        "big": -(1 << 62),
    }
    pairs = [{"name": n, "data": v} for n, v in values.items()]
    pairs.append({"name": "w", "data": kit.tensor(np.arange(6, dtype=np.float32).reshape(2, 3))})
    pairs.append({"name": "numpy", "data": np.arange(3)})
    room.save_checkpoint(pairs, path)
    back = room.load_checkpoint(path)
    assert {n: back[n] for n in values} == values
    assert all(type(back[n]) is type(v) for n, v in values.items())
    assert np.array_equal(kit.array(back["w"]), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(kit.array(back["numpy"]), np.arange(3))


def test_a_checkpoint_is_edited_and_saved_again(kit, room, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first = room.save_checkpoint(net(kit), first).path
    held = room.load_checkpoint(first)
    del held["conv.weight"]
    held["epoch_size"] = 10
    held["fc.bias"] = kit.tensor(np.array([66.0, 67.0], np.float32))
    second = room.save_checkpoint(held, second).path
    again = room.load_checkpoint(second)
    assert "conv.weight" not in again
    assert again["epoch_size"] == 10
    assert kit.array(again["fc.bias"]).tolist() == [66.0, 67.0]
    fresh = net(kit, 1)
    report = room.load_param_into_net(fresh, second)
    assert report.missing == ["conv.weight"]
    assert report.values == {"epoch_size": 10}


def test_saved_with_values_of_the_training_and_a_function(kit, room, tmp_path):
    path = room.save_checkpoint(
        net(kit), tmp_path / "n", lambda n: "fc" in n or n == "epoch", {"epoch": 3, "lr": 0.1}
    ).path
    assert set(room.load_checkpoint(path)) == {"fc.weight", "fc.bias", "epoch"}


def test_filters_leave_out_by_prefix_and_by_function(kit, room, tmp_path):
    path = room.save_checkpoint(net(kit), tmp_path / "n").path
    assert not any(n.startswith("conv") for n in room.load_checkpoint(path, filter_prefix="conv"))
    assert set(room.load_checkpoint(path, filter_prefix=["conv", "bn"])) == {"fc.weight", "fc.bias"}
    assert set(room.load_checkpoint(path, choice_func=lambda n: n.endswith("fc.bias"))) == {"fc.bias"}
    fresh = net(kit, 1)
    report = room.load_param_into_net(fresh, path, filter_prefix=["conv", "bn"])
    assert sorted(report.loaded) == ["fc.bias", "fc.weight"]
    assert "conv.weight" in report.filtered
    with pytest.raises(PatternError, match="'optimizer'"):
        room.load_checkpoint(path, filter_prefix="optimizer")
    with pytest.raises(PatternError, match="wants none"):
        room.load_param_into_net(fresh, path, choice_func=lambda n: False)


def test_load_checkpoint_fills_a_net_when_one_is_given(kit, room, tmp_path):
    saved, fresh = net(kit), net(kit, 1)
    path = room.save_checkpoint(saved, tmp_path / "n").path
    room.load_checkpoint(path, fresh)
    assert same(kit, saved, fresh)


def test_shapes_that_differ_are_refused_and_the_net_is_as_it_was(kit, room):
    fresh = net(kit)
    before = kit.values(fresh)
    wrong = {"fc.weight": np.ones((2, 4), np.float32), "fc.bias": np.ones(3, np.float32)}
    with pytest.raises(PlanError, match="F32 \\[2\\] in the network, F32 \\[3\\]"):
        room.load_param_into_net(fresh, wrong)
    with pytest.raises(PlanError, match="differ in shape or kind"):
        room.load_param_into_net(fresh, {"fc.bias": np.ones(2, np.int64)})
    assert all(np.array_equal(before[n], v) for n, v in kit.values(fresh).items())
    report = room.load_param_into_net(fresh, wrong, report_only=True)
    assert report.loaded == ["fc.weight"]
    assert set(report.mismatched) == {"fc.bias"}


def test_half_precision_files_land_in_the_nets_precision(kit, room, tmp_path):
    fresh = net(kit)
    room.load_param_into_net(fresh, {"fc.bias": np.array([0.5, 2.0], np.float16)})
    value = kit.values(fresh)["fc.bias"]
    assert value.dtype == np.float32
    assert value.tolist() == [0.5, 2.0]


def test_a_save_in_the_background_holds_the_values_of_its_start(kit, room, tmp_path):
    saved = net(kit)
    expected = kit.values(saved)
    work = room.save_checkpoint(saved, tmp_path / "n", async_save=True)
    kit.fill(saved, 9)
    path = work.wait()
    assert work.done
    back = room.load_checkpoint(path)
    assert all(np.array_equal(kit.array(back[n]), v) for n, v in expected.items())


def test_an_error_in_the_background_is_raised_by_wait(kit, room, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "atomic_file", full)
    work = room.save_checkpoint(net(kit), tmp_path / f"n{ENDINGS[kit.name][0]}", async_save=True)
    with pytest.raises(OSError, match="No space left"):
        work.wait()


@pytest.mark.parametrize(
    ("thing", "error"),
    [
        ("text", ArgumentTypeError),
        (3, ArgumentTypeError),
        ([{"name": "a"}], ArgumentTypeError),
        ([{"name": "a", "data": None}], ArgumentTypeError),
        ({"a": [1, 2]}, ArgumentTypeError),
        ({}, ArgumentError),
        ({"": 1}, ArgumentError),
        ({3: 1}, ArgumentTypeError),
        ({"a": 1 << 70}, ArgumentError),
        ([{"name": "a", "data": 1}, {"name": "a", "data": 2}], ArgumentError),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(kit, room, tmp_path, thing, error):
    with pytest.raises(error, match=r"Received|twice"):
        room.save_checkpoint(thing, tmp_path / f"n{ENDINGS[kit.name][0]}")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named_by_tensor(kit, room, tmp_path):
    ending = ENDINGS[kit.name][0]
    path = room.save_checkpoint(net(kit), tmp_path / f"n{ending}").path
    whole = path.read_bytes()
    value = kit.values(net(kit))["fc.weight"].tobytes()
    at = whole.index(value) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])  # one flipped bit
    fresh = net(kit, 1)
    before = kit.values(fresh)
    for load in (lambda: room.load_checkpoint(path), lambda: room.load_param_into_net(fresh, path)):
        with pytest.raises(FileFormatError, match=r"tensor 'fc\.weight' is damaged"):
            load()
    assert all(np.array_equal(before[n], v) for n, v in kit.values(fresh).items())
    assert not np.array_equal(kit.array(room.load_checkpoint(path, verify=False)["fc.weight"]), before["fc.weight"])
    manifest.sidecar(path).unlink()
    assert not room.load_param_into_net(fresh, path).verified


def test_a_manifest_of_another_file_is_refused_by_name(kit, room, tmp_path):
    ending = ENDINGS[kit.name][0]
    one = room.save_checkpoint(net(kit), tmp_path / f"one{ending}").path
    two = room.save_checkpoint({"x": np.ones(2)}, tmp_path / f"two{ending}").path
    two.write_bytes(one.read_bytes())
    with pytest.raises(FileFormatError, match="'x' is missing"):
        room.load_checkpoint(two)
    manifest.sidecar(one).write_text("{}")
    with pytest.raises(FileFormatError, match="no manifest of version"):
        room.load_checkpoint(one)


def test_saving_again_replaces_file_and_manifest(kit, room, tmp_path):
    path = tmp_path / f"n{ENDINGS[kit.name][0]}"
    room.save_checkpoint(net(kit), path)
    room.save_checkpoint(net(kit, 1), path)
    fresh = net(kit, 2)
    assert room.load_param_into_net(fresh, path).verified
    assert same(kit, fresh, net(kit, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, path.name + ".manifest.json"]


def test_links_and_missing_files_are_refused(kit, room, tmp_path):
    ending = ENDINGS[kit.name][0]
    path = room.save_checkpoint(net(kit), tmp_path / f"n{ending}").path
    link = tmp_path / f"link{ending}"
    link.symlink_to(path)
    with pytest.raises(LinkPathError):
        room.load_checkpoint(link)
    with pytest.raises(LinkPathError):
        room.save_checkpoint(net(kit), link)
    with pytest.raises(FileFormatError, match="existing"):
        room.load_checkpoint(tmp_path / f"none{ending}")
    with pytest.raises(TypeError, match="ckpt_file_name"):
        room.load_checkpoint(5)
    with pytest.raises(TypeError, match="net"):
        room.load_param_into_net("net", {})


def test_the_room_offers_the_delta_files_too(room):
    assert callable(room.save_delta)
    assert callable(room.load_delta)
    assert "save_delta" in dir(room)


def _odd(kit):
    """Values that files of plain numbers cannot hold, and the word that the error must say."""
    found = {"object array": (np.array([object()]), "object"), "complex128 array": (np.ones(2, complex), "complex128")}
    if kit.name == "torch":
        torch = kit.torch
        return {
            **found,
            "sparse": (torch.eye(3).to_sparse(), "sparse_coo"),
            "rows": (torch.eye(3).to_sparse_csr(), "sparse_csr"),
            "quantised": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
            "meta": (torch.empty(3, device="meta"), "meta device"),
            "fake": (torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3)), "no values"),
            "complex": (torch.zeros(3, dtype=torch.complex128), "complex128"),
            "eights": (torch.zeros(3, dtype=torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
            "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        }
    ms = kit.ms
    index = ms.Tensor([[0, 1]], ms.int32)
    return {
        **found,
        "sparse": (ms.COOTensor(index, ms.Tensor([1.0], ms.float32), (2, 2)), "COOTensor"),
        "complex": (ms.Tensor(np.ones(2, np.complex64)), "Complex64"),
    }


def test_a_tensor_that_files_cannot_hold_is_one_clear_error(kit, tmp_path):
    for ending in (".safetensors", ".pt" if kit.name == "torch" else ".ckpt"):
        for name, (value, word) in _odd(kit).items():
            with pytest.raises(UnsupportedError, match=word) as caught:
                kit.slim.save_checkpoint(
                    {"fine": kit.tensor(np.ones(2, np.float32)), name: value}, tmp_path / f"x{ending}"
                )
            assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "\ud800", "a\udfff", "__metadata__"])
def test_a_name_that_no_file_can_hold_is_refused(kit, tmp_path, name):
    with pytest.raises(ArgumentError, match="name in save_obj"):
        kit.slim.save_checkpoint({name: kit.tensor(np.ones(2, np.float32))}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
