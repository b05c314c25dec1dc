"""Comparison of transformers' language models: caches, tied tables, texts through a tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.compare import compare_models

import torch


def causal(kind, seed=0):
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "Llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=24, max_position_embeddings=64)
        return transformers.LlamaForCausalLM(config)
    if kind == "Qwen3":
        config = transformers.Qwen3Config(**sizes, intermediate_size=24, num_key_value_heads=1, head_dim=8)
        return transformers.Qwen3ForCausalLM(config)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPT2"])
def test_perplexity_is_that_of_the_models_own_loss(kind, rng):
    dense, small = causal(kind), causal(kind, 1)
    docs = [rng.integers(0, 61, 32).tolist() for _ in range(3)]
    found = compare_models(dense, {"small": small}, docs, length=32)
    with torch.no_grad():
        ids = [torch.tensor([d]) for d in docs]
        loss = np.mean([float(small.eval()(input_ids=i, labels=i).loss) for i in ids])
    assert found["small"].figures["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)  # float32 mean of 31 tokens
    assert found["small"].figures["decode_per_s"] > 0
    assert found.dense.figures["parameters"] == sum(p.numel() for p in dense.parameters())


def test_texts_are_cut_by_documents_and_bytes_are_those_of_the_predicted_tokens(rng):
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    texts = ["Die Größe zählt, and so do bytes: naïve café.", "second text, with more words than the first one has"]
    made.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    model = torch.nn.Sequential(torch.nn.Embedding(len(tokenizer), 8), torch.nn.Linear(8, len(tokenizer)))
    found = compare_models(model, {"same": model}, texts, tokenizer=tokenizer, length=7, speed=False)
    n_bytes = loss = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids), 7):
            part = ids[begin : begin + 7]
            if len(part) < 2:
                continue
            # Byte-level tokens decode to bytes one by one.
            words = tokenizer.convert_ids_to_tokens(part[1:])
            n_bytes += sum(len(w) for w in words)
            with torch.no_grad():
                logits = model(torch.tensor(part[:-1]))
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(part[1:]), reduction="sum"))
    measured = found["same"].figures["bits_per_byte"]
    # Tokens that split a character begin at the same one, so a window may be off by its last character's bytes.
    assert measured == pytest.approx(loss / np.log(2) / n_bytes, rel=0.03)
    assert "no special tokens" in found.protocol
    with pytest.raises(ValueError, match="beginning-of-sequence"):
        compare_models(model, {"s": model}, [[1, 2]], bos=True)
