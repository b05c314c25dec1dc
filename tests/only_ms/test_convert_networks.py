"""convert_checkpoint between PyTorch networks and their MindSpore twins, both ways, proven by running both."""

import importlib

import numpy as np
import pytest

from tests.conftest import INSTALLED
from tests.only_ms import convert_cells as cells

import mindspore as ms

# Both frameworks at once: without PyTorch there is nothing to convert.
FAMILIES = ["resnet", "bert", "vit", "llama", "lstm", "gru"] if "torch" in INSTALLED else []


@pytest.fixture(scope="module", autouse=True)
def _device():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


def torch_resnet(torch):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, n_in, n_out, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
            self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
            self.downsample = None
            if stride != 1:
                self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
            self.layer1, self.layer2 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1)), nn.Sequential(Block(8, 16, 2))
            self.fc = nn.Linear(16, 5)

        def forward(self, x):
            return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())).mean((2, 3)))

    return ResNet()


def torch_sequence(torch, kind):
    nn = torch.nn

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3, padding=1)
            self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(4, 5, 2, batch_first=True, bidirectional=True)
            self.norm, self.act, self.head = nn.LayerNorm(10), nn.PReLU(), nn.Linear(10, 2)

        def forward(self, x):
            y = self.norm(self.rnn(self.conv(x).transpose(1, 2))[0])
            return self.head(self.act(y.transpose(1, 2)).transpose(1, 2))

    return Sequence()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def family(name):
    """(torch network, MindSpore network, inputs)."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image, ids = rng.standard_normal((2, 3, 16, 16)).astype(np.float32), rng.integers(0, 64, (2, 6))
    if name == "resnet":
        pair = torch_resnet(torch), cells.ResNet(), image
    elif name in ("lstm", "gru"):
        pair = torch_sequence(torch, name), cells.Sequence(name), image[:, :, 0]
    else:
        hf = importlib.import_module("transformers")
        if name == "bert":
            config = hf.BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES)
            pair = hf.BertModel(config, add_pooling_layer=False), cells.Bert(), ids
        elif name == "vit":
            config = hf.ViTConfig(image_size=16, patch_size=8, **SIZES)
            pair = hf.ViTModel(config, add_pooling_layer=False), cells.ViT(), image
        else:
            config = hf.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
            pair = hf.LlamaForCausalLM(config), cells.Llama(), ids
    with torch.no_grad():
        for parameter in (*pair[0].parameters(), *(b for n, b in pair[0].named_buffers() if "running" in n)):
            parameter.add_((torch.rand_like(parameter) - 0.4) * 0.1)
    return pair


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_with_equal_outputs(tmp_path, name, ending):
    torch_net, cell, inputs = family(name)
    torch = importlib.import_module("torch")
    slim, slim_ms = importlib.import_module("slimkit"), importlib.import_module("slimkit_ms")
    first = slim.save_checkpoint(torch_net, tmp_path / f"torch{ending}").path
    report = slim.convert_checkpoint(first, tmp_path / "cell.ckpt", torch_net, cell, inputs=inputs)
    # float32, up to 48 terms per sum, two layers deep
    assert report.largest_difference < 1e-5
    assert report.missing == report.unused == []
    loaded = slim_ms.load_checkpoint(tmp_path / "cell.ckpt")
    assert set(loaded) == {p.name for p in cell.get_parameters()}
    # Back again, into a fresh network: every parameter and statistic is the same bit for bit.
    torch.manual_seed(7)
    fresh = family(name)[0]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    back = slim_ms.convert_checkpoint(tmp_path / "cell.ckpt", tmp_path / f"back{ending}", cell, fresh, inputs=inputs)
    assert back.largest_difference < 1e-5
    for key, value in torch_net.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]) or key.endswith("num_batches_tracked"), key
    slim.load_param_into_net(fresh, tmp_path / f"back{ending}", strict_load=True)


@pytest.mark.parametrize("name", FAMILIES[:1])
def test_the_report_tells_what_was_done(tmp_path, name):
    torch_net, cell, _ = family(name)
    slim = importlib.import_module("slimkit")
    path = slim.save_checkpoint(torch_net, tmp_path / "net.pt").path
    report = slim.convert_checkpoint(path, tmp_path / "net.ckpt", torch_net, cell)
    assert report.to == "mindspore"
    assert report.renamed["layer1.0.bn1.running_mean"] == "layer1.0.bn1.moving_mean"
    assert report.by_order["fc"] == "head"
    assert all(n.endswith("num_batches_tracked") for n in report.dropped)
    assert report.bytes_written == (tmp_path / "net.ckpt").stat().st_size
    assert report.largest_difference is None
    back = slim.convert_checkpoint(tmp_path / "net.ckpt", tmp_path / "back.pt", cell, torch_net)
    assert back.initialised == report.dropped


@pytest.mark.parametrize("name", FAMILIES[3:4])
def test_tied_weights_are_written_once_for_mindspore_and_twice_for_torch(tmp_path, name):
    torch_net, cell, _ = family(name)
    slim = importlib.import_module("slimkit")
    importlib.import_module("torch").save(torch_net.state_dict(), tmp_path / "both.pt")
    report = slim.convert_checkpoint(tmp_path / "both.pt", tmp_path / "net.ckpt", torch_net, cell)
    assert report.tied == {"lm_head.weight": "embed_tokens.embedding_table"}
    slim.convert_checkpoint(tmp_path / "net.ckpt", tmp_path / "back.safetensors", cell, torch_net)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(slim.load_checkpoint(tmp_path / "back.safetensors"))


@pytest.mark.parametrize("name", FAMILIES[:1])
def test_what_does_not_fit_is_refused_before_a_byte_is_written(tmp_path, name):
    torch_net, cell, inputs = family(name)
    slim = importlib.import_module("slimkit")
    path = slim.save_checkpoint(torch_net, tmp_path / "net.pt").path
    cell.head = ms.nn.Dense(16, 6)
    out = tmp_path / "net.ckpt"
    with pytest.raises(ValueError, match=r"'fc\.weight'"):
        slim.convert_checkpoint(path, out, torch_net, cell)
    with pytest.raises(ValueError, match="together"):
        slim.convert_checkpoint(path, out, torch_net)
    with pytest.raises(ValueError, match="two frameworks"):
        slim.convert_checkpoint(path, out, torch_net, torch_net)
    with pytest.raises(ValueError, match="needs both networks"):
        slim.convert_checkpoint(path, out, inputs=inputs)
    with pytest.raises(TypeError, match="source_net"):
        slim.convert_checkpoint(path, out, "net", cell)
    assert not out.exists()
    report = slim.convert_checkpoint(path, out, torch_net, cell, strict=False)
    assert sorted(report.unused) == ["fc.bias", "fc.weight"]
    assert sorted(report.missing) == ["head.bias", "head.weight"]


@pytest.mark.parametrize("name", FAMILIES[:1])
def test_group_norm_and_transposed_convolution_both_ways(tmp_path, name):
    torch, slim = importlib.import_module("torch"), importlib.import_module("slimkit")
    net = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 4, 2, 2), torch.nn.GroupNorm(2, 4))
    torch.nn.init.normal_(net[1].weight)
    torch.nn.init.normal_(net[1].bias)
    layers = ms.nn.Conv2dTranspose(3, 4, 2, 2, pad_mode="valid", has_bias=True), ms.nn.GroupNorm(2, 4)
    cell, image = ms.nn.SequentialCell(*layers), family(name)[2]
    path = slim.save_checkpoint(net, tmp_path / "net.pt").path
    report = slim.convert_checkpoint(path, tmp_path / "net.ckpt", net, cell, inputs=image)
    assert report.largest_difference < 1e-5  # float32, a dozen terms per sum
    back = slim.convert_checkpoint(tmp_path / "net.ckpt", tmp_path / "back.pt", cell, net, inputs=image)
    assert back.largest_difference < 1e-5


def test_instance_norm_keeps_its_values_both_ways(tmp_path):
    """MindSpore has no CPU kernel for it, so the networks cannot be run on one input."""
    torch, slim = importlib.import_module("torch"), importlib.import_module("slimkit")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    )
    torch.nn.init.normal_(net[1].weight)
    torch.nn.init.normal_(net[1].bias)
    cell = ms.nn.SequentialCell(ms.nn.Conv2d(3, 4, 1, has_bias=True), ms.nn.InstanceNorm2d(4))
    path = slim.save_checkpoint(net, tmp_path / "net.safetensors").path
    slim.convert_checkpoint(path, tmp_path / "net.ckpt", net, cell)
    found = ms.load_checkpoint(str(tmp_path / "net.ckpt"))
    np.testing.assert_array_equal(found["1.gamma"].asnumpy(), net[1].weight.detach().numpy())
    np.testing.assert_array_equal(found["1.beta"].asnumpy(), net[1].bias.detach().numpy())
    slim.convert_checkpoint(tmp_path / "net.ckpt", tmp_path / "back.safetensors", cell, net)
    back = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    )
    slim.load_checkpoint(tmp_path / "back.safetensors", back)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
