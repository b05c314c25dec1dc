"""What sparsity leaves alone and says so: adapters, other layers, offloaded weights; and models with caches."""

from __future__ import annotations

import copy

import pytest

from slimkit import Compressor, PruneTorch, SparseConfig, freeze_zeros
from slimkit.core.errors import ArgumentError, PatternError, UnsupportedError

import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(n=3):
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 64, (2, 16), generator=draw)} for _ in range(n)]


def encoder_decoder(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    if kind == "mt5":
        return transformers.MT5ForConditionalGeneration(transformers.MT5Config(**sizes)).eval()
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
    )
    return transformers.BartForConditionalGeneration(config).eval()


def pairs(**extra):
    draw = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(3, 64, (2, 12), generator=draw),
            "decoder_input_ids": torch.randint(3, 64, (2, 10), generator=draw),
            **extra,
        }
        for _ in range(3)
    ]


def cached():
    """Batches that bring a cache of their own, filled by a prompt of three tokens."""
    model = llama()
    found = []
    for batch in tokens():
        with torch.no_grad():
            cache = model(batch["input_ids"][:, :3], use_cache=True).past_key_values
        found.append({"input_ids": batch["input_ids"][:, 3:], "past_key_values": cache})
    return found


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart"])
@pytest.mark.parametrize("method", ["wanda", "par"])
def test_an_encoder_decoder_does_not_meet_its_own_cache(kind, method):
    """As configured, as asked for by the batch, and switched off: one result, and cross attention sees every row."""
    found = {}
    for how, extra in (("default", {}), ("asked", {"use_cache": True}), ("off", {"use_cache": False})):
        model = encoder_decoder(kind)
        report = Compressor(model, SparseConfig(method=method)).compress(pairs(**extra))
        assert report["fallbacks"] == {}
        found[how] = dict(model.named_parameters()), {n: row["rows"] for n, row in report["layers"].items()}
        assert model.config.use_cache
    for how in ("default", "asked"):
        assert found[how][1] == found["off"][1]
        for name, value in found["off"][0].items():
            assert torch.equal(found[how][0][name], value)
    crossing = [n for n in found["off"][1] if ("EncDec" in n or "encoder_attn" in n) and n.endswith((".k", "k_proj"))]
    assert [found["default"][1][n] for n in crossing] == [3 * 2 * 12] * 2


def test_a_cache_that_a_batch_brings_stays_as_it_came():
    data = cached()
    before = copy.deepcopy(data)
    model, whole = llama(), llama()
    report = Compressor(model, SparseConfig(method="par")).compress(data)
    assert report["fallbacks"] == {}
    for batch, old in zip(data, before):
        assert batch["past_key_values"].get_seq_length() == old["past_key_values"].get_seq_length() == 3
    # The last block alone sees what the whole model shows it: its inputs' rows and sums.
    config = SparseConfig(method="wanda", sequential=False, targets=["*.1.mlp.down_proj"])
    Compressor(whole, config).compress(data)
    other = llama()
    by_hand = []
    layer = other.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _m, args: by_hand.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in copy.deepcopy(before):
            other(**batch)
    scores = layer.weight.detach().abs() * torch.cat(by_hand).square().mean(0).sqrt()
    kept = whole.model.layers[1].mlp.down_proj.weight != 0
    dropped_most = scores.masked_fill(kept, -1).max(1).values
    kept_least = scores.masked_fill(~kept, float("inf")).min(1).values
    assert bool((dropped_most <= kept_least * (1 + 1e-5)).all())  # float32 sums in another order


def test_what_a_block_learns_past_its_call_counts():
    """A model may tell its blocks something by an attribute, or by an argument: both give the same weights."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(8, 8), None

        def forward(self, x, scale=None):
            return x + self.fc(x) * (self.scale if scale is None else scale)

    class Net(nn.Module):
        def __init__(self, by_call):
            super().__init__()
            self.blocks, self.by_call = nn.ModuleList([Block(), Block()]), by_call

        def forward(self, x):
            for block in self.blocks:
                if self.by_call:
                    x = block(x, x.shape[0] / 8)
                else:
                    block.scale = x.shape[0] / 8
                    x = block(x)
            return x

    found = []
    for by_call in (False, True):
        torch.manual_seed(0)
        model, draw = Net(by_call), torch.Generator().manual_seed(3)
        data = [torch.randn(n, 8, generator=draw) for n in (16, 64)]
        report = Compressor(model, SparseConfig(method="par")).compress(data)
        assert report["fallbacks"] == {}
        assert [b.scale for b in model.blocks] == [None, None]
        found.append(dict(model.named_parameters()))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-6, rtol=1e-5)  # block by block, or whole: float32


@pytest.mark.parametrize("method", ["magnitude", "wanda", "par"])
def test_adapters_of_peft_stay_whole(method):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    report = Compressor(model, SparseConfig(method=method)).compress(tokens())
    left = {n for n in report["skipped"] if "lora_" in n}
    assert len(left) == 8
    assert all("adapter" in report["skipped"][n] for n in left)
    assert report["fallbacks"] == {}
    for name, value in model.named_parameters():
        if "lora_A" in name:
            assert bool((value != 0).all())
        if name.endswith("base_layer.weight") or "modules_to_save" in name:
            assert abs(float((value == 0).float().mean()) - 0.5) < 0.01  # a share of few weights
    # lora_B begins as zeros, which are no zeros to keep.
    with freeze_zeros(model) as frozen:
        assert not any("lora_" in name for name in frozen.masks)
    assert {n.rpartition(".")[2] for n in report["layers"] if "q_proj" in n} == {"base_layer"}


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.ct = nn.Conv1d(4, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.lstm, self.gru, self.fc, self.bi = nn.LSTM(8, 8), nn.GRU(8, 8), nn.Linear(8, 8), nn.Bilinear(8, 8, 8)
        self.w, self.pos = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.table = nn.LayerNorm((5, 8)), nn.Embedding(9, 8)

    def forward(self, x):
        y = self.gru(self.lstm(self.ct(self.c1(x)).transpose(1, 2))[0])[0]
        y = F.relu(self.fc(y)) @ self.w + self.pos
        return self.norm(self.bi(y, y)) + self.table.weight[0]


def test_every_other_matrix_is_named():
    model = Many()
    report = Compressor(model, SparseConfig(method="wanda")).compress([torch.randn(4, 4, 5) for _ in range(2)])
    assert set(report["skipped"]) == {"c1", "ct", "lstm", "gru", "bi", "w"}
    assert "ConvTranspose1d" in report["skipped"]["ct"]
    assert list(report["layers"]) == ["fc"]
    with pytest.raises(ArgumentError, match=r"'lstm' \(LSTM is"):
        Compressor(Many(), SparseConfig(targets=["lstm"])).compress()


def test_offloaded_weights_are_said_to_be_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="accelerate offloads"):
        Compressor(model, SparseConfig()).compress()


def test_where_nothing_can_be_sparse_the_reasons_are_said():
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 3))
    with pytest.raises(PatternError, match=r"'0' was left alone: Conv1d is not among.*'1' was left alone"):
        Compressor(net, SparseConfig()).compress()
    with pytest.raises(PatternError, match="the model has no Linear"):
        Compressor(nn.Sequential(nn.ReLU()), SparseConfig()).compress()


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, once=False):
        self.rows = [torch.randn(16, generator=torch.Generator().manual_seed(i)) for i in range(32)]
        self.left = iter(self.rows) if once else None

    def __iter__(self):
        return iter(self.rows) if self.left is None else self.left


def test_a_loader_over_an_iterable_data_set_is_data_like_any():
    found = []
    for data in (torch.utils.data.DataLoader(Stream(), batch_size=8), list(torch.stack(Stream().rows).split(8))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        Compressor(model, SparseConfig(method="par")).compress(data)
        found.append(dict(model.named_parameters()))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


def test_data_that_runs_dry_is_refused_and_the_model_left():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    before = copy.deepcopy(model.state_dict())
    loader = torch.utils.data.DataLoader(Stream(once=True), batch_size=8)
    with pytest.raises(ArgumentError, match="same batches each time"):
        Compressor(model, SparseConfig(method="hessian")).compress(loader)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


def test_compensation_fits_outputs_and_not_what_an_activation_made_of_them():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(in_place), nn.Conv2d(16, 16, 3), nn.ReLU(in_place), nn.Conv2d(16, 4, 3)
        )
        data = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        PruneTorch(net, data[0]).set_alignment(4).set_compensation(data).prune(0.5)
        found.append(dict(net.named_parameters()))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)
