"""Weight pruning on real architectures: what drops dead heads and channels computes the same as before."""

import copy

import numpy as np
import pytest

from slimkit.core.weights.blocks import PruneConfig
from slimkit.weights import prune_model_weight

import torch

STEP = "prune_bert_intra_block"


def cut(large, small, path, config=None, **kw):
    torch.save(large.state_dict(), path / "large.pt")
    config = config or PruneConfig().set_steps([STEP]).set_selection("importance")
    return prune_model_weight(small, config, path / "large.pt", **kw)


def outputs(model, **inputs):
    model.eval()
    with torch.no_grad():
        out = model(**inputs)
    return next(v for v in (getattr(out, k, None) for k in ("logits", "last_hidden_state")) if v is not None).numpy()


def randomise(model, seed=0):
    """Weights large enough that a wrongly kept channel shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))
    return model.eval()


def kill(matrix, positions, axis):
    """Make rows (axis 0) or columns (axis 1) dead."""
    with torch.no_grad():
        matrix.index_fill_(axis, torch.as_tensor(positions), 0.0)


def rows(heads, size):
    return [h * size + i for h in heads for i in range(size)]


IDS = torch.arange(1, 13).reshape(2, 6)
# float32, sums of up to 64 terms in another order
CLOSE = {"atol": 2e-5, "rtol": 2e-4}


def llama(kv, heads, ffn, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=8,
            intermediate_size=ffn, vocab_size=64, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def test_llama_with_grouped_queries_gated_ffn_and_tied_embeddings(tmp_path):
    large = randomise(llama(4, 8, 48))
    for number, layer in enumerate(large.model.layers):
        dead_keys, dead_channels = [number, 3], list(range(number, 48, 2))
        a = layer.self_attn
        dead_queries = [k * 2 + i for k in dead_keys for i in range(2)]
        for projection, heads in ((a.q_proj, dead_queries), (a.k_proj, dead_keys), (a.v_proj, dead_keys)):
            kill(projection.weight, rows(heads, 8), 0)
        kill(a.o_proj.weight, rows(dead_queries, 8), 1)
        kill(layer.mlp.up_proj.weight, dead_channels, 0)
        kill(layer.mlp.gate_proj.weight, dead_channels, 0)
        kill(layer.mlp.down_proj.weight, dead_channels, 1)
    small = llama(2, 4, 24)
    report = cut(large, small, tmp_path)
    assert report["choices"]["model.layers.1.self_attn"] == {"heads": [0, 1, 4, 5], "key_heads": [0, 2]}
    assert np.allclose(outputs(small, input_ids=IDS), outputs(large, input_ids=IDS), **CLOSE)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert report["tied"] == ["lm_head.weight"] or report["tied"] == ["model.embed_tokens.weight"]


def test_a_file_without_the_tied_twin_loads(tmp_path):
    large = randomise(llama(4, 8, 48))
    state = {n: t for n, t in large.state_dict().items() if n != "lm_head.weight"}
    torch.save(state, tmp_path / "large.bin")
    small = llama(4, 8, 24)
    report = prune_model_weight(small, PruneConfig().set_steps([STEP]), tmp_path / "large.bin")
    assert report["tied"] == ["lm_head.weight"]
    assert torch.equal(small.lm_head.weight, large.lm_head.weight)


def bert(ffn, heads=4, layers=2):
    from transformers import BertConfig, BertForQuestionAnswering

    model = BertForQuestionAnswering(
        BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=ffn, vocab_size=64
        )
    )
    if heads != 4:
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            for name in ("query", "key", "value"):
                setattr(attention, name, torch.nn.Linear(32, heads * 8))
            layer.attention.output.dense = torch.nn.Linear(heads * 8, 32)
            attention.num_attention_heads, attention.all_head_size = heads, heads * 8
    return model


def test_bert_blocks_heads_and_channels_at_once(tmp_path):
    large = randomise(bert(48, layers=4))
    layers = large.bert.encoder.layer
    for number in (0, 3):
        layer, dead = layers[number], [number % 2, 2]
        for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            kill(part.weight, rows(dead, 8), 0)
            kill(part.bias, rows(dead, 8), 0)
        kill(layer.attention.output.dense.weight, rows(dead, 8), 1)
        kill(layer.intermediate.dense.weight, list(range(24)), 0)
        kill(layer.output.dense.weight, list(range(24)), 1)
    small = bert(24, heads=2)
    config = PruneConfig().set_steps(["prune_blocks", STEP]).set_selection("importance")
    config.add_blocks_params(r"bert.encoder.layer.(\d+).", {0: 0, 1: 3})
    cut(large, small, tmp_path, config)
    large.bert.encoder.layer = torch.nn.ModuleList([layers[0], layers[3]])
    for key in ("start_logits", "end_logits"):
        with torch.no_grad():
            one, two = getattr(small.eval()(IDS), key), getattr(large(IDS), key)
        assert np.allclose(one, two, **CLOSE)


def test_gpt2_with_fused_transposed_projections(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, n_positions=16)
    large = randomise(GPT2LMHeadModel(config))
    config = copy.deepcopy(config)
    config.n_inner = 24
    small = GPT2LMHeadModel(config)
    for number, (wide, narrow) in enumerate(zip(large.transformer.h, small.transformer.h)):
        dead = [number, 3]
        fused = [part * 32 + r for part in range(3) for r in rows(dead, 8)]
        kill(wide.attn.c_attn.weight, fused, 1)
        kill(wide.attn.c_attn.bias, fused, 0)
        kill(wide.attn.c_proj.weight, rows(dead, 8), 0)
        kill(wide.mlp.c_fc.weight, list(range(0, 48, 2)), 1)
        kill(wide.mlp.c_proj.weight, list(range(0, 48, 2)), 0)
        narrow.attn.c_attn, narrow.attn.c_proj = Conv1D(48, 32), Conv1D(32, 16)
        narrow.attn.num_heads, narrow.attn.split_size = 2, 16
    report = cut(large, small, tmp_path)
    assert report["choices"]["transformer.h.1.attn"]["heads"] == [0, 2]
    assert np.allclose(outputs(small, input_ids=IDS), outputs(large, input_ids=IDS), **CLOSE)


def phi3(kv, heads, ffn):
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=ffn,
        vocab_size=64, max_position_embeddings=32, original_max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config.head_dim = 8
    return Phi3ForCausalLM(config)


@pytest.mark.parametrize("selection", ["importance", "first"])
def test_phi3_with_fused_grouped_queries_and_fused_gate(tmp_path, selection):
    large = randomise(phi3(2, 4, 48))
    dead_key = 0 if selection == "importance" else 1
    dead_channels = list(range(1, 48, 2)) if selection == "importance" else list(range(24, 48))
    dead_queries = [dead_key * 2, dead_key * 2 + 1]
    fused = rows(dead_queries, 8) + rows([4 + dead_key, 6 + dead_key], 8)
    for layer in large.model.layers:
        kill(layer.self_attn.qkv_proj.weight, fused, 0)
        kill(layer.self_attn.o_proj.weight, rows(dead_queries, 8), 1)
        kill(layer.mlp.gate_up_proj.weight, dead_channels + [48 + c for c in dead_channels], 0)
        kill(layer.mlp.down_proj.weight, dead_channels, 1)
    small = phi3(1, 2, 24)
    cut(large, small, tmp_path, PruneConfig().set_steps([STEP]).set_selection(selection))
    assert np.allclose(outputs(small, input_ids=IDS), outputs(large, input_ids=IDS), **CLOSE)


def t5(heads, ffn):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=32, d_kv=8, num_heads=heads, d_ff=ffn, num_layers=2, vocab_size=64))


def test_t5_whose_first_layer_biases_the_heads_of_all(tmp_path):
    large = randomise(t5(4, 48))
    for block in large.encoder.block:
        attention = block.layer[0].SelfAttention
        for part in (attention.q, attention.k, attention.v):
            kill(part.weight, rows([0, 2], 8), 0)
        kill(attention.o.weight, rows([0, 2], 8), 1)
        kill(block.layer[1].DenseReluDense.wi.weight, list(range(24)), 0)
        kill(block.layer[1].DenseReluDense.wo.weight, list(range(24)), 1)
    # Taken alone, the second block would keep a head that the first one drops.
    with torch.no_grad():
        large.encoder.block[1].layer[0].SelfAttention.q.weight[:8] = 1e-3
    small = t5(2, 24)
    report = cut(large, small, tmp_path)
    chosen = [c["heads"] for p, c in report["choices"].items() if p.endswith("SelfAttention")]
    assert chosen == [[1, 3], [1, 3]]
    assert np.allclose(outputs(small, input_ids=IDS), outputs(large, input_ids=IDS), **CLOSE)


def test_torch_encoder_layers_with_one_fused_matrix(tmp_path):
    def encoder(width, heads, ffn):
        layer = torch.nn.TransformerEncoderLayer(width, heads, ffn, batch_first=True, dropout=0.0)
        return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    large, small = randomise(encoder(32, 4, 48)), encoder(32, 4, 24)
    for layer in large.layers:
        kill(layer.linear1.weight, list(range(0, 48, 2)), 0)
        kill(layer.linear1.bias, list(range(0, 48, 2)), 0)
        kill(layer.linear2.weight, list(range(0, 48, 2)), 1)
    cut(large, small, tmp_path)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert np.allclose(small.eval()(x), large(x), **CLOSE)
    # Narrower all over: heads of 8 are kept whole, the same columns everywhere.
    narrow = encoder(16, 2, 48)
    config = PruneConfig().set_steps([STEP]).set_selection("importance").set_head_size(8)
    report = cut(large, narrow, tmp_path, config)
    heads = report["choices"]["layers.0.self_attn"]["heads"]
    kept = [part * 32 + r for part in range(3) for r in rows(heads, 8)]
    full, sliced = large.layers[0].self_attn.in_proj_weight, narrow.layers[0].self_attn.in_proj_weight
    columns = [c for c in range(32) if any(torch.equal(full[kept][:, c], sliced[:, j]) for j in range(16))]
    assert torch.equal(full[kept][:, columns], sliced)
    out = narrow.layers[0].self_attn.out_proj.weight
    assert torch.equal(large.layers[0].self_attn.out_proj.weight[columns][:, rows(heads, 8)], out)
    assert torch.equal(large.layers[1].norm2.weight[columns], narrow.layers[1].norm2.weight)


def test_vit_cuts_its_patches_position_table_and_class_token(tmp_path):
    from transformers import ViTConfig, ViTModel

    def vit(width, heads, ffn):
        sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": ffn}
        config = ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
        return ViTModel(config, add_pooling_layer=False)

    large, small = randomise(vit(32, 4, 48)), vit(24, 3, 24)
    config = PruneConfig().set_steps([STEP]).set_selection("importance").set_head_size(8)
    cut(large, small, tmp_path, config)
    full, sliced = large.state_dict(), small.state_dict()
    columns = [c for c in range(32) if (full["layernorm.weight"][c] == sliced["layernorm.weight"]).any()]
    assert len(columns) == 24
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        assert torch.equal(full[name][..., columns], sliced[name])
    name = "embeddings.patch_embeddings.projection.weight"
    assert torch.equal(full[name][columns], sliced[name])


def test_heads_that_cannot_be_told_are_refused_with_the_way_out(tmp_path):
    large, small = bert(48), bert(48)
    small.config.num_attention_heads = 4
    for layer in small.bert.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, torch.nn.Linear(32, 12))
        layer.attention.output.dense = torch.nn.Linear(12, 32)
        attention.num_attention_heads = 5
    with pytest.raises(ValueError, match="set_head_size"):
        cut(large, small, tmp_path)


def test_a_prefix_of_the_file_or_of_the_model_is_found(tmp_path):
    from transformers import BertConfig, BertModel

    large = randomise(bert(48))
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=64)
    small = BertModel(config, add_pooling_layer=False)
    report = cut(large, small, tmp_path, PruneConfig().set_steps([STEP]), strict=False)
    assert sorted(report["unused"]) == ["qa_outputs.bias", "qa_outputs.weight"]
    assert torch.equal(
        small.encoder.layer[1].output.dense.weight, large.bert.encoder.layer[1].output.dense.weight[:, :24]
    )
    with pytest.raises(ValueError, match=r"2 tensors of the file have no place in the model, such as 'qa_outputs"):
        cut(large, small, tmp_path, PruneConfig().set_steps([STEP]))
