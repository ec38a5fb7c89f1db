"""Generation with every cache and strategy, against greedy search by hand that computes the whole sequence anew."""

import copy
import inspect

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, pipeline
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from hf_stable import SigmaTransformerConfig, SigmaTransformerForConditionalGeneration
from hf_stable.keywords import CACHE

from .models import disturbed, stable_gpt, tokens

NEW = 12
FP8 = "fp8" in inspect.getsource(QuantizedCache)  # the one backend that needs no other package, since 5.2x


def gpt(**settings):
    return stable_gpt(**{"pad_token_id": 0, **settings})


def translator(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0}  # fmt: skip
    model = disturbed(SigmaTransformerForConditionalGeneration(SigmaTransformerConfig(**{**sizes, **settings})).eval())
    with torch.no_grad():  # next tokens that depend on more than the last one
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


FAMILIES = {
    "gpt": gpt,
    "gpt, sigma": lambda: gpt(reparam="sigma", norm="none", attention="dot", qkv="joint"),
    "gpt, l2": lambda: gpt(attention="l2_tied"),
    "translator": translator,
    "translator, l2": lambda: translator(residual="pre-ln", reparam="none", norm="stable", attention="l2_tied"),
    "translator, stable": lambda: translator(attention="stable", init="stable", max_position_embeddings=64),
}
every_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=list(FAMILIES))


def sources() -> torch.Tensor:
    return tokens(2, 7)


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Without a cache: of ids, or for a translator, whose source is `sources()`, of what it wrote so far."""
    if model.config.is_encoder_decoder:
        return model(sources(), decoder_input_ids=ids, use_cache=False).logits
    return model(ids, use_cache=False).logits


def start(model) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        return torch.full((2, 1), model.config.decoder_start_token_id)
    return sources()


def by_hand(model, new: int = NEW, rows: slice = slice(None)) -> torch.Tensor:
    ids = start(model)
    for _ in range(new):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert len(ids[:, 1:].unique()) > min(new, 8) // 2  # not one token over and over
    return ids[rows]


def generate(model, rows: slice = slice(None), new: int = NEW, **settings) -> torch.Tensor:
    given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": 1, **settings}
    return model.generate(sources()[rows], **given)


@every_family
@pytest.mark.parametrize("cache", [None, "dynamic", "static", "sliding_window", "offloaded"])
def test_tokens_are_the_same_with_every_cache(build, cache):
    if cache == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("an offloaded cache needs an accelerator")
    model = build()
    assert torch.equal(generate(model, cache_implementation=cache), by_hand(model))


@every_family
def test_without_a_cache_and_with_chunks_of_the_prompt(build):
    model = build()
    assert torch.equal(generate(model, use_cache=False), by_hand(model))
    if not model.config.is_encoder_decoder:
        assert torch.equal(generate(model, prefill_chunk_size=3), by_hand(model))


@every_family
def test_assisted_decoding_and_prompt_lookup(build):
    model, one = build(), slice(0, 1)
    expected = by_hand(model, rows=one)
    other = build()  # an assistant that is right now and then
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    twin = copy.deepcopy(model)
    assistances = [{"assistant_model": other}, {"assistant_model": twin}]
    if CACHE == "cache":  # BART's and GPT-2's tokens by prompt lookup are no greedy search's in transformers 5.10
        assistances.append({"prompt_lookup_num_tokens": 3})
    for assistance in assistances:
        assert torch.equal(generate(model, one, **assistance), expected), assistance


@every_family
@torch.no_grad()
def test_beams_are_scored_as_without_a_cache(build):
    model = build()
    beams = {"num_beams": 4, "num_return_sequences": 2}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    found = [generate(model, use_cache=cached, **beams, **scores) for cached in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    static = generate(model, cache_implementation="static", **beams)
    assert torch.equal(static, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_by_both_names(build, name):
    """One call with a part of the sequence, then token by token, through the model with its head and without."""
    model = build()
    ids = by_hand(model, 6)
    source = {"input_ids": sources()} if model.config.is_encoder_decoder else {}
    key = "decoder_input_ids" if source else "input_ids"
    base, states = model.base_model, []
    cache, base_cache, logits = None, None, []
    for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
        outputs = model(**source, **{key: part, name: cache}, use_cache=True)
        hidden = base(**source, **{key: part, name: base_cache}, use_cache=True)
        cache, base_cache = outputs[CACHE], hidden[CACHE]
        logits.append(outputs.logits)
        states.append(hidden.last_hidden_state)
    assert cache is not None and cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(torch.cat(logits, 1), logits_of(model, ids), rtol=1e-4, atol=1e-4)
    whole = base(**source, **{key: ids}, use_cache=False)[0]
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=1e-4, atol=1e-4)


@every_family
def test_generation_goes_on_from_a_returned_cache(build):
    model = build()
    first = generate(model, new=5, return_dict_in_generate=True)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    given = {"input_ids": sources(), key: first.sequences, CACHE: first[CACHE]}
    if model.config.is_encoder_decoder:  # from which generate knows that the sequence is the whole one, BART's too
        given["decoder_attention_mask"] = torch.ones_like(first.sequences)
    again = model.generate(**given, max_new_tokens=NEW - 5, min_new_tokens=NEW - 5, do_sample=False, num_beams=1)
    assert torch.equal(again, by_hand(model))


@every_family
def test_a_cache_of_ones_own(build):
    """A plain one serves a translator too; static ones, and one whose sliding window is longer than the sequence."""
    model = build()
    own = {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=32),
        "window": DynamicCache(config=MistralConfig(sliding_window=32, num_hidden_layers=2)),
    }
    if model.config.is_encoder_decoder:
        own["pair"] = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    for name, cache in own.items():
        assert torch.equal(generate(model, **{CACHE: cache}), by_hand(model)), name


@every_family
@pytest.mark.parametrize("static", [False, True])
def test_a_window_that_would_drop_tokens_is_refused(build, static):
    model, config = build(), MistralConfig(sliding_window=8, num_hidden_layers=2)
    cache = StaticCache(config=config, max_cache_len=32) if static else DynamicCache(config=config)
    with pytest.raises(ValueError, match="a sequence of 9 tokens: the cache's sliding window keeps 8, and"):
        generate(model, **{CACHE: cache})


@pytest.mark.skipif(not FP8, reason="this transformers has no quantised cache that needs no other package")
@pytest.mark.parametrize("build", [gpt, translator])
@torch.no_grad()
def test_a_quantised_cache_rounds_and_no_more(build):
    """Logits a few percent off the exact ones, after a prompt of which nothing is lost."""
    model = build()
    ids, cache = by_hand(model), QuantizedCache("fp8", model.config)
    source = {"input_ids": sources()} if model.config.is_encoder_decoder else {}
    key = "decoder_input_ids" if source else "input_ids"
    parts = (ids[:, :4], *ids[:, 4:].split(1, dim=1))
    logits = [model(**source, **{key: part, CACHE: cache}, use_cache=True).logits for part in parts]
    exact = logits_of(model, ids)
    assert cache.get_seq_length() == ids.shape[1]
    off = (torch.cat(logits, 1) - exact).norm() / exact.norm()
    assert 1e-5 < off < 0.1
    if not source:
        generated = generate(model, cache_implementation="quantized", cache_config={"backend": "fp8"})
        assert generated.shape == ids.shape and (generated == ids).float().mean() > 0.5


@torch.no_grad()
def test_training_with_checkpointing_fills_no_cache_twice():
    model, ids = gpt().train(), tokens(2, 6)
    model.gradient_checkpointing_enable()
    assert torch.equal(generate(model), by_hand(model.eval()))
    cache = DynamicCache(config=model.config)
    with torch.enable_grad(), pytest.raises(ValueError, match="a cache under gradient checkpointing: allowed is none"):
        model.train()(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_compiled_generation():
    model = gpt()
    expected = by_hand(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generate(model, cache_implementation="static"), expected)


def test_a_pipeline_writes_what_greedy_search_does(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 99)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    model = gpt()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [" ".join(f"w{i}" for i in row) for row in sources().tolist()]
    loaded = pipeline("text-generation", str(tmp_path))
    settings = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for batch_size in (1, 2):
        found = loaded(texts, generation_config=settings, batch_size=batch_size, return_tensors=True)
        assert [f[0]["generated_token_ids"] for f in found] == by_hand(model).tolist()
