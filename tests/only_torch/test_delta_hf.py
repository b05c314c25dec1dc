"""Deltas on Hugging Face models, and adapters that travel to and from PEFT with equal outputs and no warning."""

import copy
import json
import logging
import warnings

import numpy as np
import pytest

import slimkit
from slimkit.core.errors import FileFormatError, UnsupportedError

import torch

transformers = pytest.importorskip("transformers")


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert(seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def roberta(seed=0):
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, num_labels=3,
        max_position_embeddings=40,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "roberta": roberta}
IDS = torch.arange(3, 15).reshape(2, 6)


@torch.no_grad()
def logits(model, **more):
    return model(input_ids=IDS, **more).logits


def stir(model, seed=1):
    """What training would do to what trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def quietly(call):
    """The result, and the warnings that are about adapters rather than about the libraries' own future."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("peft").addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    logging.getLogger("peft").removeHandler(handler)
    said = [str(w.message) for w in caught if not issubclass(w.category, (FutureWarning, DeprecationWarning))]
    assert said == []
    assert records == []
    return result


LORA = {
    "llama": [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "use_rslora": True},
        {"target_modules": ["q_proj"], "r": 4, "use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 2},
         "alpha_pattern": {r".*down_proj": 3}},
        {"target_modules": ["o_proj"], "r": 2, "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "r": 2},
        {"target_modules": r".*\.1\..*(k|v)_proj", "r": 2},
    ],
    "bert": [
        {"target_modules": ["query", "value"], "r": 8, "lora_alpha": 16, "task_type": "SEQ_CLS"},
        {"target_modules": ["dense"], "r": 2, "use_dora": True, "use_rslora": True},
    ],
    "gpt2": [{"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}],
}  # fmt: skip
CASES = [(name, config) for name, configs in LORA.items() for config in configs]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_lora_from_peft_and_back(name, options, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(MODELS[name](), peft.LoraConfig(**options)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MODELS[name]()
    report = slimkit.load_delta(ours, tmp_path / "theirs")
    assert report.layers
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)  # float32, same formulas
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    again = quietly(lambda: peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    slimkit.save_delta(ours, tmp_path / "bundle")
    third = MODELS[name]()
    slimkit.load_delta(third, tmp_path / "bundle")
    assert torch.equal(logits(third), logits(ours))


def test_our_own_options_reach_peft(tmp_path):
    peft = pytest.importorskip("peft")
    for number, options in enumerate(
        (
            {"init": "pissa", "rank": 2},
            {"init": "pissa", "rank": 2, "rslora": True},
            {"rank": 4, "ranks": {"*v_proj": 2}},
        )
    ):
        model = llama()
        slimkit.apply_delta(model, "lora", ["*q_proj", "*v_proj"], also_train=["model.norm"], **options)
        stir(model)
        slimkit.save_delta(model, tmp_path / str(number), format="peft")
        if number == 2:
            # model.norm ends like nothing else does; PEFT matches endings.
            assert json.loads((tmp_path / "2" / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
        theirs = quietly(lambda n=number: peft.PeftModel.from_pretrained(llama(), tmp_path / str(n))).eval()
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=2e-5)


def test_what_peft_has_no_words_for_is_refused(tmp_path):
    model = llama()
    slimkit.apply_delta(model, "lora", ["*q_proj"], rank=2, keep_zeros=True)
    with pytest.raises(UnsupportedError, match="zeros"):
        slimkit.save_delta(model, tmp_path / "d", format="peft")
    model = llama()
    slimkit.apply_delta(model, "adapter", ["*q_proj"])
    with pytest.raises(ValueError, match="adapter"):
        slimkit.save_delta(model, tmp_path / "d", format="peft")
    assert not (tmp_path / "d").exists()


@pytest.fixture
def adapter(tmp_path):
    model = llama()
    slimkit.apply_delta(model, "lora", ["*q_proj"], rank=2)
    stir(model)
    return slimkit.save_delta(model, tmp_path / "a", format="peft")


def rewrite(folder, change_tensors=None, **config):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if change_tensors:
        tensors = change_tensors(tensors)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, file)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = [
    (lambda t: {**t, A: t[A].t()}, {}, "transposed"),
    (lambda t: {k: (v.t() if "lora_B" in k else v) for k, v in t.items()}, {}, "transposed"),
    (lambda t: {k: v for k, v in t.items() if k != A}, {}, "missing"),
    (lambda t: {k.replace("lora_A", "lora_a"): v for k, v in t.items()}, {}, "lora_a"),
    (lambda t: {**t, "other.weight": t[A]}, {}, "base_model"),
    (lambda t: {**t, "base_model.model.nothing.weight": t[A]}, {}, "nothing"),
    (lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}, {}, "layers.7"),
    (lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}, {}, "shape"),
    (None, {"peft_type": "IA3"}, "lora_A.weight' is none that slimkit knows"),
    (None, {"peft_type": "LOHA"}, "LOHA"),
    (None, {"peft_type": 3}, "configuration"),
    (None, {"use_dora": True}, "missing"),
    (None, {"use_qalora": True}, "use_qalora"),
    (None, {"init_lora_weights": "corda"}, "corda"),
    (None, {"lora_alpha": "8"}, "lora_alpha"),
    (None, {"r": 3}, "rank 3"),
    (None, {"alpha_pattern": {"(a+)+": 2}}, "repeat"),
]


@pytest.mark.parametrize(("change", "config", "words"), BAD)
def test_a_bad_adapter_is_refused_and_changes_nothing(adapter, change, config, words):
    rewrite(adapter, change, **config)
    model = llama()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        slimkit.load_delta(model, adapter)
    assert isinstance(caught.value, slimkit.SlimkitError)
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n][0], after[n][0]) and before[n][1] == after[n][1] for n in before)


def test_a_missing_tensor_file_is_named(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"adapter_model\.safetensors"):
        slimkit.load_delta(llama(), adapter)


def test_rename_translates_paths(adapter):
    whole, inner = llama(), llama().model
    slimkit.load_delta(whole, adapter)
    slimkit.load_delta(inner, adapter, rename={"model.": ""})
    torch.testing.assert_close(inner(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    other = llama().model
    slimkit.load_delta(other, adapter, rename=lambda path: path.removeprefix("model."))
    assert torch.equal(inner(IDS).last_hidden_state, other(IDS).last_hidden_state)
    with pytest.raises(ValueError, match="rename"):
        slimkit.load_delta(llama().model, adapter, rename={"modle.": ""})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_from_peft_and_back(name, projection, tmp_path):
    """Positions begin behind the virtual tokens in all of them, also in encoders."""
    peft = pytest.importorskip("peft")
    task = "CAUSAL_LM" if name in ("llama", "gpt2") else "SEQ_CLS"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, prefix_projection=projection)
    theirs = peft.get_peft_model(MODELS[name](), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "theirs").eval()
    ours = MODELS[name]()
    y0 = ours.base_model(IDS)[0].detach()
    slimkit.load_delta(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    again = quietly(lambda: peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    slimkit.remove_delta(ours)
    assert torch.equal(ours.base_model(IDS)[0], y0)  # the head of a classifier came with the file, and stays


def test_prompt_from_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(llama(), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    y0 = logits(ours)
    slimkit.load_delta(ours, tmp_path / "theirs")
    assert logits(ours).shape[1] == IDS.shape[1] + 3
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    again = quietly(lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    slimkit.remove_delta(ours)
    assert torch.equal(logits(ours), y0)


def test_a_prompt_with_its_head_travels_both_ways(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(bert(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bert()
    slimkit.load_delta(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    again = quietly(lambda: peft.PeftModel.from_pretrained(bert(), tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", list(MODELS))
def test_prefix_and_prompt_train_on_unedited_models(name, kind, tmp_path):
    model = MODELS[name]()
    y0 = logits(model)
    names = [n for n, _ in model.named_parameters()]
    options = {"prefix_token_num": 3} if kind == "prefix" else {"num_virtual_tokens": 3}
    report = slimkit.apply_delta(model, kind, **options)
    assert slimkit.freeze_delta(model, kind).trainable.keys() == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert report.layers
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    labels = torch.tensor([0, 2]) if "bert" in name else IDS
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert losses[-1] < losses[0]
    slimkit.save_delta(model, tmp_path / "d")
    fresh = MODELS[name]()
    slimkit.load_delta(fresh, tmp_path / "d")
    assert torch.equal(logits(fresh), logits(model))
    slimkit.remove_delta(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.equal(logits(model), y0)


def test_the_prefix_is_what_stands_in_front():
    """A prefix started from a text gives what the text itself in front of the input gives."""
    model = llama()
    text = [5, 9, 11]
    with torch.no_grad():
        want = model(torch.cat((torch.tensor([text] * 2), IDS), 1)).logits[:, 3:]
    slimkit.apply_delta(model, "prefix", text_ids=text)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    slimkit.remove_delta(model)
    slimkit.apply_delta(model, "prompt", text_ids=text)
    torch.testing.assert_close(logits(model)[:, 3:], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation_with_a_cache_says_what_the_text_says(kind):
    model, text = llama(), [5, 9, 11]
    prompt = torch.cat((torch.tensor([text]), IDS[:1]), 1)
    ask = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **ask)[0, prompt.shape[1] :]
    slimkit.apply_delta(model, kind, text_ids=text)
    got = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **ask)[0, IDS.shape[1] :]
    assert got.tolist() == want.tolist()


def test_prefix_works_with_gradient_checkpointing_and_padding():
    plain, saving = llama(), llama()
    grads = []
    for model in (plain, saving):
        torch.manual_seed(3)
        slimkit.apply_delta(model, "prefix", prefix_token_num=2)
        model.train()
        if model is saving:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


class Own(torch.nn.Module):
    """An attention model of nobody's library."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids)).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_prefix_on_an_own_attention_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Own())
    y0 = model(IDS)
    with pytest.raises(ValueError, match="inputs"):
        slimkit.apply_delta(model, "prefix", prefix_token_num=3)
    report = slimkit.apply_delta(model, "prefix", ["0"], prefix_token_num=3, inputs=IDS)
    assert list(report.layers) == ["0"]
    assert type(model[0]).__mro__[2].__name__ or isinstance(model[0], Own)
    key, value = (kv.detach() for kv in model[0].mindpet_delta_prefixtuning())
    q, k, v = model[0].qkv(model[0].embed(IDS)).view(*IDS.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
    front = [t.view(3, 2, 8).transpose(0, 1).expand(2, -1, -1, -1) for t in (key, value)]
    scores = (q @ torch.cat((front[0], k), 2).transpose(-1, -2) / 8**0.5).softmax(-1)
    want = model[0].out((scores @ torch.cat((front[1], v), 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(model(IDS), want, rtol=1e-5, atol=1e-5)
    slimkit.remove_delta(model)
    assert torch.equal(model(IDS), y0)
    assert type(model[0]) is Own


def test_prefix_says_when_there_is_no_attention():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="no attention"):
        slimkit.apply_delta(model, "prefix", inputs=torch.ones(1, 4))
    with pytest.raises(UnsupportedError, match="embedding of the tokens"):
        slimkit.apply_delta(model, "prompt")


def test_all_linear_leaves_the_output_embedding_alone():
    layers = slimkit.apply_delta(llama(), "lora", rank=2).layers
    assert len(layers) == 14
    assert "lm_head" not in layers
    assert set(slimkit.apply_delta(gpt2(), "lora", rank=2).layers) == {
        f"transformer.h.{i}.{p}" for i in (0, 1) for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_shared_weight_is_never_merged_in_silence():
    model = gpt2()
    slimkit.apply_delta(model, "lora", ["transformer.wte"], rank=2)
    stir(model)
    before = logits(model)
    with pytest.raises(UnsupportedError, match="shared"):
        slimkit.merge_delta(model)
    assert torch.equal(logits(model), before)


def test_conv1d_merges_and_learns_with_dora():
    for dora in (False, True):
        model = gpt2()
        slimkit.apply_delta(model, "lora", ["*c_attn"], rank=2, dora=dora)
        stir(model)
        y1 = logits(model)
        slimkit.merge_delta(model)
        torch.testing.assert_close(logits(model), y1, rtol=1e-4, atol=1e-5)


def test_the_base_file_still_loads_under_a_delta(tmp_path):
    """Names of the base do not change, so a checkpoint of the base goes on loading."""
    model = llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    slimkit.apply_delta(model, "lora", rank=2)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("mindpet_delta_lora" in name for name in missing)
    assert np.isfinite(logits(model).numpy()).all()


def test_a_fine_tuned_folder_or_state_becomes_the_same_small_delta_as_the_model(tmp_path):
    """What a model works out itself, the frequencies of rotary embeddings, stands in no file."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    tuned.save_pretrained(tmp_path)
    ids, found = torch.arange(3, 9)[None], []
    for source in (tuned, tmp_path, tuned.state_dict()):
        model = copy.deepcopy(base)
        slimkit.compress_delta(model, source, bytes_ratio=0.3)
        found.append(model(input_ids=ids).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], base(input_ids=ids).logits)
