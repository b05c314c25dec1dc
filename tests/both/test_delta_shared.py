"""What a file says of the base under a delta: which places hold one tensor, types that NumPy lacks, held parameters."""

import numpy as np
import pytest

from slimkit.core.errors import UnsupportedError
from tests.both.test_delta_apply import stir


def build(kit, tied, seed=0):
    net = kit.named(query=kit.linear(8, 8), first=kit.linear(8, 8), second=kit.linear(8, 8))
    kit.train_mode(kit.fill(net, seed), False)
    if tied:
        net.second.weight = net.first.weight
    return net


def weights(kit, net):
    return [kit.array(layer.weight) for layer in (net.first, net.second)]


def trained(kit, folder, tied, **options):
    """A folder with a LoRA and a trained `first.weight`, and the values of both places."""
    net = build(kit, tied)
    kit.slim.apply_delta(net, "lora", ["query"], rank=2, also_train=["first.weight"], **options)
    stir(kit, net, what="first.weight", seed=4)
    kit.slim.save_delta(net, folder)
    return weights(kit, net)


def same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_ties_are_those_of_the_file(kit, tmp_path, there, here):
    """A value of one place reaches the places that shared it where it was saved, and no other."""
    want = trained(kit, tmp_path / "d", there)
    net = build(kit, here)
    before = weights(kit, net)
    report = kit.slim.load_delta(net, tmp_path / "d")
    got = weights(kit, net)
    same(got, want if there else [want[0], before[1]])
    unties = here and not there
    assert any("a tensor of their own" in note for note in report.notes) == unties
    assert (net.first.weight is net.second.weight) == (here and there)
    kit.slim.save_delta(net, tmp_path / "again")
    once_more = build(kit, here)
    kit.slim.load_delta(once_more, tmp_path / "again")
    same(weights(kit, once_more), got)
    if not unties:
        kit.slim.remove_delta(net)
        same(weights(kit, net), before)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_values_are_kept(kit, tmp_path, rng, dtype):
    """Bit for bit in torch; MindSpore makes no float8 tensor on a CPU and holds the same numbers in a wider type."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from slimkit.core.delta import tensors

    net = build(kit, False)
    kit.slim.apply_delta(net, "lora", ["query"], rank=2)
    kit.slim.save_delta(net, tmp_path / "a", format="peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    kind = np.dtype(getattr(ml_dtypes, dtype))
    want = {k: rng.standard_normal(v.shape).astype(kind) for k, v in tensors.read(file, "file").items()}
    save_file(want, file, {"format": "pt"})
    fresh = build(kit, False)
    kit.slim.load_delta(fresh, tmp_path / "a")
    kit.slim.save_delta(fresh, tmp_path / "again", format="peft")
    got = tensors.read(tmp_path / "again" / "adapter_model.safetensors", "file")
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name].astype(np.float32), value.astype(np.float32))
    x = rng.standard_normal((3, 8)).astype(np.float32)
    a, b = (next(v for k, v in want.items() if half in k).astype(np.float32) for half in ("lora_A", "lora_B"))
    plain = kit.array(build(kit, False).query(kit.tensor(x)))
    np.testing.assert_allclose(kit.array(fresh.query(kit.tensor(x))), plain + 2 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)


HALVES = ("lora_A", "lora_B")
HELD = {
    "multi-head attention": [f"mha{below}.{half}" for below in ("", ".base_layer.out_proj") for half in HALVES],
    "experts": [f"mha{below}.{half}" for below in ("", ".base_layer") for half in HALVES],
}


@pytest.mark.parametrize("what", HELD)
def test_a_file_for_parameters_that_a_module_reads_itself_is_refused_in_one_line(kit, tmp_path, what):
    from safetensors.numpy import save_file

    net = kit.named(query=kit.linear(8, 8), mha=kit.named(out_proj=kit.linear(8, 8)))
    kit.train_mode(kit.fill(net, 0), False)
    kit.slim.apply_delta(net, "lora", ["query"], rank=2)
    kit.slim.save_delta(net, tmp_path / "d", format="peft")
    kit.slim.remove_delta(net)
    before = {n: kit.array(p) for n, p in kit.params(net).items()}
    values = {f"base_model.model.{name}.weight": np.ones((2, 8) if name.endswith("A") else (8, 2), np.float32)
              for name in HELD[what]}  # fmt: skip
    save_file(values, tmp_path / "d" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="LoRA on parameters that mha reads itself") as error:
        kit.slim.load_delta(net, tmp_path / "d")
    assert "\n" not in str(error.value)
    after = {n: kit.array(p) for n, p in kit.params(net).items()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[n], after[n]) for n in before)
