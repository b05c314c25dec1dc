"""Comparison of transformers' language models: caches, tied tables, texts through a tokenizer."""

from __future__ import annotations

import gc
import weakref

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


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_and_a_decoder_are_judged_on_a_windows_second_half(kind, rng):
    import transformers

    def made(seed):
        torch.manual_seed(seed)
        if kind == "T5":
            return transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            )
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=61, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
            )
        )  # fmt: skip

    dense, small = made(0), made(1)
    docs = [rng.integers(3, 61, n).tolist() for n in (16, 23, 7)]
    found = compare_models(dense, {"small": small}, docs, length=16)
    start = dense.config.decoder_start_token_id
    loss, kls = [], []
    for document in docs:
        for begin in range(0, len(document), 16):
            ids = document[begin : begin + 16]
            half = len(ids) // 2
            if len(ids) < 2:
                continue
            inputs = {
                "input_ids": torch.tensor([ids[:half]]),
                "decoder_input_ids": torch.tensor([[start, *ids[half:-1]]]),
            }
            with torch.no_grad():
                q = small.eval()(**inputs).logits[0].log_softmax(-1).double()
                p = dense.eval()(**inputs).logits[0].log_softmax(-1).double()
            loss += (-q[range(len(ids) - half), ids[half:]]).tolist()
            kls += (p.exp() * (p - q)).sum(-1).tolist()
    assert found["small"].figures["perplexity"] == pytest.approx(np.exp(np.mean(loss)), rel=1e-6)
    assert found["small"].figures["kl"] == pytest.approx(np.mean(kls), rel=1e-5, abs=1e-8)  # float32 log-probabilities
    assert found.data["predicted tokens"] == len(loss)
    assert found["small"].figures["decode_per_s"] is None
    assert "the encoder reads a window's first half" in found.protocol
    with pytest.raises(ValueError, match="must both have an encoder"):
        compare_models(dense, {"causal": causal("Llama")}, docs, length=16, speed=False)


def test_berts_outputs_leave_padding_out(rng):
    import transformers

    def made(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        return transformers.BertModel(transformers.BertConfig(vocab_size=61, **sizes)).eval()

    dense, small = made(0), made(1)
    ids = torch.from_numpy(rng.integers(1, 61, (5, 9)))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[3, 7:] = 0
    found = compare_models(dense, {"small": small}, [{"input_ids": ids, "attention_mask": mask}], task="encoder")
    with torch.no_grad():
        means = []
        for model in (dense, small):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            means.append(torch.stack([h[m == 1].mean(0) for h, m in zip(hidden, mask)]))
    cosine = torch.nn.functional.cosine_similarity(*means).mean()
    assert found["small"].figures["cosine"] == pytest.approx(float(cosine), abs=1e-6)  # float32


def test_the_judge_agrees_with_a_loop_written_by_hand(rng):
    """Perplexity, KL, accuracy and agreement in float64, to 1e-6."""
    dense, small = causal("Llama").double(), causal("Llama", 1).double()
    docs = [rng.integers(0, 61, n).tolist() for n in (40, 17, 2, 33)]
    found = compare_models(dense, {"small": small}, docs, length=16, speed=False)["small"].figures
    loss, kls, right, same = [], [], [], []
    for document in docs:
        for begin in range(0, len(document), 16):
            ids = document[begin : begin + 16]
            if len(ids) < 2:
                continue
            with torch.no_grad():
                p, q = (m.eval()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for m in (dense, small))
            loss += (-q[range(len(ids) - 1), ids[1:]]).tolist()
            kls += (p.exp() * (p - q)).sum(-1).tolist()
            right += (q.argmax(-1) == torch.tensor(ids[1:])).tolist()
            same += (q.argmax(-1) == p.argmax(-1)).tolist()
    expected = {
        "perplexity": np.exp(np.mean(loss)), "kl": np.mean(kls), "kl_p99": np.quantile(kls, 0.99),
        "accuracy": np.mean(right), "agreement": np.mean(same),
    }  # fmt: skip
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Llama, and it as ONNX with an open and with a fixed length."""
    from slimkit import export_onnx

    folder = tmp_path_factory.mktemp("onnx")
    model = causal("Llama").eval()
    model.config.use_cache = False
    ids = torch.ones(1, 12, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    export_onnx(model, inputs, folder / "open.onnx", opset=17, dynamic={1: "sequence"})
    export_onnx(model, inputs, folder / "fixed.onnx", opset=17)
    return model, folder


def test_onnx_files_are_judged_beside_models(exported, rng):
    model, folder = exported
    docs = [rng.integers(0, 61, n).tolist() for n in (30, 12, 5)]
    files = {name: folder / f"{name}.onnx" for name in ("open", "fixed")}
    found = compare_models(model, files, docs, length=12)
    assert found.kl == "256"  # files are opened one at a time
    for name in files:
        figures = found[name].figures
        assert figures["kl"] == pytest.approx(0, abs=1e-6)
        assert figures["perplexity"] == pytest.approx(found.dense.figures["perplexity"], rel=1e-5)
        assert figures["bytes"] == files[name].stat().st_size
        assert figures["macs"] is None
        assert figures["prefill_per_s"] > 0
    turned = compare_models(str(files["open"]), {"torch": model}, docs, length=12, speed=False)
    assert turned["torch"].figures["kl"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="takes 12 tokens and a window has 20"):
        compare_models(model, {"fixed": files["fixed"]}, docs, length=20, speed=False)
    with pytest.raises(ValueError, match=r"nothing\.onnx"):
        compare_models(model, {"x": folder / "nothing.onnx"}, docs, speed=False)
    (folder / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="onnxruntime does not take"):
        compare_models(model, {"x": folder / "bad.onnx"}, docs, speed=False)


def test_a_comparison_is_a_page_of_its_own(rng, tmp_path):
    from xml.dom import minidom

    dense, small = causal("Llama"), causal("Llama", 1)
    docs = [rng.integers(0, 61, 20).tolist() for _ in range(4)]
    found = compare_models(dense, {"small <&>": small}, docs, length=10, speed=False)
    page = found.save_html(tmp_path / "lost.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4  # two charts, each drawn again for a narrow page
    assert "small &lt;&amp;&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert f"{found['small <&>'].figures['perplexity']:.3f}" in page
    for part in page.split("<svg")[1:]:
        minidom.parseString("<svg" + part[: part.index("</svg>") + 6])
    assert found.save_html(tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_models_that_functions_make_are_in_memory_one_at_a_time(rng):
    made, beside = [], []

    def maker(seed):
        def make():
            beside.append(sum(ref() is not None for ref in made))
            torch.manual_seed(seed)
            model = torch.nn.Sequential(torch.nn.Embedding(61, 8), torch.nn.Linear(8, 61))
            made.append(weakref.ref(model))
            return model

        return make

    gc.disable()  # so that it is the last reference that goes, and not a chance of the collector
    try:
        docs = [rng.integers(0, 61, 32).tolist() for _ in range(3)]
        compare_models(maker(0), {"one": maker(1), "two": maker(2)}, docs, length=32)
    finally:
        gc.enable()
    assert len(made) > 3
    assert not any(beside)
