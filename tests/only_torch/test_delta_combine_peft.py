"""Combined LoRAs against what PEFT's add_weighted_adapter makes of the same files."""

import numpy as np
import pytest

import slimkit
from slimkit.core.delta import merges

import torch

peft = pytest.importorskip("peft")

NAMES = {"p": 0.7, "q": -0.4, "r": 1.1}


def base():
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    for name, layer in {
        "table": torch.nn.Embedding(11, 12),
        "query": torch.nn.Linear(12, 10),
        "conv": torch.nn.Conv2d(1, 5, (3, 2)),
    }.items():
        net.add_module(name, layer)
    return net


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for seed, name in enumerate(NAMES):
        config = peft.LoraConfig(r=4, lora_alpha=4 + 3 * seed, target_modules=["table", "query", "conv"])
        model = peft.get_peft_model(base(), config)
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter)
        found[name] = tmp_path_factory.mktemp("peft") / name
        model.save_pretrained(found[name])
    return found


def kept(shape):
    """Where entries stay: the same for a matrix and its transpose, and for a kernel that lies flat."""
    flat = int(np.prod(shape[1:]))
    return ((np.arange(shape[0])[:, None] + np.arange(flat)) % 3 != 1).reshape(shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", merges.METHODS)
def test_every_method_computes_what_pefts_does(folders, method, monkeypatch):
    density = None if method in ("cat", "linear", "svd") else 0.6
    first, *others = folders
    theirs = peft.PeftModel.from_pretrained(base(), folders[first], adapter_name=first)
    for name in others:
        theirs.load_adapter(folders[name], adapter_name=name)
    ours = base()
    for name, folder in folders.items():
        slimkit.load_delta(ours, folder, name=name)
    # Both thin alike; what is drawn is not what is compared.
    monkeypatch.setattr(merges, "drawn", lambda t, d, rng: t * kept(t.shape) / t.dtype.type(d))
    monkeypatch.setattr(torch, "bernoulli", lambda t: torch.from_numpy(kept(t.shape)).to(t.dtype))
    options = {"density": density, "majority_sign_method": "frequency"} if density else {}
    theirs.add_weighted_adapter(list(NAMES), list(NAMES.values()), "all", combination_type=method, **options)
    slimkit.combine_delta(
        ours, NAMES, "all", method=method, density=density, majority="frequency" if density else "total"
    )
    for path, layer in ours.named_children():
        peer = theirs.base_model.model.get_submodule(path)
        wanted = peer.get_delta_weight("all").detach()
        slimkit.set_delta(ours, "all")
        got = layer.merged_weight() - layer.weight.detach()
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)  # float32 through a decomposition
