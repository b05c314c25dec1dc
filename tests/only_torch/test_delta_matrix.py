"""Adapter options by models, to and from PEFT: every cell is right in three directions, or refused with a reason.

PEFT makes an adapter; slimkit loads it, saves it for PEFT, which loads it again, and as a bundle, which a fresh base
loads. `docs/delta.md` gives the counts of this table.
"""

import re
from pathlib import Path

import pytest

import slimkit
from slimkit.core.errors import UnsupportedError

import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=64, attention_bias=True,
                                      tie_word_embeddings=True, max_position_embeddings=64)  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=64, num_labels=3))


def t5():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                                   pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def opt():
    config = transformers.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                                    vocab_size=64, max_position_embeddings=64, word_embed_proj_dim=16,
                                    pad_token_id=1)  # fmt: skip
    return transformers.OPTForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, vocab_size=64, num_local_experts=3,
                                        num_experts_per_tok=2)  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    )


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2, batch_first=True), "up": nn.Linear(16, 24),
                           "down": nn.Linear(24, 16)}) for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for layer in self.layers:
            x = x + layer["mha"](x, x, x)[0]
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(x)


TEXT = {"input_ids": IDS}
BOTH = {**TEXT, "decoder_input_ids": IDS[:, :4].clone()}
IMAGE = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
# make, inputs, attention, another layer, embedding, head, task
MODELS = {
    "llama": (llama, TEXT, ["q_proj", "v_proj"], ["down_proj"], "embed_tokens", "lm_head", "CAUSAL_LM"),
    "gpt2": (gpt2, TEXT, ["c_attn"], ["mlp.c_proj"], "wte", "lm_head", "CAUSAL_LM"),
    "bert": (bert, TEXT, ["query", "value"], ["intermediate.dense"], "word_embeddings", "classifier", "SEQ_CLS"),
    "t5": (t5, BOTH, ["q", "v"], ["wo"], "shared", "lm_head", "SEQ_2_SEQ_LM"),
    "opt": (opt, TEXT, ["q_proj", "v_proj"], ["fc2"], "embed_tokens", "lm_head", "CAUSAL_LM"),
    "mixtral": (mixtral, TEXT, ["q_proj", "v_proj"], ["o_proj"], "embed_tokens", "lm_head", "CAUSAL_LM"),
    "vit": (vit, IMAGE, ["query", "value", "q_proj", "v_proj"], ["fc1", "intermediate.dense"], "projection",
            "classifier", None),
    "multihead": (Multihead, TEXT, ["mha", "up"], ["down"], "words", "head", None),
}  # fmt: skip


def lora(**options):
    def config(attention, other, embedding, head, task, name):
        words = {"A": attention, "AO": attention + other, "E": [embedding], "EA": [embedding, *attention],
                 "H": [head], "EH": [embedding, head], "O": other, "all": "all-linear",
                 "regex": rf".*\.({'|'.join(map(re.escape, attention))})"}  # fmt: skip
        made = {"r": 4, "target_modules": attention, "init_lora_weights": False}
        for key, value in options.items():
            made[key] = value(attention, other, embedding, name) if callable(value) else value
            if key in ("target_modules", "modules_to_save", "exclude_modules"):
                made[key] = words[value]
        return peft.LoraConfig(**made)

    return config


def prompt(kind, **options):
    return lambda attention, other, embedding, head, task, name: getattr(peft, kind)(
        task_type=task, num_virtual_tokens=3, **options
    )


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
OPTIONS = {
    "plain": lora(),
    "rank and alpha": lora(r=8, lora_alpha=3),
    "dropout": lora(lora_dropout=0.3),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dora, rslora": lora(use_dora=True, use_rslora=True),
    "bias lora_only": lora(bias="lora_only"),
    "bias all": lora(bias="all"),
    "lora_bias": lora(lora_bias=True),
    "rank_pattern": lora(rank_pattern=lambda a, o, e, n: {a[0]: 2}),
    "alpha_pattern": lora(alpha_pattern=lambda a, o, e, n: {f".*{a[-1]}": 7}),
    "both patterns": lora(target_modules="AO", rank_pattern=lambda a, o, e, n: {o[0]: 3},
                          alpha_pattern=lambda a, o, e, n: {o[0]: 5}),
    "attention and more": lora(target_modules="AO"),
    "all-linear": lora(target_modules="all"),
    "regular expression": lora(target_modules="regex"),
    "embedding": lora(target_modules="E"),
    "embedding, dora": lora(target_modules="EA", use_dora=True),
    "head": lora(target_modules="H"),
    "saved head": lora(modules_to_save="H"),
    "saved embedding": lora(modules_to_save="E"),
    "saved both": lora(modules_to_save="EH"),
    "ensure_weight_tying": lora(modules_to_save="E", ensure_weight_tying=True),
    "layers_to_transform": lora(layers_to_transform=[1]),
    "layers_pattern": lora(layers_to_transform=[0], layers_pattern=["layers", "h", "layer", "block"]),
    "exclude_modules": lora(target_modules="AO", exclude_modules="O"),
    "trainable_token_indices": lora(trainable_token_indices=lambda a, o, e, n: {e: [3, 5]}),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "gaussian": lora(init_lora_weights="gaussian"),
    "target_parameters": lora(
        target_parameters=lambda a, o, e, n: EXPERTS if n == "mixtral" else [f"{o[0]}.weight"]
    ),
    "prompt": prompt("PromptTuningConfig"),
    "prefix": prompt("PrefixTuningConfig"),
    "ia3": lambda a, o, e, h, t, n: peft.IA3Config(target_modules=a + o, feedforward_modules=o),
    "adalora": lambda a, o, e, h, t, n: peft.AdaLoraConfig(target_modules=a, init_r=4, target_r=2, total_step=10),
}  # fmt: skip
# What PEFT itself cannot make or load.
IMPOSSIBLE = {
    ("gpt2", "olora"), ("gpt2", "target_parameters"), ("vit", "trainable_token_indices"), ("vit", "prompt"),
    ("vit", "prefix"), ("multihead", "prompt"), ("multihead", "prefix"), ("multihead", "dora"),
    ("multihead", "dora, rslora"), ("multihead", "embedding, dora"), ("multihead", "layers_to_transform"),
    ("multihead", "pissa"), ("multihead", "olora"), ("multihead", "ia3"), ("multihead", "adalora"),
}  # fmt: skip
# What slimkit refuses, and the word that the error names.
REFUSED = {
    ("mixtral", "all-linear"): "TopKRouter",
    ("multihead", "all-linear"): "never calls it",
    ("multihead", "lora_bias"): "lora_bias",
}
CLEAN = len(MODELS) * len(OPTIONS) - len(IMPOSSIBLE) - len(REFUSED)
CELLS = [(m, o) for m in MODELS for o in OPTIONS if (m, o) not in IMPOSSIBLE]


@torch.no_grad()
def run(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def adapter(name, config, folder):
    """A folder that PEFT wrote, what PEFT computes with it, and how the base is made."""
    make, inputs, *words = MODELS[name]

    def base():
        torch.manual_seed(7)
        return make().eval()

    theirs = peft.get_peft_model(base(), config(*words, name))
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(folder)
    return base, inputs, run(peft.PeftModel.from_pretrained(base(), folder).eval(), inputs)


def all_directions(name, config, tmp_path):
    base, inputs, want = adapter(name, config, tmp_path / "theirs")
    tolerance = 5e-6 * max(1.0, float(want.abs().max()))  # float32, products of some tens of terms
    ours = base()
    slimkit.load_delta(ours, tmp_path / "theirs")
    got = run(ours, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=tolerance)
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again, inputs), want, rtol=1e-4, atol=tolerance)
    slimkit.save_delta(ours, tmp_path / "bundle")
    third = base()
    slimkit.load_delta(third, tmp_path / "bundle")
    assert torch.equal(run(third, inputs), got)


@pytest.mark.parametrize(("model", "option"), CELLS)
def test_matrix(model, option, tmp_path):
    if (model, option) in REFUSED:
        base, inputs, _ = adapter(model, OPTIONS[option], tmp_path / "theirs")
        ours = base()
        before = run(ours, inputs)
        with pytest.raises(UnsupportedError, match=REFUSED[model, option]):
            slimkit.load_delta(ours, tmp_path / "theirs")
        assert torch.equal(run(ours, inputs), before)
        return
    all_directions(model, OPTIONS[option], tmp_path)


def test_the_counts_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "delta.md").read_text(encoding="utf-8")
    assert len(MODELS) * len(OPTIONS) == 272
    assert CLEAN >= 245
    assert f"{CLEAN} of 272" in page
    assert f"{len(IMPOSSIBLE)} are impossible in PEFT itself" in page
    assert f"{len(REFUSED)} are refused" in page


FURTHER = {
    "p-tuning": prompt("PromptEncoderConfig", encoder_hidden_size=8),
    "vera": lambda a, o, e, h, t, n: peft.VeraConfig(r=4, target_modules=a[:1]),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "trainable tokens": lambda a, o, e, h, t, n: peft.TrainableTokensConfig(token_indices=[1, 2]),
}


@pytest.mark.parametrize("option", FURTHER)
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_further_kinds_of_peft_files(model, option, tmp_path):
    if option == "trainable tokens":  # PEFT's class for it cannot load into what another one saved
        base, inputs, want = adapter(model, FURTHER[option], tmp_path / "theirs")
        ours = base()
        slimkit.load_delta(ours, tmp_path / "theirs")
        torch.testing.assert_close(run(ours, inputs), want, rtol=1e-4, atol=1e-5)
    else:
        all_directions(model, FURTHER[option], tmp_path)


NAMED = [
    ("LORA", {"layer_replication": [[0, 2]]}, "layer_replication"), ("LORA", {"use_qalora": True}, "use_qalora"),
    ("LORA", {"init_lora_weights": "corda"}, "corda"), ("LORA", {"init_lora_weights": "loftq"}, "loftq"),
    ("LORA", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"), ("LOHA", {}, "LOHA"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "word"), NAMED)
def test_what_is_not_read_is_named(kind, options, word, tmp_path):
    import json

    base, _, _ = adapter("llama", lora(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": kind, **options}))
    with pytest.raises(UnsupportedError, match=word):
        slimkit.load_delta(base(), tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "delta.md").read_text(encoding="utf-8")
    assert word in page
