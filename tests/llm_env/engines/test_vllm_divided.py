"""vLLM with its weights divided among processes: the same numbers, new weights reach all parts, and parts may die."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm_env.engines import Sampling, make_engine
from llm_env.models import load_tokenizer

from .conftest import make_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]
SAMPLING = Sampling(n=3, max_new_tokens=12, seed=7)
NUMBERS = {"tokenizer": load_tokenizer("tiny"), "num_slots": 4, "context": 24}


def model(seed: int) -> Any:
    return make_model("llama", seed, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with make_engine("vllm", model(0), tensor_parallel=2, **NUMBERS) as made:
        yield made


def test_it_is_what_one_engine_is_before_and_after_an_update(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the vocabulary, heads and inner layers lie in two processes. New weights come in portions."""
    monkeypatch.setattr("llm_env.engines.vllm.transfer.PORTION", 2**17)
    other = make_engine("transformers", model(0), **NUMBERS)
    for version in (1, 2):
        ours, theirs = engine.generate(PROMPTS, SAMPLING), other.generate(PROMPTS, SAMPLING)
        for one, another in zip(ours, theirs, strict=True):
            assert one.tokens.tolist() == another.tokens.tolist()
            np.testing.assert_allclose(one.log_probs, another.log_probs, atol=1e-4)
        texts = [[*PROMPTS[each.prompt_index], *each.tokens] for each in ours]
        for one, another in zip(engine.log_probs(texts), other.log_probs(texts), strict=True):
            np.testing.assert_allclose(one, another, atol=1e-4)
        for each in (engine, other):
            each.load_weights(model(version).named_parameters(), version=version)


def test_ctrl_c_does_not_end_its_parts(engine: Any) -> None:
    """A terminal sends it to all processes of a program."""
    for worker in engine._core._core.model_executor.workers:
        os.kill(worker.proc.pid, signal.SIGINT)
    logits = engine.start([0], [[4, 5, 6]])
    assert logits.isfinite().all()
    engine.stop([0])


def test_one_whose_part_dies_says_so_with_its_texts(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")  # for the other part
    engine.start([0], [engine.vocabulary.encode("a prompt")])
    os.kill(engine._core._core.model_executor.workers[1].proc.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"(?s)a part of the weights.*make a new one.*0: 'a prompt"):
        engine.step([0], [5])
