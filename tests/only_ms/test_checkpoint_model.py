"""TrainableParamsCheckPoint under mindspore.Model.train, and checkpoints exchanged with MindSpore itself."""

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint.ckpt import Ckpt
from slimkit.core.errors import FileFormatError
from slimkit_ms.checkpoint import (
    CheckpointConfig,
    TrainableParamsCheckPoint,
    load_checkpoint,
    load_param_into_net,
    save_checkpoint,
)

import mindspore as ms
from mindspore import nn
from mindspore.train import Model, ModelCheckpoint


@pytest.fixture(scope="module", autouse=True)
def _device():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.base, self.norm, self.head = nn.Dense(4, 4), nn.BatchNorm1d(4), nn.Dense(4, 1)
        for parameter in self.base.get_parameters():
            parameter.requires_grad = False

    def construct(self, x):
        return self.head(self.norm(self.base(x)))


TRAINABLE = ["head.bias", "head.weight", "norm.beta", "norm.gamma"]


def train(net, *callbacks, epochs=2, optimizer=None):
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((12, 4)).astype(np.float32), "y": rng.standard_normal((12, 1)).astype(np.float32)}
    rows = ms.dataset.NumpySlicesDataset(data, shuffle=False).batch(4)
    optimizer = optimizer or nn.Adam(net.trainable_params(), 0.1)
    model = Model(net, nn.MSELoss(), optimizer)
    model.train(epochs, rows, callbacks=list(callbacks), dataset_sink_mode=False)
    return optimizer


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_only_what_trains_is_saved_and_mindspore_loads_it(tmp_path, ending):
    net = Net()
    config = CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2, format=ending, append_info=["epoch_num"])
    if ending == "safetensors":
        config = CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2, format=ending)
    saver = TrainableParamsCheckPoint(str(tmp_path), "D", config)
    assert isinstance(saver, ModelCheckpoint)
    train(net, saver)
    names = sorted(p.name for p in tmp_path.iterdir() if p.suffix == f".{ending}")
    assert names == [f"D-2_1.{ending}", f"D-2_3.{ending}"]
    held = load_checkpoint(saver.latest_ckpt_file_name)
    assert sorted(set(held) - {"epoch_num"}) == TRAINABLE
    assert held.get("epoch_num", 2) == 2
    theirs = ms.load_checkpoint(saver.latest_ckpt_file_name, format=ending)
    own = {p.name: p.asnumpy() for p in net.get_parameters()}
    for name in TRAINABLE:
        assert np.array_equal(theirs[name].asnumpy(), own[name])
        assert np.array_equal(held[name].asnumpy(), own[name])


def test_the_seeds_recipe_pretrained_then_delta(tmp_path):
    net = Net()
    ms.save_checkpoint(net, str(tmp_path / "pretrained.ckpt"))
    saver = TrainableParamsCheckPoint(str(tmp_path / "delta"), batch_norm_statistics=True)
    train(net, saver)
    fresh = Net()
    load_param_into_net(fresh, tmp_path / "pretrained.ckpt", strict_load=True)
    report = load_param_into_net(fresh, saver.latest_ckpt_file_name)
    assert report.missing == ["base.weight", "base.bias"]
    x = ms.Tensor(np.ones((2, 4), np.float32))
    assert np.array_equal(fresh.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())


def test_the_optimizers_state_is_saved_on_request_and_restored(tmp_path):
    net = Net()
    saver = TrainableParamsCheckPoint(str(tmp_path), optimizer_state=True, batch_norm_statistics=True)
    optimizer = train(net, saver)
    fresh = Net()
    other = nn.Adam(fresh.trainable_params(), 0.1)
    load_param_into_net(fresh, saver.latest_ckpt_file_name, optimizer=other)
    ours = {p.name: p.asnumpy() for p in optimizer.get_parameters()}
    assert all(np.array_equal(p.asnumpy(), ours[p.name]) for p in other.get_parameters())
    assert any(n.startswith("moment") for n in ours)


def test_background_other_network_and_checksum(tmp_path):
    net = Net()
    config = CheckpointConfig(async_save=True, saved_network=net.head, crc_check=True)
    saver = TrainableParamsCheckPoint(str(tmp_path), config=config)
    train(net, saver, epochs=1)
    theirs = ms.load_checkpoint(saver.latest_ckpt_file_name, crc_check=True)
    assert sorted(theirs) == ["head.bias", "head.weight"]


def test_an_encrypted_file_is_written_by_mindspore(tmp_path):
    key = b"0123456789ABCDEF"
    saver = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(enc_key=key))
    train(Net(), saver, epochs=1)
    theirs = ms.load_checkpoint(saver.latest_ckpt_file_name, dec_key=key)
    assert sorted(theirs) == TRAINABLE
    with pytest.raises(FileFormatError, match="encrypted"):
        load_checkpoint(saver.latest_ckpt_file_name)


def test_an_optimizer_inside_the_network_is_not_saved(tmp_path):
    net = Net()
    wrapped = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Adam(net.trainable_params(), 0.1))
    saver = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(saved_network=wrapped))
    train(net, saver, epochs=1)
    assert sorted(load_checkpoint(saver.latest_ckpt_file_name)) == TRAINABLE


def test_what_mindspore_loads_in_silence_is_refused_by_name(tmp_path):
    net = Net()
    path = save_checkpoint(net, tmp_path / "n.ckpt").path
    with Ckpt(path) as whole:
        parts = whole._parts
        last = list(whole.entries)[-1]
        start = min(o for o, _ in parts[last])
    content = path.read_bytes()
    # Cut where the last record begins: its tag and heads take fewer than 64 bytes before its values.
    boundary = next(b for b in range(start - 64, start) if content[b] == 0x0A and _parses(content[:b], tmp_path))
    path.write_bytes(content[:boundary])
    assert last not in ms.load_checkpoint(str(path))  # MindSpore says nothing
    with pytest.raises(FileFormatError, match=f"tensor '{last}' is missing"):
        load_param_into_net(Net(), path)
    flipped = bytearray(content)
    flipped[start + 1] ^= 1
    path.write_bytes(bytes(flipped))
    ms.load_checkpoint(str(path))
    with pytest.raises(FileFormatError, match=f"tensor '{last}' is damaged"):
        load_param_into_net(Net(), path)


def _parses(content, folder):
    trial = folder / "trial.ckpt"
    trial.write_bytes(content)
    try:
        Ckpt(trial).close()
    except FileFormatError:
        return False
    return True


@pytest.mark.parametrize(
    "dtype", [ms.float32, ms.float16, ms.bfloat16, ms.int8, ms.int32, ms.int64, ms.uint8, ms.bool_]
)
def test_every_type_is_exchanged_with_mindspore(tmp_path, dtype):
    value = ms.Tensor(np.array([[0, 1, 0], [1, 1, 0]], np.float32)).astype(dtype)
    ms.save_checkpoint([{"name": "w", "data": value}], str(tmp_path / "theirs.ckpt"))
    held = load_checkpoint(tmp_path / "theirs.ckpt")
    assert held["w"].dtype == dtype
    ours = save_checkpoint(held, tmp_path / "ours.ckpt").path
    assert ours.read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    again = ms.load_checkpoint(str(ours))["w"]
    assert again.dtype == dtype
    assert np.array_equal(again.astype(ms.float32).asnumpy(), value.astype(ms.float32).asnumpy())


def test_numbers_saved_by_mindspore_are_values_and_a_torch_file_is_refused(tmp_path):
    net = Net()
    ms.save_checkpoint(net, str(tmp_path / "n.ckpt"), append_dict={"epoch_num": 3, "lr": 0.5, "note": "hello"})
    report = load_param_into_net(Net(), tmp_path / "n.ckpt", strict_load=True)
    assert report.values == {"epoch_num": 3, "lr": 0.5, "note": "hello"}
    (tmp_path / "w.pt").write_bytes(b"PK")
    with pytest.raises(FileFormatError, match="convert_checkpoint"):
        load_checkpoint(tmp_path / "w.pt")


def test_a_failing_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = save_checkpoint(Net(), tmp_path / "n.ckpt").path
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(Net(), tmp_path / "n.ckpt")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def strategy_file(path, slices):
    """What each device of two held, as MindSpore itself writes it: name -> the axis that was cut, or None."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    made = ParallelStrategyMap(current_stage=0)
    for name, (axis, rank) in slices.items():
        item = made.parallel_layout_item.add()
        item.param_name = name
        layout = item.parallel_layouts
        layout.dev_matrix.add().dim.extend([2])
        layout.tensor_map.add().dim.extend([0 if a == axis else -1 for a in range(rank)])
        layout.param_split_shape.add()
        layout.indices_offset.add()
        layout.field = layout.opt_weight_shard_step = layout.opt_weight_shard_size = 0
    path.write_bytes(made.SerializeToString())
    return str(path)


def test_the_seeds_recipe_for_several_cards_pretrained_then_delta(tmp_path):
    # Only training on several devices cuts parameters; putting the slices together again needs none.
    cut = {"base.weight": (0, 2), "base.bias": (0, 1), "head.weight": (1, 2), "head.bias": (None, 1)}
    cut |= {f"norm.{n}": (None, 1) for n in ("gamma", "beta", "moving_mean", "moving_variance")}

    def two_cards(net, names, prefix):
        files_of, held = [], {p.name: p.asnumpy() for p in net.get_parameters()}
        for card in range(2):
            part = {}
            for name in names:
                axis = cut[name][0]
                part[name] = held[name] if axis is None else np.split(held[name], 2, axis)[card]
            files_of.append(str(save_checkpoint(part, tmp_path / f"{prefix}_{card}.ckpt").path))
        return files_of, strategy_file(tmp_path / f"{prefix}_strategy.ckpt", {n: cut[n] for n in names})

    net = Net()
    pretrained, pretrained_strategy = two_cards(net, list(cut), "pretrained")
    saver = TrainableParamsCheckPoint(str(tmp_path / "delta"), batch_norm_statistics=True)
    train(net, saver)
    names = sorted(load_checkpoint(saver.latest_ckpt_file_name))
    assert "base.weight" not in names
    delta, delta_strategy = two_cards(net, names, "delta")
    fresh = Net()
    ms.load_distributed_checkpoint(
        network=fresh, checkpoint_filenames=pretrained, train_strategy_filename=pretrained_strategy
    )
    ms.load_distributed_checkpoint(network=fresh, checkpoint_filenames=delta, train_strategy_filename=delta_strategy)
    ours = {p.name: p.asnumpy() for p in net.get_parameters()}
    assert all(np.array_equal(p.asnumpy(), ours[p.name]) for p in fresh.get_parameters())
