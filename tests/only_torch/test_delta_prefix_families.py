"""A prefix on families whose attention cares where a token stands: windows, chunks, biases by distance, sinks, caps.

PEFT is the oracle: it hands a model its prefix in the model's own cache.
"""

import pytest

import slimkit
from slimkit.core.errors import UnsupportedError
from slimkit.delta.prefix_cache import CachedPrefix

import torch

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :3] = 0
RIGHT[0, 8:] = 0
PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
         "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 2,
         "eos_token_id": 1}  # fmt: skip
WINDOW = {**PLAIN, "num_key_value_heads": 2, "sliding_window": 6}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "initializer_range": 0.3,
       "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "initializer_range": 0.3,
}
FAMILIES = {
    "Mistral": {**WINDOW, "head_dim": 8},
    "Qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma2": {**WINDOW, "head_dim": 8},
    "Gemma3Text": {**WINDOW, "head_dim": 8},
    "Phi3": WINDOW,
    "GptOss": {**WINDOW, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
    "Llama4Text": {**PLAIN, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48,
                   "num_local_experts": 2, "attention_chunk_size": 6},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "initializer_range": 0.3},
    "Falcon": {**FALCON, "alibi": True},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64},
    "GPTJ": {**OLD, "rotary_dim": 4},
    "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "max_position_embeddings": 64,
               "attention_types": [[["global", "local"], 1]], "window_size": 6, "initializer_range": 0.3,
               "bos_token_id": 0, "eos_token_id": 0},
    "BioGpt": PLAIN,
    "Llama": {**PLAIN, "num_key_value_heads": 2},
}  # fmt: skip
# PEFT does not find the number of key and value heads in these configurations.
SAID = {
    "Falcon": {"num_attention_heads": 1, "num_layers": 2, "token_dim": 8},
    "Mpt": {"num_attention_heads": 4, "num_layers": 2, "token_dim": 32},
}


def base(family):
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def outputs(model, caches=(True,)):
    """Logits of tokens that count, padded on either side, and what is generated, with a cache and without."""
    found = [model(input_ids=IDS, attention_mask=m).logits[m.bool()] for m in (LEFT, RIGHT)]
    found.append(model(input_ids=IDS).logits)
    ask = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for use in caches:
        found.append(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=use, **ask))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_what_it_is_in_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **SAID.get(family, {}))
    theirs = peft.get_peft_model(base(family), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    want = outputs(peft.PeftModel.from_pretrained(base(family), tmp_path / "theirs").eval())
    ours = base(family)
    plain = ours(input_ids=IDS).logits.detach()
    slimkit.load_delta(ours, tmp_path / "theirs")
    got = outputs(ours, (True, False))
    assert float((want[2] - plain).abs().max()) > 0.01
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)  # float32, sums of some tens of terms
    assert torch.equal(got[3], got[4])
    slimkit.save_delta(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again)[0], want[0], rtol=1e-4, atol=2e-5)
    slimkit.save_delta(ours, tmp_path / "bundle")
    third = base(family)
    slimkit.load_delta(third, tmp_path / "bundle")
    assert torch.equal(third(input_ids=IDS).logits, got[2])
    with slimkit.disable_delta(ours):
        assert torch.equal(ours(input_ids=IDS).logits, plain)
    slimkit.remove_delta(ours)
    assert torch.equal(ours(input_ids=IDS).logits, plain)
    assert type(ours) is type(base(family))


def test_a_prefix_in_the_cache_trains_and_starts_from_a_text():
    text = [5, 9, 11]
    for family in ("Mistral", "Bloom", "GPTJ"):
        model = base(family)
        whole = torch.cat((torch.tensor([text] * 2), IDS), 1)
        with torch.no_grad():
            want = model(whole).logits[:, 3:]
        slimkit.apply_delta(model, "prefix", text_ids=text)
        assert any(isinstance(m, CachedPrefix) for m in model.modules())
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
        model.train()
        model(IDS, labels=IDS).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained)


def test_what_would_lose_a_prefix_in_the_cache_is_refused():
    model = base("Mistral")
    slimkit.apply_delta(model, "prefix", prefix_token_num=3)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
        model(IDS)
    model.gradient_checkpointing_disable()
    assert model(IDS).logits.requires_grad
    fresh = base("Mistral")
    with pytest.raises(UnsupportedError, match="before all 2 attention layers"):
        slimkit.apply_delta(fresh, "prefix", ["*layers.0.self_attn"], prefix_token_num=3)
    plain = base("Mistral")
    assert torch.equal(fresh(IDS).logits, plain(IDS).logits)
