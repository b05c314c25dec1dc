"""What stands in front of a text in the library's cache: turns, rollbacks, holders, pickles, other kernels."""

import io

import pytest
from test_delta_prefix_families import IDS, LEFT, base

import slimkit
from slimkit.core.errors import UnsupportedError

import torch
from torch import nn

KINDS = {"prefix": {"prefix_token_num": 3}, "prompt": {"num_virtual_tokens": 3}}
CELLS = [(kind, family) for kind in KINDS for family in ("Mistral", "Bloom", "GPTJ", "Llama")]  # Llama: in attention
ASK = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def fronted(kind, family):
    model = base(family)
    torch.manual_seed(5)
    slimkit.apply_delta(model, kind, **KINDS[kind])
    return model


@pytest.mark.parametrize(("kind", "family"), CELLS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_second_turn_goes_on_from_the_first_ones_cache(kind, family, padded):
    model = fronted(kind, family)
    first = {"attention_mask": LEFT} if padded else {}
    out = model.generate(input_ids=IDS, return_dict_in_generate=True, **first, **ASK)
    text = torch.cat((out.sequences, IDS[:, :4]), 1)
    second = {"attention_mask": torch.cat((LEFT, LEFT.new_ones(2, 10)), 1)} if padded else {}
    want = model.generate(input_ids=text, **second, **ASK)
    again = model.generate(input_ids=text, past_key_values=out.past_key_values, **second, **ASK)
    assert torch.equal(again, want)
    assert out.past_key_values.get_seq_length() == want.shape[1] - 1  # the last token was never read


@pytest.mark.parametrize(("kind", "family"), CELLS)
def test_steps_by_hand_and_tokens_that_are_taken_back(kind, family):
    model = fronted(kind, family)
    with torch.no_grad():
        want = model(IDS).logits[:, -11:]
        one = model(IDS[:, :6], use_cache=True)
        two = model(IDS[:, 6:9], past_key_values=one.past_key_values, use_cache=True)
        three = model(IDS[:, 9:], past_key_values=two.past_key_values, attention_mask=torch.ones_like(IDS))
    got = torch.cat((one.logits[:, -6:], two.logits, three.logits), 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)  # float32, other products
    text = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6, 7, 8, 5, 6]])
    guessed = model.generate(input_ids=text, prompt_lookup_num_tokens=3, **ASK)
    assert torch.equal(guessed, model.generate(input_ids=text, **ASK))


@pytest.mark.parametrize(("kind", "family"), CELLS)
def test_it_is_pickled_and_leaves_no_hook(kind, family):
    model = base(family)
    before = _hooks(model)
    torch.manual_seed(5)
    slimkit.apply_delta(model, kind, **KINDS[kind])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for one in (model, again):
        slimkit.remove_delta(one)
        assert _hooks(one) == before
        assert torch.equal(one(IDS).logits, base(family)(IDS).logits)


def _hooks(model):
    words = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
             "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return [(type(m), set(vars(m)), [len(vars(m)[word]) for word in words]) for m in model.modules()]


class Holder(nn.Module):
    def __init__(self, family):
        super().__init__()
        self.body, self.head = base(family), nn.Linear(64, 2)

    def forward(self, ids):
        return self.head(self.body(ids).logits)


@pytest.mark.parametrize("family", ["Mistral", "Bloom", "Llama"])
def test_a_bundle_opens_where_a_holder_brings_no_inputs(family, tmp_path):
    model, fresh = (Holder(family) for _ in range(2))
    fresh.head.load_state_dict(model.head.state_dict())
    plain = model(IDS)
    slimkit.apply_delta(model, "prefix", inputs=(IDS,), prefix_token_num=3)
    slimkit.save_delta(model, tmp_path / "bundle")
    slimkit.load_delta(fresh, tmp_path / "bundle")
    assert torch.equal(fresh(IDS), model(IDS))
    assert not torch.allclose(fresh(IDS), plain)


def test_a_kernel_that_passes_a_prefix_by_is_refused():
    model = fronted("prefix", "Llama")
    want = model(IDS).logits
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="did not run through scaled_dot_product_attention"):
        model(IDS)
    with slimkit.disable_delta(model):
        torch.testing.assert_close(model(IDS).logits, base("Llama")(IDS).logits)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, want)
