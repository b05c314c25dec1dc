"""Prefixes of Hugging Face PEFT on own MindSpore cells: positions begin behind the virtual tokens, as they do there."""

import numpy as np
import pytest

from tests import kits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
ms = pytest.importorskip("mindspore")

WIDTH, HEADS, FEW, WORDS, TOKENS = 32, 4, 2, 64, 3
IDS = np.arange(3, 15).reshape(2, 6)


def llama_cell():
    """LlamaModel as an own Cell, with Hugging Face's names: rotary positions, keys shared by two queries each."""
    from mindspore import nn, ops

    class Norm(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = ms.Parameter(ms.ops.ones(WIDTH), name="weight")

        def construct(self, x):
            return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + 1e-6) * self.weight

    class Rotary(nn.Cell):
        def __init__(self):
            super().__init__()
            width = WIDTH // HEADS
            self.inverse = ms.Tensor(10000.0 ** (-np.arange(0, width, 2) / width), ms.float32)

        def construct(self, x, position_ids):
            angles = position_ids.astype(ms.float32).expand_dims(-1) * self.inverse
            angles = ops.concat((angles, angles), -1).astype(x.dtype)
            return ops.cos(angles), ops.sin(angles)

    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            small = WIDTH // HEADS * FEW
            self.q_proj, self.o_proj = (nn.Dense(WIDTH, WIDTH, has_bias=False) for _ in range(2))
            self.k_proj, self.v_proj = (nn.Dense(WIDTH, small, has_bias=False) for _ in range(2))
            self.num_heads, self.num_key_value_heads, self.width = HEADS, FEW, WIDTH // HEADS

        def turned(self, x, cos, sin):
            first, second = x[..., : self.width // 2], x[..., self.width // 2 :]
            return x * cos + ops.concat((-second, first), -1) * sin

        def split(self, x, heads):
            return x.reshape((x.shape[0], x.shape[1], heads, self.width)).swapaxes(1, 2)

        def construct(self, x, cos, sin, mask):
            q = self.turned(self.split(self.q_proj(x), self.num_heads), cos, sin)
            k = self.turned(self.split(self.k_proj(x), self.num_key_value_heads), cos, sin)
            v = self.split(self.v_proj(x), self.num_key_value_heads)
            k, v = (t.repeat_interleave(self.num_heads // self.num_key_value_heads, 1) for t in (k, v))
            scores = ops.matmul(q, k.swapaxes(2, 3)) * self.width**-0.5 + mask
            return self.o_proj(ops.matmul(ops.softmax(scores, -1), v).swapaxes(1, 2).reshape(x.shape))

    class Mlp(nn.Cell):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Dense(WIDTH, 48, has_bias=False) for _ in range(2))
            self.down_proj = nn.Dense(48, WIDTH, has_bias=False)

        def construct(self, x):
            return self.down_proj(ops.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(nn.Cell):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = Attention(), Mlp()
            self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

        def construct(self, x, cos, sin, mask):
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Llama(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.norm = nn.Embedding(WORDS, WIDTH), Norm()
            self.layers = nn.CellList([Layer(), Layer()])
            self.rotary_emb = Rotary()

        def construct(self, ids):
            x = self.embed_tokens(ids)
            cos, sin = self.rotary_emb(x, ops.arange(ids.shape[1]))
            mask = ops.triu(ops.full((ids.shape[1], ids.shape[1]), -1e9), 1)
            for layer in self.layers:
                x = layer(x, cos, sin, mask)
            return self.norm(x)

    return Llama()


def bert_cell():
    """BertModel as an own Cell: learned positions."""
    from mindspore import nn, ops

    def norm():
        return nn.LayerNorm((WIDTH,), epsilon=1e-12)

    class Embeddings(nn.Cell):
        def __init__(self):
            super().__init__()
            self.word_embeddings, self.position_embeddings = nn.Embedding(WORDS, WIDTH), nn.Embedding(40, WIDTH)
            self.token_type_embeddings, self.LayerNorm = nn.Embedding(2, WIDTH), norm()

        def construct(self, ids):
            places = self.position_embeddings(ops.arange(ids.shape[1]))
            return self.LayerNorm(self.word_embeddings(ids) + places + self.token_type_embeddings(ops.zeros_like(ids)))

    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.dense = (nn.Dense(WIDTH, WIDTH) for _ in range(4))
            self.LayerNorm, self.num_heads = norm(), HEADS

        def split(self, x):
            return x.reshape((x.shape[0], x.shape[1], self.num_heads, -1)).swapaxes(1, 2)

        def construct(self, x):
            q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
            scores = ops.matmul(q, k.swapaxes(2, 3)) * (WIDTH // HEADS) ** -0.5
            mixed = ops.matmul(ops.softmax(scores, -1), v).swapaxes(1, 2).reshape(x.shape)
            return self.LayerNorm(self.dense(mixed) + x)

    class Layer(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention, self.wide = Attention(), nn.Dense(WIDTH, 48)
            self.dense, self.LayerNorm = nn.Dense(48, WIDTH), norm()

        def construct(self, x):
            x = self.attention(x)
            return self.LayerNorm(self.dense(ops.gelu(self.wide(x), approximate="none")) + x)

    class Bert(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embeddings = Embeddings()
            self.layer = nn.CellList([Layer(), Layer()])

        def construct(self, ids):
            x = self.embeddings(ids)
            for layer in self.layer:
                x = layer(x)
            return x

    return Bert()


def llama():
    return transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=FEW, vocab_size=WORDS, max_position_embeddings=40,
        )
    )  # fmt: skip


def bert():
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=WORDS,
        max_position_embeddings=40,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


RENAMED = (("encoder.", ""), ("attention.self.", "attention."), ("output.", ""), ("intermediate.dense", "wide"))
PAIRS = {"llama": (llama, llama_cell, "rotary_emb"), "bert": (bert, bert_cell, "embeddings.position_embeddings")}


@pytest.fixture
def kit():
    yield kits.make("mindspore")
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(params=PAIRS)
def pair(request, kit, tmp_path):
    """A cell with a Hugging Face model's weights, that model's outputs under PEFT's prefix, and the prefix's folder."""
    theirs, cell, places = PAIRS[request.param]
    torch.manual_seed(0)
    model = theirs().eval()
    net = cell()
    values = {}
    for name, parameter in model.named_parameters():
        for there, here in RENAMED:
            name = name.replace(there, here)
        values[name] = parameter.detach()
    for name, parameter in net.parameters_and_names():
        for here, there in (("embedding_table", "weight"), ("gamma", "weight"), ("beta", "bias")):
            name = name.removesuffix(here) + there if name.endswith(f".{here}") else name
        parameter.set_data(ms.Tensor(values.pop(name).numpy()))
    assert not values
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=TOKENS)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        want = wrapped(input_ids=torch.from_numpy(IDS)).last_hidden_state.numpy()
    return net.set_train(False), want, tmp_path / "peft", places


def outputs(net):
    return net(ms.Tensor(IDS, ms.int32)).asnumpy()


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_pefts_prefix_gives_the_cell_pefts_outputs(kit, pair, mode):
    net, want, folder, _ = pair
    y0 = outputs(net)
    ms.set_context(mode=mode)
    kit.slim.load_delta(net, folder)  # the names tell where the positions are
    np.testing.assert_allclose(outputs(net), want, atol=1e-5)  # the contract's float32 bound
    kit.slim.remove_delta(net)
    np.testing.assert_allclose(outputs(net), y0, atol=1e-6)


def test_positions_can_be_left_alone_and_a_bundle_remembers_them(kit, pair, tmp_path):
    net, want, folder, places = pair
    kit.slim.load_delta(net, folder, positions=[])
    unshifted = outputs(net)
    assert np.abs(unshifted - want).max() > 1e-3
    kit.slim.save_delta(net, tmp_path / "still")
    kit.slim.remove_delta(net)
    kit.slim.load_delta(net, folder, positions=[places])
    kit.slim.save_delta(net, tmp_path / "moved")
    kit.slim.remove_delta(net)
    for name, expected in (("still", unshifted), ("moved", want)):
        kit.slim.load_delta(net, tmp_path / name)
        np.testing.assert_allclose(outputs(net), expected, atol=1e-5)
        kit.slim.remove_delta(net)
