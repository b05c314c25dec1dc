"""What travels beside a delta in PEFT's files: tied tables, grown vocabularies, biases, heads; nothing is ignored."""

import numpy as np
import pytest

import slimkit
from slimkit.core.errors import FileFormatError, UnsupportedError

import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(3, 15).reshape(2, 6)


def llama(tied=True, vocabulary=64, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def stir(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32, same formulas


def there_and_back(theirs, build, tmp_path, ids=IDS):
    """PEFT's file here, ours there, and a bundle onto another fresh base: the same outputs everywhere."""
    stir(theirs).eval().save_pretrained(tmp_path / "theirs")
    want = logits(peft.PeftModel.from_pretrained(build(), tmp_path / "theirs").eval(), ids)
    ours = build()
    report = slimkit.load_delta(ours, tmp_path / "theirs")
    close(logits(ours, ids), want)
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    close(logits(peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval(), ids), want)
    slimkit.save_delta(ours, tmp_path / "bundle")
    again = build()
    slimkit.load_delta(again, tmp_path / "bundle")
    assert torch.equal(logits(again, ids), logits(ours, ids))
    return ours, report


BOTH = ["embed_tokens", "lm_head"]
SAVED = [(m, t) for m in (["embed_tokens"], ["lm_head"], BOTH) for t in ((True, False), (True, True), (False, False))]


@pytest.mark.parametrize(("modules", "how"), SAVED)
def test_saved_modules_of_a_tied_model(modules, how, tmp_path):
    tied, tying = how
    options = {"modules_to_save": modules, **({"ensure_weight_tying": True} if tying else {})}
    theirs = peft.get_peft_model(llama(tied), peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    ours, report = there_and_back(theirs, lambda: llama(tied), tmp_path)
    table, head = ours.model.embed_tokens.weight, ours.lm_head.weight
    assert (table is head) == (tied and tying)
    assert any("own" in note for note in report.notes) == (tied and not tying)


def test_a_table_trained_here_reaches_peft_tied_and_untied(tmp_path):
    for tied in (True, False):
        ours = llama(tied)
        slimkit.apply_delta(ours, "lora", ["*q_proj"], rank=2, also_train=["*embed_tokens*"])
        stir(ours)
        slimkit.save_delta(ours, tmp_path / str(tied), format="peft")
        close(logits(peft.PeftModel.from_pretrained(llama(tied), tmp_path / str(tied)).eval()), logits(ours))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], [*BOTH, "q_proj"]])
def test_a_grown_vocabulary_travels(tied, targets, tmp_path):
    def grown(seed):
        model = llama(tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    ids = torch.arange(60, 70).reshape(2, 5)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(grown(5), config).eval()
    want = logits(theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    for number in (1, 2):  # in another process the new rows start at random
        ours = grown(99)
        report = slimkit.load_delta(ours, tmp_path / "theirs")
        reached = logits(peft.PeftModel.from_pretrained(grown(99), tmp_path / "theirs").eval(), ids)
        close(logits(ours, ids), reached)
        if tied or targets[:2] == BOTH:
            close(reached, want)
        assert any("came with the file" in note for note in report.notes)
        slimkit.save_delta(ours, tmp_path / f"ours{number}", format="peft" if number == 1 else "slimkit")
        again = grown(7)
        slimkit.load_delta(again, tmp_path / f"ours{number}")
        if tied or targets[:2] == BOTH:
            close(logits(again, ids), want)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_travel(bias, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias=bias))
    ours, _ = there_and_back(theirs, llama, tmp_path)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert len(trained) == (4 if bias == "lora_only" else 8)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


ALSO = [
    None, ["*query.bias"], ["*dense.bias"], ["*query.weight"], ["*.bias"], ["classifier*"], ["*LayerNorm*"],
    ["*word_embeddings*"], ["classifier*", "*query.bias", "*LayerNorm.weight"],
]  # fmt: skip
OPTIONS = [
    {"rank": 2}, {"rank": 2, "dora": True}, {"rank": 2, "rslora": True, "dropout": 0.1}, {"rank": 2, "init": "pissa"},
    {"rank": 2, "init": "gaussian", "ranks": {"*value": 3}, "alphas": {"*query": 5}},
    {"rank": 2, "dora": True, "rslora": True}, {"rank": 2, "init": "pissa", "rslora": True},
]  # fmt: skip
TARGETS = [["*query", "*value"], ["*.dense", "classifier"], "all-linear"]


@pytest.mark.parametrize("also", ALSO)
def test_every_combination_of_ours_opens_in_peft(also, tmp_path):
    number = 0
    for options in OPTIONS:
        for targets in TARGETS:
            if "ranks" in options and targets != TARGETS[0]:
                continue
            number += 1
            ours = bert()
            slimkit.apply_delta(ours, "lora", targets, also_train=also, **options)
            stir(ours)
            slimkit.save_delta(ours, tmp_path / str(number), format="peft")
            theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / str(number)).eval()
            torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=5e-5)  # PiSSA sums other products


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change({k: v.clone() for k, v in load_file(file).items()}), file)


HEAD = {"modules_to_save": ["lm_head"]}
LACKING = [
    ({"target_modules": ["q_proj"]}, "layers.1", r"layers\.1\.self_attn\.q_proj"),
    ({"target_modules": ["q_proj", "v_proj"]}, "v_proj", "v_proj"),
    ({"target_modules": r".*\.(q|k)_proj"}, "k_proj", "k_proj"),
    ({"target_modules": "all-linear"}, "layers.0.mlp.down_proj", "down_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], **HEAD}, "lm_head", "lm_head"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"], **HEAD}, "lm_head", "lm_head"),
]


@pytest.mark.parametrize(("options", "gone", "words"), LACKING)
def test_a_file_that_lacks_a_layer_or_a_head_is_refused(options, gone, words, tmp_path):
    theirs = peft.get_peft_model(llama(False), peft.LoraConfig(r=2, **options))
    theirs.save_pretrained(tmp_path / "d")
    slimkit.load_delta(llama(False), tmp_path / "d")
    rewrite(tmp_path / "d", lambda t: {k: v for k, v in t.items() if gone not in k})
    ours = llama(False)
    before = {n: p.clone() for n, p in ours.named_parameters()}
    with pytest.raises(FileFormatError, match=words):
        slimkit.load_delta(ours, tmp_path / "d")
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())


def test_a_tensor_of_no_place_is_named(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "d")
    rewrite(tmp_path / "d", lambda t: {**t, "base_model.model.model.layers.0.ghost.base_layer.weight": torch.ones(2)})
    with pytest.raises(FileFormatError, match="ghost"):
        slimkit.load_delta(llama(), tmp_path / "d")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_dtype_of_a_file_survives(kind, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    slimkit.apply_delta(net, "lora", ["0"], rank=2)
    stir(net)
    folder = slimkit.save_delta(net, tmp_path / "a", format="peft")
    rewrite(folder, lambda t: {k: v.to(kind) for k, v in t.items()})
    raw = (folder / "adapter_model.safetensors").read_bytes()
    for form in ("peft", "slimkit"):
        fresh = torch.nn.Sequential(torch.nn.Linear(8, 8))
        slimkit.load_delta(fresh, folder)
        assert {p.dtype for n, p in fresh.named_parameters() if "delta" in n} == {kind}
        folder = slimkit.save_delta(fresh, tmp_path / form, format=form)
        if form == "peft":
            assert (folder / "adapter_model.safetensors").read_bytes()[-32:] == raw[-32:]  # the values stand last
    last = torch.nn.Sequential(torch.nn.Linear(8, 8))
    slimkit.load_delta(last, folder)
    # It is computed in the wider type: nothing but the values' own rounding is lost.
    wide = torch.nn.Sequential(torch.nn.Linear(8, 8))
    wide[0].load_state_dict({n: p.float() for n, p in last[0].state_dict().items() if "delta" not in n})
    slimkit.apply_delta(wide, "lora", ["0"], rank=2)
    for name, parameter in wide.named_parameters():
        parameter.data = last.get_parameter(name).data.float()
    x = torch.randn(3, 8)
    torch.testing.assert_close(last(x), wide(x), rtol=1e-5, atol=1e-5)
    for one, other in zip(last.parameters(), fresh.parameters()):
        if one.dtype == kind:
            assert np.array_equal(one.detach().float().numpy(), other.detach().float().numpy())


@pytest.mark.parametrize("tied", [True, False])
def test_trained_token_rows_are_the_adapters_own(tied, tmp_path):
    base, want = logits(llama(tied)), []
    for number, tokens in enumerate(([3, 5], [4, 7])):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
        theirs = peft.get_peft_model(llama(tied), config).eval()
        torch.manual_seed(number)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        theirs.save_pretrained(tmp_path / str(number))
        want.append(logits(theirs))
    net = llama(tied)
    for number in (0, 1):
        slimkit.load_delta(net, tmp_path / str(number), name=f"n{number}")
    for number in (1, 0, 1):
        slimkit.set_delta(net, f"n{number}")
        assert torch.allclose(logits(net), want[number], atol=1e-5)
    with slimkit.disable_delta(net):
        assert torch.equal(logits(net), base)
    again = llama(tied)
    slimkit.load_delta(again, slimkit.save_delta(net, tmp_path / "bundle", names="n0"), name="other")
    assert torch.allclose(logits(again), want[0], atol=1e-5)
    with slimkit.disable_delta(again):
        assert torch.equal(logits(again), base)
    slimkit.save_delta(net, tmp_path / "peft", names="n0", format="peft")
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(llama(tied), tmp_path / "peft")), want[0], atol=1e-5)
    for left in (net, again):
        slimkit.remove_delta(left)
        assert torch.equal(logits(left), base)


@pytest.mark.parametrize("format", ["slimkit", "peft"])
@pytest.mark.parametrize("where", ["heads", "experts"])
def test_what_reads_its_weights_itself_is_saved_while_merged(where, format, tmp_path):
    def build():
        torch.manual_seed(0)
        if where == "heads":
            return torch.nn.ModuleDict({"at": torch.nn.MultiheadAttention(8, 2)})
        config = transformers.MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=64, num_local_experts=3,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config).eval()

    def run(model):
        with torch.no_grad():
            x = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(2))
            return model["at"](x, x, x)[0] if where == "heads" else logits(model)

    model = build()
    slimkit.apply_delta(model, "lora", ["at" if where == "heads" else "*experts"], rank=2)
    wanted = run(stir(model))
    slimkit.merge_delta(model)
    slimkit.save_delta(model, tmp_path / "d", format=format)
    again = build()
    slimkit.load_delta(again, tmp_path / "d")
    torch.testing.assert_close(run(again), wanted, rtol=1e-5, atol=1e-5)


def stored(folder):
    from safetensors.torch import load_file

    config = peft.PeftConfig.from_pretrained(folder).to_dict()
    return config, load_file(folder / "adapter_model.safetensors")


def lora(*more, **options):
    return peft.LoraConfig(r=2, target_modules=["q_proj", *more], **options)


# What PEFT's own file holds of each, and nothing more, comes back; PiSSA, AdaLoRA and token rows change their form.
RETURNING = {
    "plain": lambda: lora(use_rslora=True, lora_alpha=7, lora_dropout=0.1),
    "dora": lambda: lora("v_proj", use_dora=True),
    "bias of b": lambda: lora(lora_bias=True),
    "patterns": lambda: lora("v_proj", rank_pattern={"v_proj": 4}, alpha_pattern={"q_proj": 3}),
    "mica": lambda: lora(init_lora_weights="mica"),
    "table": lambda: lora("embed_tokens"),
    "table, dora": lambda: lora("embed_tokens", use_dora=True),
    "head": lambda: lora("lm_head"),
    "table and head": lambda: lora("embed_tokens", "lm_head"),
    "table and head as one": lambda: lora("embed_tokens", "lm_head", ensure_weight_tying=True),
    "saved table": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved both as one": lambda: lora(modules_to_save=BOTH, ensure_weight_tying=True),
    "biases": lambda: lora(bias="lora_only"),
    "all biases": lambda: lora(bias="all"),
    "ia3 on the head": lambda: peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"]
    ),
    "miss": lambda: peft.MissConfig(r=4, target_modules=["q_proj"], bias="MiSS_only", modules_to_save=["lm_head"]),
    "miss on the head": lambda: peft.MissConfig(r=4, target_modules=["q_proj", "lm_head"], bias="all"),
    "shira on the head": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
}
KEPT = ("peft_type", "bias", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "num_virtual_tokens", "mini_r")


@pytest.mark.parametrize("tied", [True, False], ids=("tied", "untied"))
@pytest.mark.parametrize("name", RETURNING)
def test_a_file_of_pefts_comes_back_with_its_own_tensors_and_no_others(name, tied, tmp_path):
    theirs = peft.get_peft_model(llama(tied), RETURNING[name]())
    there_and_back(theirs, lambda: llama(tied), tmp_path)
    (said, held), (told, ours) = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in held.items()}
    assert all(torch.equal(ours[n], held[n]) for n in held)
    assert {k: told[k] for k in KEPT if k in said} == {k: said[k] for k in KEPT if k in said}
    if tied:  # of an untied model the word means nothing
        assert told.get("ensure_weight_tying", False) == said.get("ensure_weight_tying", False)


def test_token_rows_alone_have_no_place_in_pefts_files_here(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.TrainableTokensConfig(token_indices=[3, 5]))
    theirs.save_pretrained(tmp_path / "d")
    ours = llama()
    slimkit.load_delta(ours, tmp_path / "d")
    with pytest.raises(UnsupportedError, match="no delta here"):
        slimkit.save_delta(ours, tmp_path / "e", format="peft")
