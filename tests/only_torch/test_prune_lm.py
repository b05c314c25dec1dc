"""Language models: importance by what is lost, repair block after block, and what is said without data."""

from __future__ import annotations

import copy
import json
import logging
from itertools import pairwise

import pytest

from slimkit import PruneTorch, chain, compensate
from slimkit.core.errors import ArgumentError
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import RefitMoments
from slimkit.replay import running
from slimkit.signals import layer_signals

import torch

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)  # so that blocks say something beside the stream
    return model


@pytest.fixture(scope="module")
def batches():
    chance = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 120, (8, 16), generator=chance)} for _ in range(4)]


def divergence(dense, small, ids):
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (dense, small))
    return float((p.exp() * (p - q)).sum(-1).mean())


def pruner(model, batches):
    return PruneTorch(model, {"input_ids": batches[0]["input_ids"][:1]}).set_alignment(8)


def cut(dense, batches, *settings, ratio=0.8):
    small = copy.deepcopy(dense)
    made = pruner(small, batches)
    for setting, *values in settings:
        getattr(made, setting)(*values[:1], **(values[1] if len(values) > 1 else {}))
    return small, made.prune(ratio, []), made


AUTO = ("set_importance_evaluation_function", "auto")


def test_with_calibration_the_default_is_output_measured_and_repaired(llama, batches):
    ids = torch.randint(0, 120, (16, 16), generator=torch.Generator().manual_seed(2))
    small, desc, made = cut(llama, batches, (*AUTO, {"calibration": batches}))
    assert desc["made"]["importance"] == "output"
    assert desc["made"]["allocation"] == "measured"
    assert made.report()["compensation"]["refitted"]
    assert small.config.hidden_size == 32
    unrepaired, _, _ = cut(llama, batches, (*AUTO, {"calibration": batches}), ("set_compensation", None))
    plain, _, _ = cut(llama, batches, ("set_importance_evaluation_function", "l1"))
    losses = [divergence(llama, m, ids) for m in (small, unrepaired, plain)]
    assert losses[0] < losses[1] < losses[2]


def test_without_calibration_a_language_model_is_warned_of_and_another_is_not(llama, batches, caplog):
    with caplog.at_level(logging.WARNING, "slimkit"):
        pruner(llama, batches).analysis(0.8, [])
    assert "without calibration data" in caplog.text
    caplog.clear()
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    with caplog.at_level(logging.WARNING, "slimkit"):
        PruneTorch(net, torch.ones(1, 8)).analysis(0.6)
    assert "calibration" not in caplog.text


def test_measured_needs_losses(llama, batches):
    with pytest.raises(ArgumentError, match='"measured" needs the importance "output"'):
        pruner(llama, batches).set_importance_evaluation_function("l1").set_allocation("measured").analysis(0.8)


def test_a_harder_cut_drops_what_a_milder_one_drops(llama, batches):
    made = pruner(llama, batches).set_importance_evaluation_function("auto", calibration=batches)
    kept = []
    for ratio in (0.9, 0.8, 0.7):
        _, desc = made.analysis(ratio, [])
        kept.append({n: set(v["keep"]) for n, v in desc["variables"].items()})
    for mild, hard in pairwise(kept):
        for name in mild:
            small, large = sorted((mild[name], hard.get(name, mild[name])), key=len)
            assert small <= large


def test_signals_are_those_of_a_plain_computation(llama, batches):
    found = llama_signals(llama, batches[:1])
    inputs, layer = [], llama.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    try:
        with torch.no_grad():
            llama(**batches[0])
    finally:
        hook.remove()
    rows = inputs[0].reshape(-1, 96).double()
    # float32 activations
    torch.testing.assert_close(torch.from_numpy(found.gram), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


def llama_signals(model, batches):
    path = "model.layers.1.mlp.down_proj"
    grads = [p.requires_grad for p in model.parameters()]
    found = layer_signals(model, batches, [path], None, 0)[path]
    assert grads == [p.requires_grad for p in model.parameters()]
    return found


def test_slopes_foretell_how_far_answers_move(llama, batches):
    """A small error on a layer's outputs: the divergence is half of the squares, each weighed by its slope."""
    slope = torch.from_numpy(llama_signals(llama, batches).slope)
    moved = copy.deepcopy(llama)
    noise = 1e-2 * torch.randn((4, 8, 16, 32), generator=torch.Generator().manual_seed(3))
    calls = iter(noise)
    moved.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, out: out + next(calls))
    found = sum(divergence(llama, moved, b["input_ids"]) for b in batches) / len(batches)
    foretold = 0.5 * float((noise.square().mean((0, 1, 2)).double() * slope).sum())
    # 512 rows of chance: signs on one side, noise on the other
    assert found == pytest.approx(foretold, rel=0.15)


def test_padding_counts_for_nothing(llama, batches):
    ids = batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    longer = {
        "input_ids": torch.cat([ids, torch.full((8, 5), 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros((8, 5), dtype=mask.dtype)], 1),
    }
    plain = llama_signals(llama, [{"input_ids": ids, "attention_mask": mask}])
    padded = llama_signals(llama, [longer])
    assert padded.rows == plain.rows == ids.numel()
    torch.testing.assert_close(torch.from_numpy(padded.gram), torch.from_numpy(plain.gram), rtol=1e-4, atol=1e-5)


def text_model(kind):
    torch.manual_seed(0)
    common = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(**common, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    elif kind == "opt":
        config = transformers.OPTConfig(
            **common, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
            max_position_embeddings=32,
        )  # fmt: skip
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(**common, **sizes, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def text_batch(form, junk):
    """Two rows, the second one padded with tokens that must count for nothing."""
    text = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(text)
    mask[1, 7:] = 0
    ids = torch.where(mask.bool(), text, junk)
    other = mask.flip(0)  # the decoder's padding stands elsewhere
    if form == "labels":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(other.bool(), text, -100)}
    if form.startswith("decoder"):
        length = 12 if form.endswith("long") else 9
        second = torch.where(other.bool(), text.flip(1), junk)[:, :length]
        found = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": second}
        return {**found, "decoder_attention_mask": other[:, :length]}
    names = {"by name": {"input_ids": ids, "attention_mask": mask}, "second": (ids, mask), "third": (ids, None, mask)}
    return names[form]


PADDED = {
    "opt": ["by name", "second"], "gpt2": ["by name", "third"],
    "t5": ["decoder, as long", "decoder, shorter", "labels"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k, forms in PADDED.items() for f in forms])
def test_padding_counts_nowhere_however_masks_are_given(kind, form):
    model = text_model(kind)
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    layers = [n for n, m in model.named_modules() if isinstance(m, linear)]
    one, other = (layer_signals(model, [text_batch(form, junk)], layers, None, 0) for junk in (40, 50))
    assert one.keys() == other.keys() == set(layers)
    for path, signal in one.items():
        assert signal.rows == (16 if form.endswith("shorter") and is_decoders(path) else 19)
        if form != "labels":  # there the decoder's own attention reads what has no label
            for name in ("gram", "slope"):  # sums of float32
                found = getattr(other[path], name)
                assert found == pytest.approx(getattr(signal, name), rel=1e-3, abs=1e-5 * found.max()), path


def is_decoders(path):
    return not path.startswith("encoder") and not path.endswith(("EncDecAttention.k", "EncDecAttention.v"))


@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("importance", ["auto", "l2"])
def test_numbers_that_are_none_are_refused_and_the_model_stays(llama, batches, importance, damping):
    embedded = llama.get_input_embeddings()(batches[0]["input_ids"]).detach()
    embedded[0, 3] = float("nan")
    data = [{"inputs_embeds": embedded}]
    small = copy.deepcopy(llama)
    made = pruner(small, batches).set_compensation(data, damping)
    made.set_importance_evaluation_function(importance, calibration=data if importance == "auto" else None)
    with pytest.raises(ArgumentError, match="infinity or NaN"):
        made.prune(0.8, [])
    for (name, one), other in zip(small.named_parameters(), llama.parameters()):
        assert torch.equal(one, other), name


def test_a_replay_says_that_a_repair_is_not_in_the_plan(llama, batches, caplog):
    for settings, said in [([(*AUTO, {"calibration": batches})], True), ([("set_form", "any")], False)]:
        small, desc, made = cut(llama, batches, *settings)
        caplog.clear()
        for plan in (desc, json.loads(json.dumps(made.whole_desc()))):
            fresh = pruner(copy.deepcopy(llama), batches).prune_by_desc(plan)
            assert all(a.shape == b.shape for a, b in zip(fresh.parameters(), small.parameters()))
        assert caplog.text.count("the replayed cut is not repaired") == 2 * said
        pruner(copy.deepcopy(llama), batches).prune_by_desc(desc, weights_follow=True)
        assert caplog.text.count("the replayed cut is not repaired") == 2 * said


def test_whether_a_layer_joins_the_stream_is_found_for_each_layer(llama, batches):
    pair = compensate.ChainPair(llama, llama, ["model.layers.0", "model.layers.1"], batches)
    names = ["mlp.down_proj", "self_attn.o_proj", "mlp.up_proj"]
    assert [pair.joins(0, f"model.layers.0.{name}") for name in names] == [True, False, False]
    assert [pair.joins(0, f"model.layers.0.{name}") for name in reversed(names)] == [False, False, True]


def test_blocks_that_work_in_place_are_run_again_on_the_same():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x):
            return x.add_(self.down(torch.relu(self.up(x))))

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), *(Block() for _ in range(3)))
    blocks, data = ["1", "2", "3"], [torch.randn(5, 6, 4)]
    walk = chain.BlockChain(model, blocks)
    hidden = walk.run(data[0], 0, None)
    before = hidden.clone()
    for number in (1, 1):
        walk.run(data[0], number, hidden)
        assert torch.equal(hidden, before)


def pair(llama, batches):
    small, desc, _ = cut(llama, batches, ("set_importance_evaluation_function", "l2"))
    return small, PrunePlan(desc)


BEHIND = [f"model.layers.{k}.{name}" for k in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]


def test_block_by_block_the_repair_is_that_of_whole_models(llama, batches, monkeypatch):
    monkeypatch.setattr(compensate.ChainPair, "joins", lambda *_: False)
    monkeypatch.setattr(compensate.ChainPair, "norms", lambda *_: [])
    whole, plan = pair(llama, batches)
    walked = copy.deepcopy(whole)
    report = compensate.compensate(llama, walked, plan, BEHIND, batches, 0.01)
    monkeypatch.setattr(compensate, "find_blocks", lambda *_: [])
    assert compensate.compensate(llama, whole, plan, BEHIND, batches, 0.01) == report
    for (name, one), other in zip(walked.named_parameters(), whole.parameters()):
        # float32 activations, refitted layers fed to refitted layers
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_the_last_layer_of_a_block_makes_up_for_the_stream(llama, batches, monkeypatch):
    def stream(model):
        with torch.no_grad():
            return torch.cat([model.model(**batch).last_hidden_state for batch in batches])

    small, plan = pair(llama, batches)
    plain = copy.deepcopy(small)
    compensate.compensate(llama, small, plan, BEHIND, batches, 1e-4)
    monkeypatch.setattr(compensate.ChainPair, "joins", lambda *_: False)
    monkeypatch.setattr(compensate.ChainPair, "norms", lambda *_: [])
    compensate.compensate(llama, plain, plan, BEHIND, batches, 1e-4)
    made_up, left = ((stream(m) - stream(llama)).square().mean() for m in (small, plain))
    assert made_up < 0.95 * left


def test_a_walk_costs_less_than_three_forwards_a_layer_and_leaves_ties_alone(llama, batches):
    small, plan = pair(llama, batches)
    table = small.model.embed_tokens.weight.clone()
    calls = [0]

    def count(*_):
        calls[0] += 1

    for model in (llama, small):
        for block in model.model.layers:
            block.self_attn.q_proj.register_forward_pre_hook(count)
    layers = [n for n, m in small.named_modules() if isinstance(m, torch.nn.Linear)]
    report = compensate.compensate(llama, small, plan, layers, batches, None)
    forwards = calls[0] / 2 / len(batches)  # of all blocks, for each batch
    assert forwards < 3 * len(report["refitted"])
    assert "lm_head" in report["left"]
    assert torch.equal(small.model.embed_tokens.weight, table)
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_a_block_is_made_ready_once_for_all_batches(llama, batches, monkeypatch):
    entered = [0]
    ready = chain.replaying

    def counted(*args):
        entered[0] += 1
        return ready(*args)

    monkeypatch.setattr(chain, "replaying", counted)
    found = []
    for data in (batches[:2], batches):
        small, plan = pair(llama, batches)
        entered[0] = 0
        compensate.compensate(llama, small, plan, BEHIND, data, None)
        found.append(entered[0])
    assert found[0] == found[1] > 0


def test_an_error_in_the_midst_of_a_repair_leaves_the_blocks_running(llama, batches, monkeypatch):
    small, plan = pair(llama, batches)

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(RefitMoments, "add", broken)
    small.train()
    with pytest.raises(MemoryError):
        compensate.compensate(llama, small, plan, BEHIND, batches, None)
    assert all("forward" not in vars(m) and m.training for m in small.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("held", ["inside", "outside too"])
def test_modules_that_do_not_run_are_not_looked_at_unless_others_hold_them(held):
    shared = torch.nn.BatchNorm1d(4)
    idle = torch.nn.Sequential(torch.nn.Linear(4, 4), shared)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), idle, *([shared] if held == "outside too" else []))
    found = running(model, [idle])
    assert found.count(shared) == (held == "outside too")
    assert idle not in found and model[0] in found  # noqa: PT018


def test_blocks_that_read_one_another_are_no_chain(batches):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x, seen):
            seen.append(self.fc(x))
            return sum(seen)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            seen = []
            for block in self.blocks:
                x = block(x, seen)
            return x

    assert chain.find_blocks(Net().eval(), torch.randn(2, 8)) == []
    plain = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))).eval()
    assert chain.find_blocks(plain, torch.randn(2, 8)) == ["0", "1", "2"]


def test_layers_that_are_no_plain_products_have_no_signal_and_stop_nothing():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return x @ self.weight.T

    model = torch.nn.Sequential(Own())
    batches = [torch.ones(2, 3)]
    assert layer_signals(model, batches, ["0"], None, 0) == {}
    assert layer_signals(model, batches, ["0"], lambda out, batch: out.sum(), 0) == {}
    assert model[0].weight.requires_grad
