"""Prefix and prompt in front of Hugging Face models: encoder-decoder models as in PEFT, generation, and other versions.

Every test here but those with PEFT also runs under the oldest and the newest version of transformers that setup.cfg
allows: `make hf-range`.
"""

import inspect

import pytest

import slimkit
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.delta import library

import torch
from torch import nn

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0
CALL = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4].clone()}
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2}


def t5(layers=2, decoder=None):
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_decoder_layers=decoder or layers,
        num_heads=4, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **ENDS,
        forced_eos_token_id=1,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def pegasus():
    config = transformers.PegasusConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **ENDS,
    )  # fmt: skip
    return transformers.PegasusForConditionalGeneration(config)  # takes its decoder's tokens and makes none of them


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def opt():
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, init_std=0.3,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


MODELS = {"t5": t5, "t5 of three": lambda: t5(3), "t5 uneven": lambda: t5(1, 2), "bart": bart, "pegasus": pegasus}
DECODERS = {"llama": llama, "gpt2": gpt2, "opt": opt}
KINDS = [("prefix", {"prefix_token_num": 3}), ("prompt", {"num_virtual_tokens": 3})]


def build(make):
    torch.manual_seed(5)
    return make().eval()


def stir(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def logits(model, **more):
    return model(**CALL, **more).logits


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_encoder_decoder_models_reach_peft_and_back(name, kind, options, tmp_path):
    peft = pytest.importorskip("peft")
    ours = build(MODELS[name])
    y0 = logits(ours)
    slimkit.apply_delta(ours, kind, **options)
    stir(ours)
    y1 = logits(ours)
    assert (y1 - y0).abs().max() > 1e-3
    slimkit.save_delta(ours, tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(build(MODELS[name]), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), y1, rtol=1e-5, atol=1e-5)  # float32, the same cache
    for number in (1, 2):
        again = build(MODELS[name])
        slimkit.load_delta(again, tmp_path / "peft")
        torch.testing.assert_close(logits(again), y1, rtol=1e-5, atol=1e-5)
        slimkit.save_delta(again, tmp_path / "peft", format="peft")
        assert number
    with slimkit.disable_delta(ours):
        assert torch.equal(logits(ours), y0)
    slimkit.remove_delta(ours)
    assert torch.equal(logits(ours), y0)


PEFTS = ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"]


@pytest.mark.parametrize("config", PEFTS)
@pytest.mark.parametrize("name", ["t5", "t5 of three", "bart", "pegasus"])
def test_peft_files_of_encoder_decoder_models(name, config, tmp_path):
    peft = pytest.importorskip("peft")
    made = getattr(peft, config)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    stir(peft.get_peft_model(build(MODELS[name]), made)).save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(build(MODELS[name]), tmp_path / "theirs").eval()
    ours = build(MODELS[name])
    report = slimkit.load_delta(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    # What PEFT itself reads nowhere is said.
    assert bool(report.notes) == (config != "PrefixTuningConfig" or name != "t5 of three")
    slimkit.save_delta(ours, tmp_path / "bundle")
    again = build(MODELS[name])
    slimkit.load_delta(again, tmp_path / "bundle")
    assert torch.equal(logits(again), logits(ours))


def test_prefixes_that_peft_has_no_place_for_are_refused(tmp_path):
    ours = build(bart)
    slimkit.apply_delta(ours, "prefix", ["*encoder.layers*self_attn", "*decoder.layers*self_attn"], prefix_token_num=2)
    with pytest.raises(UnsupportedError, match="decoder's own tokens"):
        slimkit.save_delta(ours, tmp_path / "d", format="peft")
    ours = build(llama)
    slimkit.apply_delta(ours, "prefix", ["*layers.0*"], prefix_token_num=2)
    with pytest.raises(UnsupportedError, match="all 2"):
        slimkit.save_delta(ours, tmp_path / "d", format="peft")
    assert not (tmp_path / "d").exists()
    small, large = build(lambda: t5(1)), build(lambda: t5(1, 3))
    slimkit.apply_delta(small, "prefix", prefix_token_num=2)
    slimkit.save_delta(small, tmp_path / "d", format="peft")
    y0 = logits(large)
    with pytest.raises(FileFormatError, match="3 layers"):
        slimkit.load_delta(large, tmp_path / "d")
    assert torch.equal(logits(large), y0)


ASK = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_encoder_decoder_models(name, kind, options):
    model = build(MODELS[name])
    slimkit.apply_delta(model, kind, **options)
    stir(model)
    said = [model.generate(input_ids=IDS, attention_mask=MASK, use_cache=c, **ASK) for c in (True, False)]
    assert said[0].tolist() == said[1].tolist()
    model.generate(input_ids=IDS, attention_mask=MASK, num_beams=2, **ASK)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_and_without_a_cache_says_the_same(name, kind, options):
    model = build(DECODERS[name])
    slimkit.apply_delta(model, kind, **options)
    stir(model)
    lengths = []

    def note(module, args, kwargs):
        lengths.append(library.cached_tokens(library.given(module, args, kwargs)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    cached = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **ASK)
    handle.remove()
    first = IDS.shape[1]  # between runs what stands in front is no token of the text
    assert lengths == [0, *range(first, first + len(lengths) - 1)]
    fresh = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **ASK)
    assert cached.tolist() == fresh.tolist()


def test_a_text_in_front_is_what_prefix_and_prompt_start_from():
    """A prefix or prompt started from a text says what the text itself says, positions included."""
    for make in DECODERS.values():
        text = [5, 9, 11]
        with torch.no_grad():
            want = build(make)(torch.cat((torch.tensor([text] * 2), IDS), 1)).logits[:, 3:]
        for kind in ("prefix", "prompt"):
            model = build(make)
            slimkit.apply_delta(model, kind, text_ids=text)
            got = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Renamed(nn.Module):
    """A model of some later version of the library: its cache has a name that nobody has heard of."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 8)
        self.config = transformers.PretrainedConfig()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, inputs_embeds=None, earlier=None, use_cache=None):
        return self.words(input_ids) if inputs_embeds is None else inputs_embeds


class BertLike(nn.Module):
    """Embeddings like BERT's whose count of earlier tokens was renamed."""

    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, seen_before=0):
        return input_ids


def test_an_argument_of_an_unknown_name_is_an_error():
    model = Renamed()
    with pytest.raises(UnsupportedError, match=r"past_key_values or cache.*earlier"):
        slimkit.apply_delta(model, "prompt", num_virtual_tokens=2)
    assert not model._forward_pre_hooks
    assert len(list(model.modules())) == 2
    from slimkit.delta.positions import counting

    with pytest.raises(UnsupportedError, match=r"cache_length.*seen_before"):
        counting(nn.Sequential(BertLike()), 2, None)


def test_arguments_are_bound_by_place_and_by_name():
    model = build(llama)
    takes = list(inspect.signature(type(model).forward).parameters)[1:]
    assert takes[:2] == ["input_ids", "attention_mask"]
    slimkit.apply_delta(model, "prompt", num_virtual_tokens=2)
    with torch.no_grad():
        by_place = model(IDS, torch.ones_like(IDS)).logits
        by_name = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(by_place, by_name)
    with pytest.raises(UnsupportedError, match="shape"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 7, 7))


@pytest.mark.parametrize("cached", [False, True])
def test_positions_that_are_counted_from_the_mask_are_counted_so_behind_a_prefix(cached, tmp_path):
    peft = pytest.importorskip("peft")

    def opt():
        torch.manual_seed(0)
        config = transformers.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )  # fmt: skip
        return transformers.OPTForCausalLM(config).eval()

    net = opt()
    slimkit.apply_delta(net, "prefix", prefix_token_num=3)
    theirs = peft.PeftModel.from_pretrained(opt(), slimkit.save_delta(net, tmp_path, format="peft")).eval()
    mask = MASK.flip(1)  # padded on the left
    with torch.no_grad():
        want = theirs(input_ids=IDS, attention_mask=mask).logits
        if cached:
            first = net(input_ids=IDS[:, :6], attention_mask=mask[:, :6], use_cache=True)
            held = {library.named(net, library.CACHE): first[1] if isinstance(first, tuple) else first.past_key_values}
            got = net(input_ids=IDS[:, 6:], attention_mask=mask, **held).logits
            want, mask = want[:, 6:], mask[:, 6:]
        else:
            got = net(input_ids=IDS, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("caches", [False, True])
def test_a_padded_batch_generates_behind_a_prompt_as_in_peft(caches, tmp_path):
    peft = pytest.importorskip("peft")

    def llama():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    net = llama()
    slimkit.apply_delta(net, "prompt", num_virtual_tokens=3)
    theirs = peft.PeftModel.from_pretrained(llama(), slimkit.save_delta(net, tmp_path, format="peft")).eval()
    call = {"input_ids": IDS, "attention_mask": MASK.flip(1), "max_new_tokens": 5, "do_sample": False}
    call |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    want, got = theirs.generate(**call), net.generate(**call, use_cache=caches)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.allclose(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4)
