"""Layers of `mint` count as what they are in every room; where the CPU has no kernel, the trace and the shapes do."""

from __future__ import annotations

import numpy as np
import pytest

import slimkit_ms
from slimkit_ms import bridge, kinds
from slimkit_ms.signals import input_rows
from slimkit_ms.trace import trace
from tests import zoo_ms

import mindspore as ms
from mindspore import mint, nn, ops


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    global X, IDS
    X, IDS = zoo_ms.images(4, 6), ms.Tensor([1, 2])


class Mlp(nn.Cell):
    """Three dense layers of either family."""

    def __init__(self, dense=mint.nn.Linear):
        super().__init__()
        self.a, self.b, self.c = dense(6, 32), dense(32, 24), dense(24, 5)

    def construct(self, x):
        return self.c(ops.relu(self.b(ops.relu(self.a(x)))))


class Net(nn.Cell):
    """A convolution, norms, a table and dense layers of mint: most have no kernel on the CPU."""

    def __init__(self):
        super().__init__()
        self.conv = mint.nn.Conv2d(3, 16, 3, padding=1)
        self.bn = mint.nn.BatchNorm2d(16)
        self.deep = mint.nn.Conv2d(16, 16, 3, groups=16, padding="same")
        self.up = mint.nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.gn = mint.nn.GroupNorm(2, 16)
        self.table = mint.nn.Embedding(9, 16)
        self.norm = mint.nn.LayerNorm(16)
        self.fc, self.head = mint.nn.Linear(16, 24), mint.nn.Linear(24, 5)

    def construct(self, x, ids):
        y = self.gn(self.up(ops.relu(self.deep(ops.relu(self.bn(self.conv(x)))))))
        y = self.norm(y.mean((2, 3)) + self.table(ids))
        return self.head(ops.relu(self.fc(y)))


X = IDS = None  # made once the device is set


def both():
    """The same weights in both families."""
    pair = zoo_ms.randomise(Mlp(nn.Dense)), Mlp()
    for p, q in zip(pair[0].get_parameters(), pair[1].get_parameters()):
        q.set_data(ms.Tensor(p.asnumpy()))
    return pair


PAIRS = [
    (lambda: nn.Dense(2, 3), lambda: mint.nn.Linear(2, 3)),
    (lambda: nn.Conv1d(2, 3, 3), lambda: mint.nn.Conv1d(2, 3, 3)),
    (lambda: nn.Conv2d(2, 3, 3), lambda: mint.nn.Conv2d(2, 3, 3)),
    (lambda: nn.Conv3d(2, 3, 3), lambda: mint.nn.Conv3d(2, 3, 3)),
    (lambda: nn.Conv2dTranspose(2, 3, 3), lambda: mint.nn.ConvTranspose2d(2, 3, 3)),
    (lambda: nn.Embedding(4, 3), lambda: mint.nn.Embedding(4, 3)),
    (lambda: nn.BatchNorm2d(3), lambda: mint.nn.BatchNorm2d(3)),
    (lambda: nn.LayerNorm((3,)), lambda: mint.nn.LayerNorm(3)),
    (lambda: nn.GroupNorm(1, 3), lambda: mint.nn.GroupNorm(1, 3)),
]


@pytest.mark.parametrize("makers", PAIRS, ids=lambda makers: makers[1].__code__.co_names[-1])
def test_both_families_are_the_same_kind(makers):
    pair = [make() for make in makers]
    own, other = map(kinds.kind_of, pair)
    assert (own.word, own.space, own.transposed, own.batch_norm) == (
        other.word,
        other.space,
        other.transposed,
        other.batch_norm,
    )
    assert all(kinds.weight_of(cell) is cell._params[kinds.kind_of(cell).weight] for cell in pair)
    assert all(kinds.computes_as_its_kind(cell) for cell in pair)
    if kinds.makes_width(pair[0]):
        assert [kinds.width_of(cell) for cell in pair] == [3, 3]


@pytest.mark.parametrize("un_prune", [None, [-1], ["a", "c"]])
def test_dense_layers_are_numbered_named_and_cut(un_prune):
    own, other = both()
    descs = []
    for net in (own, other):
        pruner = slimkit_ms.PruneMindSpore(net, X).set_alignment(4)
        descs.append(pruner.prune(0.6, *([] if un_prune is None else [un_prune])))
    assert descs[0]["variables"] == descs[1]["variables"]
    assert (other.b.out_features, other.b.in_features) == other.b.weight.shape == own.b.weight.shape
    np.testing.assert_allclose(other(X).asnumpy(), own(X).asnumpy(), atol=1e-6)  # float32, up to 32 products


@pytest.mark.parametrize("importance", ["activation", "taylor", "lamp"])
def test_importance_and_compensation(importance):
    kept = []
    for net in both():
        wanted = net(X).asnumpy()
        pruner = slimkit_ms.PruneMindSpore(net, X).set_alignment(4).set_compensation([X])
        pruner.set_importance_evaluation_function(importance, calibration=[X])
        kept.append(pruner.prune(0.7, [-1])["variables"])
        assert list(pruner.report()["compensation"]["refitted"]) == ["a", "b", "c"]
        assert np.abs(net(X).asnumpy() - wanted).max() < 0.3 * np.abs(wanted).max()
    assert kept[0] == kept[1]


def test_what_has_no_kernel_is_traced_and_cut():
    net, x = zoo_ms.randomise(Net()), zoo_ms.images(2, 3, 6, 6)
    graph = trace(net, (x, IDS))
    assert graph.layers == ["conv", "deep", "up", "fc", "head"]
    assert not [n for n in graph.nodes if n.op == "opaque"]
    before = sum(p.size for p in net.trainable_params())
    pruner = slimkit_ms.PruneMindSpore(net, (x, IDS)).set_alignment(2)
    pruner.prune(0.5, [-1])
    width = net.conv.out_channels
    assert sum(p.size for p in net.trainable_params()) < 0.65 * before
    assert width < 16
    assert (net.deep.groups, net.deep.in_channels, net.deep.out_channels) == (width, width, width)
    assert net.bn.num_features == len(net.bn.running_mean) == width
    assert (net.up.in_channels, net.up.out_channels) == net.up.weight.shape[:2]
    assert net.gn.num_channels == net.table.embedding_dim == net.up.out_channels
    assert net.norm.normalized_shape == (net.up.out_channels,)
    assert net.table.num_embeddings == 9
    shapes = [n.shape for n in (trace(net, (x, IDS)).values[o] for o in trace(net, (x, IDS)).outputs)]
    assert shapes == [(2, 5)]


def test_a_convolution_pads_like_torch():
    x = zoo_ms.images(2, 3, 9, 9)
    forms = {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": (0, 2)}, {"padding": "valid"}
    for form in forms:
        layer = zoo_ms.randomise(mint.nn.Conv2d(3, 4, 3, **form))
        pads = {"same": (2, 2), "valid": (0, 0)}.get(form["padding"], form["padding"])
        pads = (pads,) * 2 if isinstance(pads, int) else pads
        twin = nn.Conv2d(
            3,
            4,
            3,
            stride=form.get("stride", 1),
            dilation=form.get("dilation", 1),
            pad_mode="pad",
            padding=(pads[0], pads[0], pads[1], pads[1]),
        )
        twin.weight.set_data(layer.weight)
        made = input_rows(layer, x.asnumpy()) @ layer.weight.asnumpy().reshape(4, -1).T
        wanted = np.moveaxis(twin(x).asnumpy(), 1, -1).reshape(-1, 4)
        np.testing.assert_allclose(made, wanted, atol=1e-5)  # float32, 27 products


@pytest.mark.parametrize("method", ["magnitude", "wanda", "hessian"])
def test_sparsity_is_that_of_the_other_family(method):
    pair = both()
    for net in pair:
        slimkit_ms.Compressor(net, slimkit_ms.SparseConfig(method=method, sparse_ratio=0.5)).compress([X, X + 1])
    for own, other in zip(pair[0].get_parameters(), pair[1].get_parameters()):
        np.testing.assert_allclose(other.asnumpy(), own.asnumpy(), atol=1e-6)  # the same float32 inputs


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_zeros_stay_while_training(mode):
    net = both()[1]
    slimkit_ms.Compressor(net, slimkit_ms.SparseConfig(method="magnitude", sparse_ratio=0.5)).compress(None)
    operator, before = net.a.dense, net.a.weight.asnumpy().copy()
    zeros = slimkit_ms.freeze_zeros(net)
    ms.set_context(mode=mode)
    try:
        optimizer = nn.SGD(net.trainable_params(), 0.1)
        nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer)(X, ops.ones((4, 5)))
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert (net.a.weight.asnumpy()[before == 0] == 0).all()
    assert not np.array_equal(net.a.weight.asnumpy(), before)
    zeros.remove()
    assert net.a.dense is operator


@pytest.mark.parametrize(
    ("kind", "options"), [("lora", {"rank": 2}), ("adapter", {"bottleneck_size": 4}), ("low_rank_adapter", {})]
)
def test_deltas_go_on_dense_layers_and_off_again(kind, options):
    net = both()[1]
    wanted, weight = net(X).asnumpy(), net.a.weight
    names = {p.name for p in net.get_parameters()}
    slimkit_ms.apply_delta(net, kind, targets=["a", "b"], **options)
    np.testing.assert_allclose(net(X).asnumpy(), wanted, atol=1e-6)  # every kind starts as the base
    assert net.a.weight is weight
    assert names < {p.name for p in net.get_parameters()}
    slimkit_ms.freeze_delta(net, kind)
    assert all("mindpet_delta" in p.name for p in net.trainable_params())
    optimizer = nn.SGD(net.trainable_params(), 0.5)
    nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer)(X, ops.ones((4, 5)))
    assert np.abs(net(X).asnumpy() - wanted).max() > 1e-4
    slimkit_ms.remove_delta(net)
    assert type(net.a) is mint.nn.Linear
    np.testing.assert_array_equal(net(X).asnumpy(), wanted)


def test_lora_on_tables_and_convolutions_has_their_shapes():
    net, x = Net(), zoo_ms.images(2, 3, 6, 6)
    report = slimkit_ms.apply_delta(net, "lora", targets=["conv", "table", "fc"], rank=2)
    assert {n: layer["type"] for n, layer in report.layers.items()} == {
        "conv": "conv2d",
        "table": "embedding",
        "fc": "linear",
    }
    shapes = {p.name: p.shape for p in net.get_parameters() if "mindpet_delta" in p.name}
    assert shapes["conv.mindpet_delta_lora_a"] == (2, 3, 3, 3)
    assert shapes["conv.mindpet_delta_lora_b"] == (16, 2, 1, 1)
    assert shapes["table.mindpet_delta_lora_a"] == (2, 9)
    graph = trace(net, (x, IDS))  # compiled, though the CPU could not run it
    assert [graph.values[o].shape for o in graph.outputs] == [(2, 5)]
    used = {graph.values[i].path for node in graph.nodes for i in node.inputs if i is not None}
    assert set(shapes) <= used
    b = net.conv.mindpet_delta_lora_b
    b.set_data(ms.Tensor(np.ones(b.shape, np.float32)))
    before = net.conv.weight.asnumpy().copy()
    wanted = before + report.layers["conv"]["alpha"] / 2 * net.conv.mindpet_delta_lora_a.asnumpy().sum(0)
    slimkit_ms.merge_delta(net)
    np.testing.assert_allclose(net.conv.weight.asnumpy(), wanted, atol=1e-5)  # float32, a sum of two products
    slimkit_ms.remove_delta(net)
    assert (type(net.conv), type(net.table)) == (mint.nn.Conv2d, mint.nn.Embedding)


def test_statistics_are_no_weights_and_batch_norms_are_known():
    net = Net()
    assert slimkit_ms.freeze_modules(net, include=["bn"]).frozen == ("bn.weight", "bn.bias")
    assert not any(kinds.STATISTICS[2] in n for n in slimkit_ms.freeze_modules(net, exclude=["*"]).trained)
    slimkit_ms.ModelFreezer(net).freeze()
    assert net.bn.weight.requires_grad
    assert not net.conv.weight.requires_grad
    told = bridge.structure(net).targets
    assert {n: t.kind for n, t in told.items() if n.endswith("weight")} == {
        "conv.weight": "conv",
        "bn.weight": "norm",
        "deep.weight": "conv",
        "up.weight": "other",
        "gn.weight": "norm",
        "table.weight": "embedding",
        "norm.weight": "norm",
        "fc.weight": "linear",
        "head.weight": "linear",
    }


def test_a_checkpoint_goes_to_torch_and_back(tmp_path):
    torch = pytest.importorskip("torch")

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv1d(3, 4, 3), torch.nn.BatchNorm1d(4)
            self.norm, self.table, self.fc = torch.nn.LayerNorm(4), torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)

    class Own(nn.Cell):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = mint.nn.Conv1d(3, 4, 3), mint.nn.BatchNorm1d(4)
            self.norm, self.table, self.fc = mint.nn.LayerNorm(4), mint.nn.Embedding(9, 4), mint.nn.Linear(4, 2)

    twin, own = Twin(), Own()
    torch.save(twin.state_dict(), tmp_path / "a.pt")
    report = slimkit_ms.convert_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "b.ckpt"), twin, own)
    assert not report.missing
    assert not report.relaid
    slimkit_ms.load_param_into_net(own, slimkit_ms.load_checkpoint(str(tmp_path / "b.ckpt")))
    values = {p.name: p.asnumpy() for p in own.get_parameters()}
    for name, tensor in twin.state_dict().items():
        np.testing.assert_array_equal(values[name], tensor.numpy())
    slimkit_ms.convert_checkpoint(str(tmp_path / "b.ckpt"), str(tmp_path / "c.pt"), own, twin)
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    assert all(torch.equal(back[n], t) for n, t in twin.state_dict().items())


def test_export_proves_the_file(tmp_path):
    net = both()[1]
    assert max(slimkit_ms.export_onnx(net, X, str(tmp_path / "a.onnx")).differences.values()) < 1e-5
    assert max(slimkit_ms.export_mindir(net, X, str(tmp_path / "a.mindir")).differences.values()) < 1e-5
