"""The delta layers of the documents: formulas, shapes, names, starts and exceptions, the same in both frameworks."""

import numpy as np
import pytest

RTOL = 2e-5  # float32, sums of at most 16 terms


def floats(kit):
    return kit.torch if kit.name == "torch" else kit.ms


def randomise(kit, layer, rng, scale=0.4):
    for parameter in kit.params(layer).values():
        kit.assign(parameter, (rng.standard_normal(tuple(parameter.shape)) * scale).astype(np.float32))
    return layer


def values(kit, layer):
    """Path below the layer -> values; MindSpore's own names are the paths too."""
    if kit.name == "torch":
        return {n: kit.array(p) for n, p in layer.named_parameters()}
    return {n: kit.array(p) for n, p in layer.parameters_and_names()}


def gradients(kit, layer, call):
    """Path -> gradient of sum(call() ** 2)."""
    if kit.name == "torch":
        layer.zero_grad()
        (call() ** 2).sum().backward()
        return {n: kit.array(p.grad) for n, p in layer.named_parameters() if p.requires_grad}

    def loss():
        return (call() ** 2).sum()

    params = [p for _, p in layer.parameters_and_names() if p.requires_grad]
    names = [n for n, p in layer.parameters_and_names() if p.requires_grad]
    return {n: kit.array(g) for n, g in zip(names, kit.ms.grad(loss, None, kit.ms.ParameterTuple(params))())}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 3, 6)).astype(np.float32)


def test_lora_dense_computes_its_formula(kit, rng, x):
    layer = kit.slim.LoRADense(6, 4, lora_rank=2, lora_alpha=5, activation="relu", compute_dtype=floats(kit).float32)
    randomise(kit, layer, rng)
    v = values(kit, layer)
    want = x @ v["weight"].T + v["bias"] + 5 / 2 * (x @ v["mindpet_delta_lora_a"].T) @ v["mindpet_delta_lora_b"].T
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), np.maximum(want, 0), rtol=RTOL, atol=1e-5)


def test_lora_dense_starts_as_its_dense_half(kit, x):
    layer = kit.slim.LoRADense(6, 4, 2, 16, compute_dtype=floats(kit).float32)
    v = values(kit, layer)
    assert v["mindpet_delta_lora_a"].shape == (2, 6)
    assert v["mindpet_delta_lora_b"].shape == (4, 2)
    assert np.abs(v["mindpet_delta_lora_b"]).max() == 0
    bound = 1 / np.sqrt(6)  # He-uniform with slope sqrt(5)
    assert 0 < np.abs(v["mindpet_delta_lora_a"]).max() <= bound + 1e-6
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), x @ v["weight"].T + v["bias"], rtol=RTOL, atol=1e-6)


def test_lora_dense_without_bias(kit, rng, x):
    layer = randomise(kit, kit.slim.LoRADense(6, 4, 2, 2, has_bias=False), rng)
    assert "bias" not in values(kit, layer)
    assert kit.array(layer(kit.tensor(x))).shape == (2, 3, 4)


def test_half_precision_computes_in_half_and_returns_the_inputs_dtype(kit, rng, x):
    layer = kit.slim.LoRADense(6, 4, 2, 4, compute_dtype=floats(kit).float16)
    randomise(kit, layer, rng)
    v = values(kit, layer)
    out = kit.array(layer(kit.tensor(x)))
    assert out.dtype == np.float32
    want = x @ v["weight"].T + v["bias"] + 2 * (x @ v["mindpet_delta_lora_a"].T) @ v["mindpet_delta_lora_b"].T
    np.testing.assert_allclose(out, want, atol=2e-2)  # float16 keeps three digits
    assert np.abs(out - want).max() > 1e-6  # and it really was half precision


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_parameters_take_the_asked_dtype(kit, kind):
    layer = kit.slim.LoRADense(6, 4, 2, 4, param_init_type=getattr(floats(kit), kind))
    assert values(kit, layer)["mindpet_delta_lora_a"].dtype == np.dtype(kind)
    layer = kit.slim.AdapterLayer(4, 2, param_init_type=getattr(floats(kit), kind))
    assert all(v.dtype == np.dtype(kind) for v in values(kit, layer).values())


LORA_ERRORS = [
    ({"in_channels": 1.0}, TypeError),
    ({"in_channels": True}, TypeError),
    ({"out_channels": "4"}, TypeError),
    ({"lora_rank": 2.0}, TypeError),
    ({"in_channels": 0}, ValueError),
    ({"out_channels": -1}, ValueError),
    ({"lora_rank": 0}, ValueError),
    ({"lora_alpha": "2"}, TypeError),
    ({"lora_alpha": True}, TypeError),
    ({"lora_alpha": 0}, ValueError),
    ({"lora_alpha": float("nan")}, ValueError),
    ({"lora_dropout": 0}, TypeError),
    ({"lora_dropout": 1.0}, ValueError),
    ({"lora_dropout": -0.1}, ValueError),
    ({"has_bias": 1}, TypeError),
    ({"activation": 3}, TypeError),
    ({"activation": "rellu"}, KeyError),
    ({"param_init_type": "float32"}, TypeError),
    ({"param_init_type": None}, TypeError),
    ({"compute_dtype": int}, TypeError),
    ({"weight_init": []}, TypeError),
    ({"weight_init": "nrmal"}, ValueError),
    ({"bias_init": True}, TypeError),
    ({"lora_a_init": (6, 2)}, ValueError),
    ({"lora_b_init": (2, 4)}, ValueError),
    ({"weight_init": (6, 4)}, ValueError),
    ({"weight_init": (24,)}, ValueError),
    ({"bias_init": (5,)}, ValueError),
]


def made(kit, arguments):
    """Shapes stand for tensors of ones."""
    return {k: kit.tensor(np.ones(v, np.float32)) if isinstance(v, tuple) else v for k, v in arguments.items()}


@pytest.mark.parametrize(("wrong", "error"), LORA_ERRORS)
def test_lora_dense_exceptions(kit, wrong, error):
    arguments = {"in_channels": 6, "out_channels": 4, "lora_rank": 2, "lora_alpha": 2, **made(kit, wrong)}
    with pytest.raises(error) as caught:
        kit.slim.LoRADense(**arguments)
    assert isinstance(caught.value, kit.slim.SlimkitError)
    assert next(iter(wrong)) in str(caught.value)


def test_initial_tensors_and_numbers_are_taken(kit, rng):
    a, b = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)
    layer = kit.slim.LoRADense(
        6, 4, 2, 2, lora_a_init=kit.tensor(a), lora_b_init=kit.tensor(b), weight_init="ones", bias_init=0.5
    )
    v = values(kit, layer)
    np.testing.assert_array_equal(v["mindpet_delta_lora_a"], a)
    np.testing.assert_array_equal(v["mindpet_delta_lora_b"], b)
    assert (v["weight"] == 1).all()
    assert (v["bias"] == 0.5).all()


BLOCK = "mindpet_delta_adapter_block.mindpet_delta_adapter_"


def adapter_by_hand(v, h, prefix=""):
    low = gelu(h @ v[f"{prefix}{BLOCK}down_sampler.weight"].T + v[f"{prefix}{BLOCK}down_sampler.bias"])
    return h + low @ v[f"{prefix}{BLOCK}up_sampler.weight"].T + v[f"{prefix}{BLOCK}up_sampler.bias"]


def test_adapter_layer_computes_its_formula_and_starts_as_the_identity(kit, rng, x):
    layer = kit.slim.AdapterLayer(6, bottleneck_size=3, compute_dtype=floats(kit).float32)
    np.testing.assert_array_equal(kit.array(layer(kit.tensor(x))), x)
    v = values(kit, randomise(kit, layer, rng))
    assert v[f"{BLOCK}down_sampler.weight"].shape == (3, 6)
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), adapter_by_hand(v, x), rtol=RTOL, atol=1e-5)


def test_adapter_dense_computes_its_formula(kit, rng, x):
    layer = kit.slim.AdapterDense(6, 4, activation="tanh", bottleneck_size=3, compute_dtype=floats(kit).float32)
    v = values(kit, randomise(kit, layer, rng))
    hidden = np.tanh(x @ v["weight"].T + v["bias"])
    want = adapter_by_hand(v, hidden, "mindpet_delta_adapter.")
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), want, rtol=RTOL, atol=1e-5)


LEFT = "mindpet_delta_low_rank_adapter_weight_left"
RIGHT = "mindpet_delta_low_rank_adapter_weight_right"


def low_rank_by_hand(v, h, prefix=""):
    down, up = (f"{prefix}mindpet_delta_low_rank_adapter_{side}_sampler." for side in ("down", "up"))
    low = gelu(h @ (v[down + LEFT] @ v[down + RIGHT]) + v[down + "bias"])
    return h + low @ (v[up + LEFT] @ v[up + RIGHT]) + v[up + "bias"]


def test_low_rank_adapter_layer_computes_its_formula_and_starts_as_the_identity(kit, rng, x):
    layer = kit.slim.LowRankAdapterLayer(6, reduction_factor=2, low_rank_size=2, compute_dtype=floats(kit).float32)
    np.testing.assert_array_equal(kit.array(layer(kit.tensor(x))), x)
    v = values(kit, randomise(kit, layer, rng))
    assert v[f"mindpet_delta_low_rank_adapter_down_sampler.{LEFT}"].shape == (6, 2)
    assert v[f"mindpet_delta_low_rank_adapter_down_sampler.{RIGHT}"].shape == (2, 3)
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), low_rank_by_hand(v, x), rtol=RTOL, atol=2e-5)


def test_low_rank_adapter_dense_computes_its_formula(kit, rng, x):
    layer = kit.slim.LowRankAdapterDense(6, 4, reduction_factor=2, compute_dtype=floats(kit).float32)
    v = values(kit, randomise(kit, layer, rng))
    want = low_rank_by_hand(v, x @ v["weight"].T + v["bias"], "mindpet_delta_low_rank_adapter.")
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), want, rtol=RTOL, atol=2e-5)


ADAPTER_ERRORS = [
    ("AdapterLayer", {"hidden_size": 6}, {"hidden_size": 6.0}, TypeError),
    ("AdapterLayer", {"hidden_size": 6}, {"hidden_size": 0}, ValueError),
    ("AdapterLayer", {"hidden_size": 6}, {"bottleneck_size": "2"}, TypeError),
    ("AdapterLayer", {"hidden_size": 6}, {"bottleneck_size": -1}, ValueError),
    ("AdapterLayer", {"hidden_size": 6}, {"non_linearity": 1}, TypeError),
    ("AdapterLayer", {"hidden_size": 6}, {"non_linearity": "gelo"}, ValueError),
    ("AdapterLayer", {"hidden_size": 6}, {"param_init_type": 3}, TypeError),
    ("AdapterLayer", {"hidden_size": 6}, {"compute_dtype": "half"}, TypeError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"in_channels": 1.5}, TypeError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"out_channels": 0}, ValueError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"bottleneck_size": 0}, ValueError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"bottleneck_size": 0}, TypeError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"has_bias": 0}, TypeError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"activation": 1}, TypeError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"activation": "nope"}, KeyError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"non_linearity": "nope"}, ValueError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"weight_init": "nope"}, ValueError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"weight_init": (4, 5)}, ValueError),
    ("AdapterDense", {"in_channels": 6, "out_channels": 4}, {"bias_init": (4, 1)}, ValueError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"hidden_size": "6"}, TypeError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"reduction_factor": 1.0}, TypeError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"reduction_factor": 7}, ValueError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"low_rank_size": 0}, ValueError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"low_rank_w_init": 3}, TypeError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"low_rank_w_init": (6, 1)}, TypeError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"low_rank_w_init": "xavier"}, ValueError),
    ("LowRankAdapterLayer", {"hidden_size": 6, "reduction_factor": 2}, {"non_linearity": None}, TypeError),
    ("LowRankAdapterDense", {"in_channels": 6, "out_channels": 4}, {"reduction_factor": 5}, ValueError),
    ("LowRankAdapterDense", {"in_channels": 6, "out_channels": 4}, {"activation": "nope"}, KeyError),
    ("LowRankAdapterDense", {"in_channels": 6, "out_channels": 4}, {"low_rank_size": True}, TypeError),
    ("PrefixLayer", {}, {"prefix_token_num": 0}, TypeError),
    ("PrefixLayer", {}, {"batch_size": 1.0}, TypeError),
    ("PrefixLayer", {}, {"num_heads": -2}, TypeError),
    ("PrefixLayer", {}, {"hidden_dim": "8"}, TypeError),
    ("PrefixLayer", {}, {"embed_dim": None}, TypeError),
    ("PrefixLayer", {}, {"mid_dim": False}, TypeError),
    ("PrefixLayer", {}, {"prefix_token_num": 5}, ValueError),
    ("PrefixLayer", {}, {"dropout_rate": 1.0}, ValueError),
    ("PrefixLayer", {}, {"dropout_rate": -0.5}, ValueError),
    ("PromptTuning", {"num_virtual_tokens": 2, "token_dim": 4}, {"num_virtual_tokens": 0}, TypeError),
    ("PromptTuning", {"num_virtual_tokens": 2, "token_dim": 4}, {"token_dim": 4.0}, TypeError),
    ("PromptTuning", {"num_virtual_tokens": 2, "token_dim": 4}, {"num_transformer_submodules": "1"}, TypeError),
    ("PrefixEncoder", {}, {"pre_seq_len": 0}, TypeError),
    ("PrefixEncoder", {}, {"prefix_projection": 1}, TypeError),
    ("PrefixEncoder", {}, {"prefix_projection": True}, TypeError),
    ("PrefixEncoder", {}, {"dropout_prob": 1.5}, ValueError),
]
PREFIX = {"prefix_token_num": 4, "batch_size": 2, "num_heads": 2, "hidden_dim": 8, "embed_dim": 6, "mid_dim": 5}
ENCODER = {"pre_seq_len": 3, "num_layers": 2, "num_heads": 2, "kv_channels": 4}


@pytest.mark.parametrize(("layer", "right", "wrong", "error"), ADAPTER_ERRORS)
def test_exceptions_of_the_other_layers(kit, layer, right, wrong, error):
    right = {"PrefixLayer": PREFIX, "PrefixEncoder": ENCODER}.get(layer, right)
    with pytest.raises(error) as caught:
        getattr(kit.slim, layer)(**{**right, **made(kit, wrong)})
    assert isinstance(caught.value, kit.slim.SlimkitError)


def test_prefix_layer_trains_every_parameter_and_key_differs_from_value(kit):
    layer = kit.slim.PrefixLayer(**PREFIX, dropout_rate=0.0)
    key, value = layer()
    assert tuple(key.shape) == tuple(value.shape) == (4, 8)
    assert np.abs(kit.array(key) - kit.array(value)).max() > 1e-3
    np.testing.assert_array_equal(kit.array(layer.past_key_reparam), kit.array(key))
    np.testing.assert_array_equal(kit.array(layer.past_value_reparam), kit.array(value))
    found = gradients(kit, layer, lambda: layer()[0] * layer()[1])
    assert len(found) == 5
    assert all(np.abs(g).max() > 0 for g in found.values())
    before = kit.array(key)
    first = next(iter(kit.params(layer).values()))
    kit.assign(first, kit.array(first) + 1)
    assert np.abs(kit.array(layer()[0]) - before).max() > 1e-4  # computed anew, not in the constructor


def test_prefix_layer_dropout_only_in_training(kit):
    layer = kit.slim.PrefixLayer(**PREFIX, dropout_rate=0.5)
    kit.train_mode(layer, False)
    np.testing.assert_array_equal(kit.array(layer()[0]), kit.array(layer()[0]))
    kit.train_mode(layer, True)
    assert (kit.array(layer()[0]) == 0).any()


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_encoder_gives_keys_and_values_of_every_layer(kit, rng, projection):
    encoder = kit.slim.PrefixEncoder(**ENCODER, prefix_projection=projection, projection_dim=5)
    v = values(kit, randomise(kit, encoder, rng))
    pairs = encoder(2)
    assert [tuple(p.shape) for p in pairs] == [(2, 2, 2, 3, 4)] * 2
    table = next(a for n, a in v.items() if "embedding" in n)
    if projection:
        inner = np.tanh(
            table @ v["mindpet_delta_ptuning2_dense_in.weight"].T + v["mindpet_delta_ptuning2_dense_in.bias"]
        )
        out = "mindpet_delta_ptuning2_dense_out"
        table = inner @ v[f"{out}.weight"].T + v[f"{out}.bias"]
    want = table.reshape(3, 4, 2, 4)[:, 2 * 1 + 1].transpose(1, 0, 2)  # values of layer 1: (heads, tokens, channels)
    np.testing.assert_allclose(kit.array(pairs[1])[1, 0], want, rtol=RTOL, atol=1e-5)
    found = gradients(kit, encoder, lambda: encoder(2)[0].sum() * encoder(2)[1].sum())
    assert all(np.abs(g).max() > 0 for g in found.values())


def test_prompt_tuning_looks_its_tokens_up(kit):
    layer = kit.slim.PromptTuning(3, 8, 2)
    (table,) = values(kit, layer).values()
    assert table.shape == (6, 8)
    ids = np.array([[0, 5, 2], [1, 1, 4]], np.int32)
    np.testing.assert_array_equal(kit.array(layer(kit.tensor(ids))), table[ids])


@pytest.mark.parametrize(
    "layer", ["PrefixLayer", "PrefixEncoder", "PromptTuning", "AdapterLayer", "LowRankAdapterLayer"]
)
def test_every_layer_is_found_by_its_freezing_mode(kit, layer):
    made_with = {
        "PrefixLayer": (PREFIX, "prefix"),
        "PrefixEncoder": (ENCODER, "ptuning2"),
        "PromptTuning": ({"num_virtual_tokens": 2, "token_dim": 4}, "prompttuning"),
        "AdapterLayer": ({"hidden_size": 4}, "Adapter"),
        "LowRankAdapterLayer": ({"hidden_size": 4, "reduction_factor": 2}, "low_rank_adapter"),
    }
    arguments, mode = made_with[layer]
    net = kit.named(dense=kit.linear(2, 2), delta=getattr(kit.slim, layer)(**arguments))
    kit.slim.freeze_delta(net, mode)
    names = {n for n, p in kit.params(net).items() if kit.trains(p)}
    assert names == {n for n in kit.params(net) if n.startswith("delta.")}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("alpha", [4, 0.5])
def test_rdrop_loss_by_hand(kit, rng, alpha):
    logits = rng.standard_normal((6, 5)).astype(np.float32)
    labels = np.repeat(rng.integers(0, 5, 3), 2).astype(np.int32)
    p = softmax(logits.astype(np.float64))
    cross = -np.log(p[np.arange(6), labels]).mean()
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)
    apart = (kl(p[0::2], p[1::2]) + kl(p[1::2], p[0::2])).mean()
    loss = kit.slim.RDropLoss()
    got = float(kit.array(loss(kit.tensor(logits), kit.tensor(labels), alpha)))
    assert got == pytest.approx(cross + alpha / 4 * apart, rel=1e-5)
    soft = np.eye(5, dtype=np.float32)[labels]
    assert float(kit.array(loss(kit.tensor(logits), kit.tensor(soft), alpha))) == pytest.approx(got, rel=1e-5)


@pytest.mark.parametrize("ignored", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_rdrop_counts_no_row_that_is_labelled_so(kit, rng, ignored):
    logits = rng.standard_normal((6, 5)).astype(np.float32)
    labels = rng.integers(0, 5, 3).astype(np.int32)
    labels[list(ignored)] = -100
    labels = np.repeat(labels, 2)
    kept = labels != -100
    loss = kit.slim.RDropLoss()
    got = float(kit.array(loss(kit.tensor(logits), kit.tensor(labels), 4)))
    want = float(kit.array(loss(kit.tensor(logits[kept]), kit.tensor(labels[kept]), 4))) if kept.any() else 0.0
    assert got == pytest.approx(want, rel=1e-6)  # float32: the same terms, and zeros


def test_rdrop_rows_that_do_not_count_may_be_no_numbers(kit, rng):
    logits = rng.standard_normal((4, 3)).astype(np.float32)
    labels = np.array([0, 0, -100, -100], np.int32)
    logits[2], logits[3] = np.inf, np.nan
    loss, grads = rdrop_gradients(kit, logits, labels)
    want, some = rdrop_gradients(kit, logits[:2], labels[:2])
    assert loss == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(grads, np.concatenate((some, np.zeros((2, 3)))), rtol=1e-5)


def test_rdrop_of_a_class_that_is_masked_away_is_that_of_the_others(kit, rng):
    logits = rng.standard_normal((4, 3)).astype(np.float32)
    labels = np.array([0, 0, 1, 1], np.int32)
    logits[:, 2] = -np.inf
    loss, grads = rdrop_gradients(kit, logits, labels)
    want, some = rdrop_gradients(kit, logits[:, :2], labels)
    assert loss == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(grads, np.concatenate((some, np.zeros((4, 1))), 1), rtol=1e-5, atol=1e-7)


def rdrop_gradients(kit, logits, labels):
    x, y = kit.tensor(logits), kit.tensor(labels)
    if kit.name == "torch":
        loss = kit.slim.RDropLoss()(x.requires_grad_(), y)
        loss.backward()
        return float(loss), kit.array(x.grad)
    loss, grads = kit.ms.value_and_grad(lambda z: kit.slim.RDropLoss()(z, y, 4))(x)
    return float(loss), kit.array(grads)


def test_rdrop_labels_mean_classes_by_their_shape(kit, rng):
    logits = kit.tensor(rng.standard_normal((4, 4)).astype(np.float32))  # as many rows as classes
    loss = kit.slim.RDropLoss()
    with pytest.raises(TypeError, match="label_ids"):
        loss(logits, kit.tensor(np.array([1.0, 1.0, 2.0, 2.0], np.float32)))
    classes = np.array([1, 1, 2, 2], np.int32)
    hard, soft = (float(kit.array(loss(logits, kit.tensor(t)))) for t in (classes, np.eye(4, dtype=np.int32)[classes]))
    assert hard == pytest.approx(soft, rel=1e-6)
    try:
        wrong = float(kit.array(loss(logits, kit.tensor(np.array([1, 1, 4, 4], np.int32)))))
    except (IndexError, RuntimeError):  # torch says so
        return
    assert np.isnan(wrong)  # a compiled graph cannot


def test_rdrop_repeats_rows_in_place_and_agreeing_passes_cost_nothing(kit, rng):
    x = rng.standard_normal((3, 2)).astype(np.float32)
    doubled, ids = kit.slim.rdrop_repeat(kit.tensor(x), kit.tensor(np.array([1, 2, 3], np.int32)))
    np.testing.assert_array_equal(kit.array(doubled), np.repeat(x, 2, 0))
    np.testing.assert_array_equal(kit.array(ids), [1, 1, 2, 2, 3, 3])
    loss = kit.slim.RDropLoss()
    labels = kit.tensor(np.zeros(6, np.int32))
    assert float(kit.array(loss(doubled, labels))) == pytest.approx(
        float(kit.array(loss(doubled, labels, 0))), rel=1e-6
    )


@pytest.mark.parametrize("alpha", ["4", None, True])
def test_rdrop_alpha_must_be_a_number(kit, alpha):
    with pytest.raises(TypeError, match="alpha"):
        kit.slim.RDropLoss()(kit.tensor(np.zeros((2, 2), np.float32)), kit.tensor(np.zeros(2, np.int32)), alpha)


def test_rdrop_needs_pairs(kit):
    with pytest.raises(ValueError, match="even"):
        kit.slim.RDropLoss()(kit.tensor(np.zeros((3, 2), np.float32)), kit.tensor(np.zeros(3, np.int32)))


NAMES = (
    "relu gelu silu mish elu hswish fast_gelu leakyrelu tanh sigmoid logsigmoid softsign hsigmoid selu relu6 softmax"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_the_same_function_in_both_wings(kit, rng, name):
    x = rng.standard_normal((4, 6)).astype(np.float32)
    layer = kit.slim.LoRADense(6, 6, 1, 1, weight_init=kit.tensor(np.eye(6, dtype=np.float32)), activation=name,
                               compute_dtype=floats(kit).float32)  # fmt: skip
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    want = {
        "relu": np.maximum(x, 0),
        "gelu": gelu(x),
        "silu": x * sigmoid(x),
        "mish": x * np.tanh(np.log1p(np.exp(x))),
        "elu": np.where(x > 0, x, np.exp(x) - 1),
        "hswish": x * np.clip(x + 3, 0, 6) / 6,
        "fast_gelu": x * sigmoid(1.702 * x),
        "leakyrelu": np.where(x > 0, x, 0.2 * x),
        "tanh": np.tanh(x),
        "sigmoid": sigmoid(x),
        "logsigmoid": np.log(sigmoid(x)),
        "softsign": x / (1 + np.abs(x)),
        "hsigmoid": np.clip(x + 3, 0, 6) / 6,
        "selu": 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
        "relu6": np.clip(x, 0, 6),
        "softmax": softmax(x),
    }[name]
    # 1e-3: MindSpore's CPU kernels of a few of them approximate the exponential.
    np.testing.assert_allclose(kit.array(layer(kit.tensor(x))), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "word", ["XavierUniform", "xavier_uniform", "HeNormal", "heuniform", "TruncatedNormal", "ONES"]
)
def test_mindspores_names_of_initial_values_are_known_in_every_layer(kit, word):
    layers = {
        "lora": kit.slim.LoRADense(8, 6, lora_rank=2, lora_alpha=2, lora_a_init=word, weight_init=word),
        "adapter": kit.slim.AdapterDense(8, 6, bottleneck_size=2, weight_init=word),
        "low rank": kit.slim.LowRankAdapterDense(8, 6, reduction_factor=2, weight_init=word, low_rank_w_init=word),
    }
    for layer in layers.values():
        weight = values(kit, layer)["weight"]
        assert weight.any()
        if word == "ONES":
            assert (weight == 1).all()
        else:  # 48 draws: 0.01 for the truncated normal, the square root of 2 / (in + out) or 2 / in for the others
            assert 0.5 < weight.std() / {"T": 0.01, "X": 0.38, "x": 0.38}.get(word[0], 0.5) < 1.6


@pytest.mark.parametrize(
    ("word", "property_"), [("orthogonal", "rows"), ("Identity", "diagonal"), ("varianceScaling", "")]
)
def test_rarer_initial_values(kit, word, property_):
    weight = values(kit, kit.slim.LoRADense(8, 6, 2, 4, weight_init=word))["weight"]
    if property_ == "rows":
        np.testing.assert_allclose(weight @ weight.T, np.eye(6), atol=1e-5)  # float32
    elif property_ == "diagonal":
        np.testing.assert_array_equal(weight, np.eye(6, 8))
    else:
        assert 0.2 < weight.std() * np.sqrt(8) < 1.5  # 48 draws of variance 1 / inputs


def test_an_unknown_initial_value_is_refused_by_name(kit):
    with pytest.raises(ValueError, match="weight_init must be one of"):
        kit.slim.LoRADense(8, 6, 2, 4, weight_init="XavierUnifrom")


@pytest.mark.parametrize("wrong", [5, "two", ((2, 1, 1, 1),), ((0, 1),)])
def test_a_strategy_is_refused_also_where_the_layer_lacks_the_operator(kit, wrong):
    layer = kit.slim.LoRADense(8, 16, 2, 4, has_bias=False)
    with pytest.raises(Exception, match="strategy_activation"):
        layer.shard(strategy_activation=wrong)
    with pytest.raises(Exception, match="strategy_org_bias_add"):
        layer.shard(strategy_org_bias_add=wrong)
    layer.shard(strategy_activation=((1, 1),), strategy_org_bias_add=((1, 1), (1,)))
