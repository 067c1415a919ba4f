"""Wrappers on one environment and on a batch; the KL penalty has a file of its own."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from llm_env import SB3TokenVecEnv, TokenEnv, TokenVectorEnv
from llm_env.tasks import Copy
from llm_env.wrappers import EpisodeStatistics, FlatTokens, KLReward, ScaleReward, TopKActions, vector
from tests.llm_env.reference import Probe


def test_statistics_after_a_restore() -> None:
    envs = vector.EpisodeStatistics(TokenVectorEnv(Probe(), 2, context=14, shuffle=False, autoreset_mode="Disabled"))
    envs.reset(seed=0)
    x, eos = envs.unwrapped.mdp.vocabulary.encode("x")[0], envs.unwrapped.mdp.vocabulary.eos_tokens[0]
    envs.step(np.array([x, eos]))
    saved = envs.unwrapped.save_rows([0])
    envs.unwrapped.restore_rows([0, 1], saved)
    _, _, _, _, info = envs.step(np.array([eos, eos]))
    assert [said["r"] for said in info["rollout"]] == [0.125, 0.125]


def test_top_k_actions_choose_from_what_was_observed() -> None:
    envs = vector.TopKActions(TokenVectorEnv("Copy", 3, engine="transformers", observe="top_k", top_k=6))
    assert envs.single_action_space == gymnasium.spaces.Discrete(6)
    observation, _ = envs.reset(seed=0)
    index = np.array([0, 3, 5])
    following, *_ = envs.step(index)
    written = following["tokens"][np.arange(3), following["length"][:, 0] - 1]
    np.testing.assert_array_equal(written, observation["top_ids"][np.arange(3), index])
    with pytest.raises(ValueError, match="an index from 0 to 5 into the top 6"):
        envs.step(np.array([0, 6, 0]))
    for wrong in (np.array([0]), 0, np.array([0, 1, 2, 3])):
        with pytest.raises(ValueError, match="expected 3 actions, one per row; got shape"):
            envs.step(wrong)
    with pytest.raises(TypeError, match="apply it before KLReward"):
        TopKActions(KLReward(TokenEnv("Copy", engine="transformers", top_k=6), beta=0.1, reference="transformers"))
    _, info = envs.reset(seed=0)
    ids = envs.unwrapped.mdp.observer.arrays["top_ids"]
    full = envs.unwrapped.mdp.action_mask()
    np.testing.assert_array_equal(info["action_mask"], [full[row, ids[row]] for row in range(3)])
    with pytest.raises(ValueError, match="observe='top_k'"):
        TopKActions(TokenEnv("Copy"))
    env = TopKActions(TokenEnv("Copy", engine="transformers", observe="top_k", top_k=6))
    assert str(env) == "TopKActions(TokenEnv(Copy, model='tiny', context=20))"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it would rather check the environment inside
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_flat_tokens(mode: str) -> None:
    envs = vector.FlatTokens(TokenVectorEnv(Copy(3), 2, autoreset_mode=mode, max_new_tokens=1))
    observation, _ = envs.reset(seed=0)
    assert observation in envs.observation_space
    assert (observation[:, :10] >= 0).all()
    assert (observation[:, 10:] == -1).all()
    _, _, _, _, info = envs.step(np.array([5, 6]))
    if mode == "SameStep":
        assert [last[10] for last in info["final_obs"]] == [5, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check_env(FlatTokens(TokenEnv("Copy")), skip_render_check=True)
    if mode == "SameStep":
        assert SB3TokenVecEnv(envs).reset().shape == (2, 11)


def test_episode_statistics() -> None:
    envs = vector.EpisodeStatistics(
        vector.ScaleReward(TokenVectorEnv(Copy(2, dense=True), 2, autoreset_mode="NextStep"), scale=10.0)
    )
    envs.reset(seed=0)
    mdp = envs.unwrapped.mdp
    answers = np.array([mdp.vocabulary.encode(mdp.prompt(row).metadata["answer"]) for row in range(2)])
    eos = mdp.vocabulary.eos_tokens[0]
    for episode in range(2):  # the second begins after an autoreset
        _, _, _, _, info = envs.step(answers[:, 0])
        assert "rollout" not in info
        _, _, _, _, info = envs.step(np.array([answers[0, 1], eos]))
        assert info["_rollout"].tolist() == [False, True]
        said = info["rollout"][1]
        assert (said["r"], said["l"], said["end"]) == (pytest.approx(10 / 3), 2, "eos")
        assert said["prompt"] + said["text"] == mdp.prompt(1).text + mdp.prompt(1).metadata["answer"][0]
        _, _, _, _, info = envs.step(np.array([eos, eos]))
        assert info["_rollout"].tolist() == [True, False]
        assert info["rollout"][0]["r"] == 10.0
        if episode == 0:
            envs.step(np.array([eos, eos]))  # row 1 writes nothing, row 0 begins anew
            envs.reset(options={"reset_mask": np.array([True, True])})
            answers = np.array([mdp.vocabulary.encode(mdp.prompt(row).metadata["answer"]) for row in range(2)])


def test_gymnasium_statistics_beside_ours() -> None:
    env = gymnasium.wrappers.RecordEpisodeStatistics(EpisodeStatistics(TokenEnv("Copy", max_new_tokens=1)))
    env.reset(seed=0)
    info = env.step(70)[4]
    assert (info["episode"]["l"], info["rollout"]["l"]) == (1, 1)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        vector.EpisodeStatistics(TokenVectorEnv("Copy", 2, max_new_tokens=1))
    )
    envs.reset(seed=0)
    info = envs.step(np.array([70, 71]))[4]
    assert info["episode"]["l"].tolist() == [1, 1]
    assert [said["l"] for said in info["rollout"]] == [1, 1]


def test_scaling_and_clipping() -> None:
    scale = {"scale": 4.0, "low": -1.0, "high": 3.0}
    for wrapped in (ScaleReward(TokenEnv(Copy(2)), **scale), vector.ScaleReward(TokenVectorEnv(Copy(2), 1), **scale)):
        env = wrapped.unwrapped
        wrapped.reset(seed=0)
        mdp = env.mdp
        total = 0.0
        for token in [*mdp.vocabulary.encode(mdp.prompt(0).metadata["answer"]), mdp.vocabulary.eos_tokens[0]]:
            total += float(np.sum(wrapped.step(np.array([token]) if isinstance(env, TokenVectorEnv) else token)[1]))
        assert total == 3.0
    with pytest.raises(ValueError, match="low must not be above high, got low=2, high=1"):
        ScaleReward(TokenEnv("Copy"), low=2, high=1)


def test_closing_twice_does_no_harm() -> None:
    for env in (
        KLReward(FlatTokens(EpisodeStatistics(TokenEnv("Copy"))), beta=0.1, reference="transformers"),
        vector.KLReward(
            vector.FlatTokens(vector.EpisodeStatistics(TokenVectorEnv("Copy", 2))), beta=0.1, reference="transformers"
        ),
    ):
        env.reset(seed=0)
        env.close()
        env.close()
