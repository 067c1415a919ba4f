"""Whatever is done to the slots, in whatever order, the logits are those of a plain forward pass over the text."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import llm_env.engines.transformers.engine as engine_module
from llm_env.engines import Sampling
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_tokenizer

from .conftest import AlphabetEngine, full_logits, make_engine_of, make_model


def assert_plain(logits, model, texts):
    assert logits.dtype == torch.float32
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, full_logits(model, text)[-1], atol=1e-4, rtol=1e-4)


def walk(model, num_slots, seed, num_moves=40, context=24):
    """Start, step, extend and stop random slots in random order; check every distribution that comes back."""
    rng = np.random.default_rng(seed)
    engine = make_engine_of(model, num_slots, context)
    texts = {}
    for _ in range(num_moves):
        move = rng.choice(["start", "step", "step", "step", "extend", "advance", "advance", "stop"])
        chosen = rng.permutation(num_slots)[: rng.integers(1, num_slots + 1)]
        if rng.random() < 0.4:
            chosen = np.arange(num_slots)
        if move == "start":
            prompts = [rng.integers(0, 100, rng.integers(1, 9)) for _ in chosen]
            if rng.random() < 0.5:  # the same prompt in several slots
                prompts = [prompts[i] for i in rng.integers(0, len(prompts), len(prompts))]
            texts.update({slot: prompt.tolist() for slot, prompt in zip(chosen, prompts, strict=True)})
            assert_plain(engine.start(chosen, prompts), model, [texts[slot] for slot in chosen])
        elif move == "advance":  # some texts go on, mostly by one token, while others begin
            begins = rng.random(num_slots) < 0.3
            old = np.array([s for s in texts if s in chosen and not begins[s] and len(texts[s]) + 4 <= context], int)
            fresh = np.array([slot for slot in chosen if begins[slot]], dtype=int)
            added = [rng.integers(0, 100, rng.choice([1, 1, 1, 4])) for _ in old]
            prompts = [rng.integers(0, 100, rng.integers(1, 9)) for _ in fresh]
            if len(fresh) and rng.random() < 0.5:
                prompts = [prompts[i] for i in rng.integers(0, len(prompts), len(prompts))]
            texts.update({slot: texts[slot] + tokens.tolist() for slot, tokens in zip(old, added, strict=True)})
            texts.update({slot: prompt.tolist() for slot, prompt in zip(fresh, prompts, strict=True)})
            logits = engine.advance(old, added, fresh, prompts)
            assert_plain(logits, model, [texts[slot] for slot in (*old, *fresh)])
        elif move == "stop":
            stopped = chosen[:1]
            engine.stop(stopped)
            texts.pop(stopped[0], None)
        else:
            most = 1 if move == "step" else 4
            chosen = [slot for slot in chosen if slot in texts and len(texts[slot]) + most <= context]
            added = [rng.integers(0, 100, rng.integers(1, most + 1)) for _ in chosen]
            for slot, tokens in zip(chosen, added, strict=True):
                texts[slot] = texts[slot] + tokens.tolist()
            logits = (
                engine.step(chosen, [tokens[0] for tokens in added]) if move == "step" else engine.extend(chosen, added)
            )
            assert_plain(logits, model, [texts[slot] for slot in chosen])
        assert engine.lengths.tolist() == [len(texts.get(slot, [])) for slot in range(num_slots)]


@pytest.mark.parametrize("num_slots", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gptj"])
def test_random_walk(family, num_slots):
    model = make_model(family)
    for seed in range(3):
        walk(model, num_slots, seed)


def test_random_walk_with_eager_attention():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    walk(model, 3, seed=0)
    assert model.config._attn_implementation == "eager"


def test_random_walk_with_small_batches(monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 10)
    walk(make_model("llama"), 5, seed=1)


def test_batches_hold_every_row_once_and_bound_the_padding():
    lengths = np.array([5, 1, 9, 30, 2, 2, 9, 1])
    batches = list(engine_module._batches(lengths, most=20))
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    assert [lengths[batch].tolist() for batch in batches] == [[1, 1, 2, 2], [5, 9], [9], [30]]
    (together,) = engine_module._batches(lengths, most=8 * 30)
    assert together.tolist() == list(range(8))


def test_a_pass_over_all_slots_does_not_copy_the_cache(monkeypatch):
    """Neither the last tokens of slots that are stepped, in any order, nor those beside a prompt, which is padded."""
    passes = []

    @contextlib.contextmanager
    def recorded(config, parts):
        passes.append([(size, part.slots, part.hidden.shape[2]) for size, part in parts])
        with packed(config, parts):
            yield

    packed = engine_module.packed
    monkeypatch.setattr(engine_module, "packed", recorded)
    engine = make_engine_of(make_model("llama"), num_slots=4)
    engine.start([0, 1, 3], [[5, 6], [7], [8]])
    engine.advance(np.array([3, 0, 1]), [[8], [9], [9, 9]], np.array([2]), [np.array([1, 2, 3, 4])])
    engine.step([2, 1, 3, 0], [8, 9, 8, 9])
    (_, behind), (step,) = passes[1:]
    assert passes[1][0] == step == (4, slice(0, 4), 1)
    assert behind == (4, slice(1, 3), 3)
    layer = engine._cache.slot_layers[0]
    with torch.inference_mode():
        keys, _ = layer.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    assert keys.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()


def test_a_model_whose_attention_has_a_bias_of_its_own_is_refused():
    engine = make_engine_of(make_model("llama"), num_slots=1)
    forward = engine.model.forward
    engine.model.forward = lambda **arguments: forward(**arguments, position_bias=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="a bias of its own"):
        engine.start([0], [[1]])


def test_a_slot_can_be_filled_to_the_last_token():
    model = make_model("gpt2")
    engine = make_engine_of(model, num_slots=2, context=4)
    logits = engine.start([0, 1], [[5, 6, 7, 8], [9]])
    assert_plain(logits, model, [[5, 6, 7, 8], [9]])
    with pytest.raises(ValueError, match="slot 0 holds 4 of at most 4 tokens: there is no room for 1 more"):
        engine.step([1, 0], [3, 3])
    with pytest.raises(ValueError, match="no room for 4 more"):
        engine.extend([1], [[1, 2, 3, 4]])
    assert_plain(engine.extend([1], [[1, 2, 3]]), model, [[9, 1, 2, 3]])


def test_mixed_lengths_in_one_extend_reach_the_context_without_harm():
    """Padding of the shorter row must not be written anywhere, least of all over the longer row's last tokens."""
    model = make_model("llama")
    engine = make_engine_of(model, num_slots=2, context=8)
    engine.start([0, 1], [[5], [6, 7, 8, 9, 10, 11]])
    assert_plain(engine.extend([1, 0], [[12], [1, 2, 3, 4, 5]]), model, [[6, 7, 8, 9, 10, 11, 12], [5, 1, 2, 3, 4, 5]])
    assert_plain(engine.step([0, 1], [3, 4]), model, [[5, 1, 2, 3, 4, 5, 3], [6, 7, 8, 9, 10, 11, 12, 4]])


def test_dropout_is_off_and_the_mode_of_the_model_is_kept():
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = full_logits(model, [4, 5])[-1]
    model.train()
    model.transformer.h[0].eval()  # somebody froze a part of it
    engine = make_engine_of(model)
    torch.testing.assert_close(engine.start([0], [[4, 5]])[0], expected)
    assert np.isfinite(engine.log_probs([[4, 5]])[0]).all()
    assert model.training
    assert model.transformer.drop.training
    assert not model.transformer.h[0].attn.training


def test_logits_are_constants_that_autograd_accepts():
    model = make_model("llama")
    engine = make_engine_of(model)
    weight = torch.ones(100, requires_grad=True)
    for logits in (engine.start([0], [[4, 5]]), engine.step([0], [6]), engine.extend([0], [[7, 8]])):
        weight.grad = None
        (logits * weight).sum().backward()
        torch.testing.assert_close(weight.grad, logits[0])
    model(torch.tensor([[4, 5]])).logits.sum().backward()  # and the model itself can still be trained
    assert model.config._attn_implementation == "sdpa"


def test_bfloat16_is_near():
    engine = TransformersEngine("tiny", num_slots=2, context=16, dtype=torch.bfloat16)
    logits = engine.start([0], [[4, 5, 6]])
    assert logits.dtype == torch.float32
    expected = TransformersEngine("tiny", num_slots=2, context=16).start([0], [[4, 5, 6]])
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


def test_no_slots():
    engine = make_engine_of(make_model("llama"))
    assert engine.start([], []).shape == engine.step([], []).shape == engine.extend([], []).shape == (0, 100)
    engine.stop([])


def test_a_failed_start_leaves_the_slot_free():
    engine = make_engine_of(make_model("llama"))
    engine.start([0, 1], [[5], [6]])
    model, engine.model = engine.model, None
    with pytest.raises(AttributeError):
        engine.start([0], [[7]])
    engine.model = model
    assert engine.lengths.tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="slot 0 holds no text"):
        engine.step([0], [8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.start([4], [[1]]), r"slots go from 0 to 3, got \[4\]"),
        (lambda e: e.start([-1], [[1]]), "slots go from 0 to 3"),
        (lambda e: e.start([0, 0], [[1], [2]]), r"only once in a call, got \[0, 0\]"),
        (lambda e: e.start(0, [[1]]), "flat sequence of slot numbers"),
        (lambda e: e.start([0.5], [[1]]), "flat sequence of slot numbers"),
        (lambda e: e.start([0, 1], [[1]]), "2 slots need one prompt each, got 1"),
        (lambda e: e.start([0], [[]]), "a prompt is empty.*bos_token, 1"),
        (lambda e: e.start([0], [[1] * 25]), "a prompt of 25 tokens does not fit a context of 24"),
        (lambda e: e.start([0], ["Hi"]), "token ids.*'Hi'.*encode"),
        (lambda e: e.start([0], [[1.0]]), "integer token ids"),
        (lambda e: e.start([0], [[[1]]]), "flat"),
        (lambda e: e.start([0], [[100]]), "a prompt has token id 100; this vocabulary has ids 0 to 99"),
        (lambda e: e.step([0], [-1]), "token id -1; this vocabulary has ids 0 to 99"),
        (lambda e: e.step([3], [1]), "slot 3 holds no text.*call start first"),
        (lambda e: e.step([0], [1, 2]), "1 slots needs as many tokens, got 2"),
        (lambda e: e.extend([0], [[]]), "at least one token"),
        (lambda e: e.extend([0], [[1], [2]]), "1 slots need one list of tokens each, got 2"),
        (lambda e: e.stop([9]), "slots go from 0 to 3"),
        (lambda e: e.log_probs([[1] * 25]), "a sequence of 25 tokens does not fit a context of 24"),
    ],
)
def test_bad_input(call, message):
    engine = make_engine_of(make_model("llama"))
    engine.start([0], [[1]])
    with pytest.raises((ValueError, TypeError), match=message):
        call(engine)
    assert engine.lengths.tolist() == [1, 0, 0, 0]


def test_closed():
    with make_engine_of(make_model("llama")) as engine:
        engine.start([0], [[1]])
    engine.close()
    engine.stop([0])
    for call in (lambda: engine.start([0], [[1]]), lambda: engine.generate([[1]]), lambda: engine.log_probs([[1, 2]])):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_models_it_cannot_run_are_refused():
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    mistral = MistralForCausalLM(MistralConfig(**tiny, num_key_value_heads=2, sliding_window=4))
    with pytest.raises(ValueError, match="MistralForCausalLM has attention other than plain causal"):
        make_engine_of(mistral)
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=100))
    with pytest.raises(ValueError, match="BloomForCausalLM has attention other than plain causal"):
        make_engine_of(bloom)
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=100))
    with pytest.raises(ValueError, match="not a causal language model"):
        make_engine_of(t5)
    with pytest.raises(ValueError, match="at most 64 positions, a context of 65 is too long"):
        make_engine_of(make_model("llama"), context=65)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'dynamic' rotary positions"):
        make_engine_of(make_model("llama", rope_parameters=rope))


def test_bad_construction():
    model = make_model("llama")
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        make_engine_of(model, num_slots=0)
    with pytest.raises(ValueError, match="does not know its tokenizer"):
        TransformersEngine(model, num_slots=1, context=4)
    with pytest.raises(ValueError, match="belong to a model given by name"):
        TransformersEngine(model, load_tokenizer("tiny"), num_slots=1, context=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not belong together"):
        make_engine_of(make_model("llama", vocab_size=99))


def test_a_model_with_more_logits_than_the_tokenizer_has_tokens():
    """They are cut off: neither sampled, however likely, nor part of any probability."""
    first, second = loud_beyond_the_tokens(0), loud_beyond_the_tokens(1)
    engine = make_engine_of(first)
    assert engine.vocab_size == engine.vocabulary.size == 100
    with pytest.raises(ValueError, match="token id 127; this vocabulary has ids 0 to 99"):
        engine.start([0], [[5, 127]])
    expected = [[full_logits(model, text) for text in ([5, 6], [5, 6, 7])] for model in (first, second)]
    assert expected[0][0][:, 100:].max() > expected[0][0][:, :100].max() + 3
    for version, (short, longer) in enumerate(expected):
        if version:
            engine.load_weights(second.named_parameters(), version)
        torch.testing.assert_close(engine.start([0], [[5, 6]]), short[-1:, :100], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(engine.step([0], [7]), longer[-1:, :100], atol=1e-4, rtol=1e-4)
        log_probs = longer[:, :100].log_softmax(-1)
        np.testing.assert_allclose(engine.log_probs([[5, 6, 7]])[0], [log_probs[0, 6], log_probs[1, 7]], atol=1e-4)
        engine.stop([0])
        for sampling in (Sampling(n=8, max_new_tokens=8, ignore_eos=True, seed=0), Sampling(temperature=0.0)):
            for episode in engine.generate([[5, 6]], sampling):
                assert episode.tokens.max() < 100
                assert len(episode.text) >= len(engine.vocabulary.decode(episode.tokens)) > 0
                if not sampling.greedy:
                    np.testing.assert_allclose(
                        episode.log_probs, engine.log_probs([[5, 6, *episode.tokens]])[0][1:], atol=1e-4
                    )


def loud_beyond_the_tokens(seed):
    """A model whose logits for the ids 100 to 127, which stand for nothing, are by far the largest."""
    model = make_model("llama", seed, vocab_size=128)
    with torch.no_grad():
        model.lm_head.weight[100:] *= 8  # tied, to an input that nobody ever gives
    return model


def test_an_engine_with_less_logits_than_tokens_is_an_error():
    class Short(AlphabetEngine):
        def _logits(self, last):
            return super()._logits(last)[:, :90]

    with pytest.raises(ValueError, match="ids up to 99, but the model has logits for 90 only"):
        Short().start([0], [[5]])


def test_all_eos_tokens_of_the_generation_config_count():
    model = make_model("llama")
    model.generation_config.eos_token_id = [7, 2, 500]
    assert make_engine_of(model).vocabulary.eos_tokens == (2, 7)
