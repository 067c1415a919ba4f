"""The KL penalty, as wrappers and as a TorchRL transform; promise 5: the rewards of a KL-shaped episode add up."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.envs import TransformedEnv

from llm_env import TokenEnv, TokenVectorEnv, TorchRLTokenEnv
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer
from llm_env.tasks import Copy
from llm_env.wrappers import KLReward, vector
from llm_env.wrappers.torchrl import KLReward as KLRewardTransform
from tests.llm_env.reference import LETTERS, Probe


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny", seed=1)


@pytest.fixture(scope="module")
def reference(model: Any) -> Any:
    """An engine of another model than the environment's default."""
    with TransformersEngine(model, load_tokenizer("tiny"), num_slots=4, context=16) as engine:
        yield engine


@settings(max_examples=15, deadline=None)
@given(
    beta=st.floats(0, 2),
    choices=st.lists(st.lists(st.integers(0, len(LETTERS)), min_size=3, max_size=3), min_size=8, max_size=8),
    log_probs=st.lists(st.lists(st.floats(-9, 0), min_size=3, max_size=3), min_size=8, max_size=8),
)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_kl_shaped_rewards_add_up(
    mode: str, beta: float, choices: Any, log_probs: Any, reference: Any, model: Any
) -> None:
    """Their sum is the task's reward minus beta times the log-ratio of the episode, scored in one go by the model."""
    plain = TokenVectorEnv(Probe(), 3, autoreset_mode=mode, context=14, shuffle=False)
    shaped = vector.KLReward(
        TokenVectorEnv(Probe(), 3, autoreset_mode=mode, context=14, shuffle=False), beta, reference=reference
    )
    mdp = plain.mdp
    palette = np.array([*mdp.vocabulary.encode(LETTERS), mdp.vocabulary.eos_tokens[0]])
    plain.reset(seed=0)
    shaped.reset(seed=0)
    sums, plain_sums, said = np.zeros(3), np.zeros(3), np.zeros(3)
    for actions, agent in zip(palette[np.array(choices)], np.array(log_probs), strict=True):
        acted = mdp.state.running.copy()
        plain_sums += plain.step(actions)[1]
        _, reward, _, _, info = shaped.step({"token": actions, "log_prob": agent})
        assert info["_log_ratio"].tolist() == acted.tolist()
        sums += reward
        said += np.where(acted, agent, 0.0)
        for row, finished in mdp.finished.items():
            rollout = finished.rollout
            text = np.concatenate([rollout.prompt_tokens, rollout.tokens])
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.from_numpy(text)[None]).logits[0].double(), -1)
            places = len(rollout.prompt_tokens) + np.flatnonzero(rollout.is_action)
            reference_log_prob = sum(scores[place - 1, text[place]].item() for place in places)
            assert sums[row] == pytest.approx(plain_sums[row] - beta * (said[row] - reference_log_prob), abs=1e-3)
            sums[row] = plain_sums[row] = said[row] = 0.0
    shaped.close()  # the engine has slots for one environment at a time


@settings(max_examples=10, deadline=None)
@given(
    beta=st.floats(0, 2),
    choices=st.lists(st.lists(st.integers(0, len(LETTERS)), min_size=3, max_size=3), min_size=8, max_size=8),
    log_probs=st.lists(st.lists(st.floats(-9, 0), min_size=3, max_size=3), min_size=8, max_size=8),
)
def test_the_torchrl_transform_shapes_as_the_wrapper_does(
    beta: float, choices: Any, log_probs: Any, reference: Any
) -> None:
    arguments: Any = {"num_envs": 3, "context": 14, "shuffle": False}
    base = TorchRLTokenEnv(Probe(), seed=0, **arguments)
    # Engines of their own: both would use the same slots of a shared one.
    native = TransformedEnv(base, KLRewardTransform(base, beta, reference="transformers"))
    wrapped = vector.KLReward(
        TokenVectorEnv(Probe(), autoreset_mode="SameStep", **arguments), beta, reference="transformers"
    )
    palette = np.array([*base.mdp.vocabulary.encode(LETTERS), base.mdp.vocabulary.eos_tokens[0]])
    following = native.reset()
    wrapped.reset(seed=0)
    for actions, agent in zip(palette[np.array(choices)], np.array(log_probs), strict=True):
        following.set("action", torch.from_numpy(actions)).set("action_log_prob", torch.from_numpy(agent))
        step, following = native.step_and_maybe_reset(following)
        expected = wrapped.step({"token": actions, "log_prob": agent})[1]
        np.testing.assert_allclose(step["next", "reward"].squeeze(-1), expected, atol=1e-4)
    native.close()
    wrapped.close()


def test_the_torchrl_transform_needs_a_log_prob() -> None:
    base = TorchRLTokenEnv("Copy", 2, seed=0)
    native = TransformedEnv(base, KLRewardTransform(base, 0.1, reference="transformers"))
    with pytest.raises(KeyError, match="give it return_log_prob=True, or set log_prob_key"):
        native.step(native.rand_action(native.reset()))


def test_kl_against_the_model_that_the_environment_reads_with() -> None:
    """An agent that samples from that very model pays nothing."""
    env = KLReward(gymnasium.make("llm_env/Copy-v0", engine="transformers", observe="logits"), beta=1.0)
    observation, _ = env.reset(seed=0)
    log_probs = torch.log_softmax(torch.from_numpy(observation["logits"]), -1)
    _, reward, *_, info = env.step({"token": 7, "log_prob": log_probs[7].item()})
    assert reward == pytest.approx(0.0, abs=1e-5)
    assert info["log_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert env.action_space.sample().keys() == {"token", "log_prob"}


def test_kl_of_an_agent_that_steers_by_the_top_k() -> None:
    envs = vector.TopKActions(TokenVectorEnv(Copy(3), 2, engine="transformers", observe="top_k", top_k=4))
    shaped = vector.KLReward(envs, beta=0.5, reference="transformers")
    observation, _ = shaped.reset(seed=0)
    _, reward, *_, info = shaped.step({"token": np.array([1, 2]), "log_prob": np.array([-1.0, -2.0])})
    expected = np.array([-1.0, -2.0]) - observation["top_log_probs"][[0, 1], [1, 2]]
    np.testing.assert_allclose(info["log_ratio"], expected, atol=1e-5)
    np.testing.assert_allclose(reward, -0.5 * expected, atol=1e-5)
    shaped.close()


def test_bad_kl() -> None:
    with pytest.raises(ValueError, match="needs a reference model: give reference='transformers'"):
        KLReward(TokenEnv("Copy"), beta=0.1)
    with pytest.raises(ValueError, match="beta must be a number, 0 or more, got -1"):
        KLReward(TokenEnv("Copy"), beta=-1, reference="transformers")
    with pytest.raises(ValueError, match="model='tiny' says what a reference engine given by name is to serve"):
        KLReward(TokenEnv("Copy", engine="transformers", observe="logits"), beta=0.1, model="tiny")
    env = KLReward(TokenEnv("Copy"), beta=0.1, reference="transformers")
    env.reset(seed=0)
    with pytest.raises(TypeError, match=r"an action must be \{'token': ..., 'log_prob': ...\}, got"):
        env.step(5)
    for wrong in (0.5, float("nan")):
        with pytest.raises(ValueError, match="log_prob must be one log-probability"):
            env.step({"token": 5, "log_prob": wrong})
    with pytest.raises(ValueError, match="an action has token id 1000"):
        env.step({"token": 1000, "log_prob": -1.0})
    with pytest.raises(ValueError, match="expected a token and a log_prob for each of 1 rows"):
        env.step({"token": [5, 5], "log_prob": -1.0})
    with pytest.raises(TypeError, match="for TokenEnv and TokenVectorEnv"):
        KLReward(gymnasium.make("CartPole-v1"), beta=0.1)


def test_kl_after_a_restore_and_through_other_wrappers() -> None:
    envs = vector.KLReward(TokenVectorEnv("Copy", 2, autoreset_mode="Disabled"), beta=1.0, reference="transformers")
    inner = envs.unwrapped
    envs.reset(seed=0)
    envs.step({"token": np.array([70, 71]), "log_prob": np.array([-1.0, -1.0])})
    saved = inner.save_rows([0])
    same = {"token": np.array([72, 72]), "log_prob": np.array([-1.0, -1.0])}
    inner.restore_rows([1], saved)
    first = envs.step(same)[4]["log_ratio"]
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    inner.restore_rows([0], saved)  # back in time, in the same row
    assert envs.step(same)[4]["log_ratio"][0] == pytest.approx(first[0], abs=1e-5)
    changed = gymnasium.wrappers.TransformAction(TokenEnv("Copy"), lambda action: action + 1, None)
    env = KLReward(changed, beta=1.0, reference="transformers")
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="was to write token 70, but an action wrapper inside made it another"):
        env.step({"token": 70, "log_prob": -1.0})
