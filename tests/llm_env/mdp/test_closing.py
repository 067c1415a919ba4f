"""A closed environment drives nobody's slots any more, and a copied one drives slots of its own."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from llm_env import SB3TokenVecEnv, TokenEnv, TokenVectorEnv, TorchRLTokenEnv, wrappers
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer
from llm_env.wrappers import vector

CLOSED = "this environment has been closed: make a new one"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny", seed=3)


def engine_of(model: Any, slots: int) -> TransformersEngine:
    return TransformersEngine(model, load_tokenizer("tiny"), num_slots=slots, context=20)


def expected_logits(model: Any, observation: dict[str, np.ndarray], row: int) -> np.ndarray:
    """Of the text so far, read in full."""
    with torch.no_grad():
        text = torch.from_numpy(observation["tokens"][row, : observation["length"][row, 0]])[None]
        return model(text).logits[0, -1].numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", [None, "transformers"])
@pytest.mark.parametrize(
    ("make", "step"),
    [
        (TokenEnv, lambda env: env.step(5)),
        (TokenVectorEnv, lambda envs: envs.step(np.array([5]))),
        (SB3TokenVecEnv, lambda envs: envs.step(np.array([5]))),
        (TorchRLTokenEnv, lambda env: env.step(env.full_action_spec.zero())),
        (lambda *args, **kw: wrappers.FlatTokens(TokenEnv(*args, **kw)), lambda env: env.step(5)),
    ],
    ids=["single", "vector", "sb3", "torchrl", "wrapped"],
)
def test_a_closed_environment_says_so(make: Any, step: Callable[[Any], Any], engine: str | None) -> None:
    env = make("Copy", engine=engine)
    env.reset()
    env.close()
    env.close()
    with pytest.raises(ValueError, match=CLOSED):
        env.reset()
    with pytest.raises(ValueError, match=CLOSED):
        step(env)


def test_a_closed_environment_restores_nothing() -> None:
    env = TokenEnv("Copy")
    env.reset(seed=0)
    saved = env.save()
    env.close()
    with pytest.raises(ValueError, match=CLOSED):
        env.restore(saved)


@pytest.mark.parametrize("kl", [False, True])
def test_a_closed_environment_leaves_the_engine_alone(model: Any, kl: bool) -> None:
    """Its slots are another's now, whose logits must be those of its own text."""
    engine = engine_of(model, 2)
    first: Any = TokenVectorEnv("Copy", 2, **({} if kl else {"engine": engine, "observe": "logits"}))
    action: Any = np.array([70, 71])
    if kl:
        first, action = vector.KLReward(first, 0.1, engine), {"token": action, "log_prob": np.array([-1.0, -1.0])}
    first.reset(seed=0)
    first.close()
    second = TokenVectorEnv("Copy", 2, engine=engine, observe="logits")
    second.reset(seed=1)
    for use in (first.reset, lambda: first.step(action), lambda: first.unwrapped.mdp.reset()):
        with pytest.raises(ValueError, match=CLOSED):
            use()
    first.close()
    observation, *_ = second.step(np.array([72, 73]))
    for row in range(2):
        np.testing.assert_allclose(observation["logits"][row], expected_logits(model, observation, row), atol=1e-4)


def test_a_penalty_that_was_closed_by_itself(model: Any) -> None:
    """The environment inside is open still: the reference model is not, and must not be asked."""
    engine = engine_of(model, 1)
    env = wrappers.KLReward(TokenEnv("Copy"), 0.1, engine)
    env.reset(seed=0)
    env.layer.close()
    engine.start([0], [[5, 6]])
    with pytest.raises(ValueError, match="has been closed"):
        env.reset()
    assert engine.lengths.tolist() == [2]


def test_a_copy_has_slots_of_its_own(model: Any) -> None:
    engine = engine_of(model, 3)
    env = TokenEnv("Copy", engine=engine, observe="logits")
    env.reset(seed=0)
    env.step(70)
    again = copy.deepcopy(env)
    assert again.mdp.observer.engine is engine
    assert again.mdp.model is engine
    # Both go on by themselves, from the same text.
    for each, token in ((again, 71), (env, 72), (again, 73)):
        observation = {name: array[None] for name, array in each.step(token)[0].items()}
        np.testing.assert_allclose(observation["logits"][0], expected_logits(model, observation, 0), atol=1e-4)
    assert np.count_nonzero(engine.lengths) == 2
    again.close()
    again.close()
    assert np.count_nonzero(engine.lengths) == 1  # the original's, which reads on
    observation = {name: array[None] for name, array in env.step(73)[0].items()}
    np.testing.assert_allclose(observation["logits"][0], expected_logits(model, observation, 0), atol=1e-4)
    dropped = copy.deepcopy(env)
    del dropped
    gc.collect()
    assert len(engine.claim(2)) == 2  # copies that are gone hold nothing
    with pytest.raises(ValueError, match="1 slots are wanted, but of the engine's 3 only 0 are free"):
        copy.deepcopy(env)


def test_a_copy_of_a_closed_environment_is_closed(model: Any) -> None:
    engine = engine_of(model, 1)
    env = TokenEnv("Copy", engine=engine)
    env.close()
    again = copy.deepcopy(env)
    with pytest.raises(ValueError, match=CLOSED):
        again.reset()
    engine.claim(1)


def test_a_shallow_copy_is_the_same_environment(model: Any) -> None:
    engine = engine_of(model, 1)
    env = TokenEnv("Copy", engine=engine)
    again = copy.copy(env)
    again.reset(seed=0)
    assert env.mdp is again.mdp
    del again
    gc.collect()
    env.step(70)
    copy.copy(env).close()
    with pytest.raises(ValueError, match=CLOSED):
        env.step(70)


def test_a_copied_penalty_has_slots_of_its_own(model: Any) -> None:
    engine = engine_of(model, 2)
    env = wrappers.KLReward(TokenEnv("Copy"), 0.5, engine)
    env.reset(seed=0)
    again = copy.deepcopy(env)
    assert again.layer.penalty._observer.engine is engine
    first = env.step({"token": 70, "log_prob": -1.0})[1]
    again.step({"token": 71, "log_prob": -1.0})
    again.close()
    second = env.step({"token": 72, "log_prob": -1.0})[1]
    alone = wrappers.KLReward(TokenEnv("Copy"), 0.5, engine_of(model, 1))
    alone.reset(seed=0)
    expected = [alone.step({"token": token, "log_prob": -1.0})[1] for token in (70, 72)]
    np.testing.assert_allclose([first, second], expected, atol=1e-5)


def test_a_copy_of_an_engine_made_by_name_is_another_engine() -> None:
    """With the weights that it has, which need not be those it was made with."""
    env = TokenEnv("Copy", engine="transformers", observe="logits")
    other = load_model("tiny", seed=9)
    env.mdp.observer.engine.load_weights(other.state_dict(), version=1)
    env.reset(seed=0)
    again = copy.deepcopy(env)
    assert again.mdp.observer.engine is not env.mdp.observer.engine
    env.close()
    observation = {name: array[None] for name, array in again.step(70)[0].items()}
    np.testing.assert_allclose(observation["logits"][0], expected_logits(other, observation, 0), atol=1e-4)


def test_an_environment_sent_elsewhere_takes_its_engine_along(model: Any) -> None:
    engine = engine_of(model, 2)
    env = TokenEnv("Copy", engine=engine, observe="logits")
    env.reset(seed=0)
    again = pickle.loads(pickle.dumps(env))
    theirs = again.mdp.observer.engine
    assert theirs is not engine
    again.step(70)
    assert engine.lengths.sum() + 1 == theirs.lengths.sum()
    again.close()
    assert len(theirs.claim(2)) == 2
    env.step(70)


def test_looking_at_a_spec_copies_no_engine(model: Any) -> None:
    """Gymnasium copies the arguments that a spec records whenever a wrapper's spec is looked at."""
    engine = engine_of(model, 2)
    env = wrappers.FlatTokens(gymnasium.make("llm_env/Copy-v0", engine=engine))
    assert env.spec is not None
    assert env.spec.kwargs["engine"] is engine
    again = gymnasium.make(env.spec)
    again.reset(seed=0)
    again.close()
    env.close()
