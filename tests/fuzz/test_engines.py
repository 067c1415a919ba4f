"""Thousands of calls of environments that share one engine with each other and with `generate`: made, stepped, copied,
closed and used after that, in any order. Whatever a row observes is what a plain forward pass says of its text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_env import Sampling, TokenVectorEnv
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_tokenizer
from tests.fuzz.wild import LETTERS, Wild

CONTEXT = 28


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def small_engine(seed: int, num_slots: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=100, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return TransformersEngine(
        LlamaForCausalLM(config).eval(), load_tokenizer("tiny"), num_slots=num_slots, context=CONTEXT
    )


def check_row(engine: Any, envs: TokenVectorEnv, observation: Any, row: int) -> None:
    if envs.mdp.state.terminated[row]:
        assert not observation["logits"][row].any()
        return
    length = int(observation["length"][row, 0])
    with torch.no_grad():
        plain = engine.model(torch.from_numpy(observation["tokens"][row, :length])[None]).logits[0, -1]
    np.testing.assert_allclose(observation["logits"][row], plain.numpy(), atol=1e-4, rtol=1e-4)


def walk(seed: int, calls: int) -> None:
    rng = np.random.default_rng(seed)
    engine = small_engine(seed, num_slots=9)
    palette = [*engine.vocabulary.encode(LETTERS).tolist(), engine.vocabulary.eos_tokens[0]]
    alive: list[TokenVectorEnv] = []
    closed: list[TokenVectorEnv] = []
    claimed: list[np.ndarray] = []
    for _ in range(calls):
        free = engine.num_slots - sum(envs.num_envs for envs in alive) - sum(map(len, claimed))
        move = rng.choice(
            ["make", "step", "step", "step", "step", "step", "generate", "close", "zombie", "claim", "release"]
        )
        if move == "make":
            wanted = int(rng.integers(1, 5))
            task = Wild(rng.choice(["score", "bootstrap"]), "sorry", talks=True, masks=False)
            options: dict[str, Any] = {"engine": engine, "observe": "logits", "context": CONTEXT, "max_new_tokens": 6}
            if wanted > free:
                with pytest.raises(ValueError, match="slots are wanted"):
                    TokenVectorEnv(task, wanted, **options)
            else:
                envs = TokenVectorEnv(task, wanted, autoreset_mode=rng.choice(["NextStep", "SameStep"]), **options)
                observation, _ = envs.reset(seed=int(rng.integers(100)))
                check_row(engine, envs, observation, int(rng.integers(wanted)))
                alive.append(envs)
        elif move == "step" and alive:
            envs = alive[rng.integers(len(alive))]
            observation, *_ = envs.step(rng.choice(palette, envs.num_envs))
            check_row(engine, envs, observation, int(rng.integers(envs.num_envs)))
        elif move == "generate" and free:
            prompts = [rng.integers(4, 90, rng.integers(1, 9)) for _ in range(rng.integers(1, 6))]
            for episode in engine.generate(prompts, Sampling(max_new_tokens=3, seed=1)):
                assert 1 <= len(episode.tokens) <= 3
        elif move == "close" and alive:
            envs = alive.pop(int(rng.integers(len(alive))))
            envs.close()
            closed = [*closed[-2:], envs]
        elif move == "zombie" and closed:
            envs = closed[rng.integers(len(closed))]
            actions = rng.choice(palette, envs.num_envs)
            with pytest.raises(ValueError, match="this environment has been closed"):
                envs.reset() if rng.random() < 0.5 else envs.step(actions)
            envs.close()
        elif move == "claim" and free:
            claimed.append(engine.claim(int(rng.integers(1, free + 1))))
        elif move == "release" and claimed:
            engine.release(claimed.pop())
    for envs in alive:
        envs.close()
    for slots in claimed:
        engine.release(slots)
    assert len(engine.claim(engine.num_slots)) == engine.num_slots


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_engine(seed: int) -> None:
    walk(seed, calls=800)


def test_engine_briefly() -> None:
    walk(100, calls=120)
