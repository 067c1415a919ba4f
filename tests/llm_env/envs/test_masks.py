"""The action mask where libraries look for it: in the infos, in observations on request, and by a method's name."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torchrl.envs import ActionMask, GymWrapper, TransformedEnv
from torchrl.envs.utils import check_env_specs

from llm_env import SB3TokenVecEnv, TokenEnv, TokenVectorEnv, TorchRLTokenEnv
from llm_env.wrappers import ScaleReward, TopKActions, vector
from tests.masked import Alternating, allowed_ids


def allowed_in_row(envs: Any, row: int) -> list[int]:
    """Worked out from the text itself."""
    mdp = envs.unwrapped.mdp
    index, step = mdp.prompt(row).metadata["index"], int(mdp.state.num_actions[row])
    return allowed_ids(mdp.vocabulary.tokenizer, index, step)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_batch_observes_its_mask(mode: str) -> None:
    envs = TokenVectorEnv(Alternating(), 3, autoreset_mode=mode, observe_mask=True)
    assert envs.single_observation_space["action_mask"] == gymnasium.spaces.MultiBinary(100)
    observation, info = envs.reset(seed=0)
    earlier = observation["action_mask"].copy()
    for step in range(8):
        if step:
            held = observation["action_mask"]
            observation, _, terminated, _, info = envs.step(observation["action_mask"].argmax(1))
            assert step > 1 or np.array_equal(held, earlier)  # of the step before: it did not change under our hands
            if mode == "Disabled" and terminated.any():
                assert observation["action_mask"][terminated].all()
                observation, info = envs.reset(options={"reset_mask": terminated})
        assert observation in envs.observation_space
        assert observation["action_mask"].dtype == np.int8
        for row in range(3):
            running = envs.mdp.state.running[row]
            expected = allowed_in_row(envs, row) if running else list(range(100))
            assert np.flatnonzero(observation["action_mask"][row]).tolist() == expected
        np.testing.assert_array_equal(observation["action_mask"], info["action_mask"])
        np.testing.assert_array_equal(observation["action_mask"], envs.action_masks())
        if "final_obs" in info:
            for row in np.flatnonzero(info["_final_obs"]):
                assert info["final_obs"][row]["action_mask"].all()


def test_a_mask_belongs_to_the_text_that_was_restored() -> None:
    env = TokenEnv(Alternating(), observe_mask=True)
    first, _ = env.reset(seed=0)
    saved = env.save()
    env.step(int(first["action_mask"].argmax()))
    assert not np.array_equal(env.action_masks(), first["action_mask"].astype(bool))
    np.testing.assert_array_equal(env.restore(saved)["action_mask"], first["action_mask"])
    np.testing.assert_array_equal(env.action_masks(), first["action_mask"].astype(bool))


def test_a_task_without_masks_may_be_observed_in_the_same_way() -> None:
    env = TokenEnv("Countdown", observe_mask=True)
    observation, info = env.reset(seed=0)
    assert observation["action_mask"].shape == (100,)
    assert observation["action_mask"].all()
    assert "action_mask" not in info
    assert env.action_masks().all()
    assert "action_mask" not in TokenEnv(Alternating()).reset(seed=0)[0]
    assert TorchRLTokenEnv("Countdown", 2, observe_mask=True, seed=0).reset()["action_mask"].all()
    assert "action_mask" not in TorchRLTokenEnv("Countdown", 2, seed=0).reset()


def test_a_task_is_asked_once_for_each_state() -> None:
    class Counting(Alternating):
        calls = 0

        def action_mask(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
            type(self).calls += 1
            return super().action_mask(episodes, rows)

    envs = TokenVectorEnv(Counting(), 2, observe_mask=True)
    observation, _ = envs.reset(seed=0)
    envs.action_masks()
    assert Counting.calls == 1
    envs.step(observation["action_mask"].argmax(1))
    assert Counting.calls == 2


def test_checkers_accept_it() -> None:
    task = "Copy"
    check_env(gymnasium.make(f"llm_env/{task}-v0", render_mode="ansi", observe_mask=True).unwrapped)
    check_env_specs(TorchRLTokenEnv(task, num_envs=2, seed=0, observe_mask=True))
    envs = TokenVectorEnv(task, num_envs=2, autoreset_mode="Disabled", observe_mask=True)
    check_env_specs(GymWrapper(envs, categorical_action_encoding=True))
    PPO("MultiInputPolicy", SB3TokenVecEnv(task, 2, observe_mask=True), n_steps=8, batch_size=8, n_epochs=1).learn(16)


def test_torchrl_finds_it_where_it_did() -> None:
    for options in ({}, {"observe_mask": True}):
        env = TransformedEnv(TorchRLTokenEnv(Alternating(), num_envs=3, seed=0, **options), ActionMask())
        rollout = env.rollout(10, break_when_any_done=False)
        assert rollout["action_mask"].dtype == torch.bool
        assert rollout["action_mask"].gather(-1, rollout["action"].unsqueeze(-1)).all()


# What sb3-contrib's MaskablePPO asks, in its own ways.


def is_masking_supported(env: Any) -> bool:
    return bool(env.has_attr("action_masks") if hasattr(env, "env_method") else hasattr(env, "action_masks"))


def get_action_masks(env: Any) -> np.ndarray:
    if hasattr(env, "env_method"):
        return np.stack(env.env_method("action_masks"))
    masks: np.ndarray = env.get_wrapper_attr("action_masks")()
    return masks


def test_maskable_algorithms_find_the_masks() -> None:
    single = TokenEnv(Alternating())
    wrapped = ScaleReward(gymnasium.wrappers.TimeLimit(single, 100), 2.0)
    many = SB3TokenVecEnv(Alternating(), 3)
    scaled = SB3TokenVecEnv(vector.ScaleReward(TokenVectorEnv(Alternating(), 3, autoreset_mode="SameStep"), 2.0))
    rows = {"one": single, "wrapped": wrapped, "dummy": DummyVecEnv([lambda: TokenEnv(Alternating())] * 2)}
    for env in (*rows.values(), many, scaled, VecMonitor(many)):
        env.reset()
        assert is_masking_supported(env)
        masks = get_action_masks(env)
        assert masks.dtype == np.bool_
        if env in (single, wrapped):
            assert masks.shape == (100,)
            assert np.flatnonzero(masks).tolist() == allowed_in_row(env, 0)
    for envs in (many, scaled):
        assert get_action_masks(envs).shape == (3, 100)
        for _ in range(8):  # over ends of episodes
            masks = get_action_masks(envs)
            for row in range(3):
                assert np.flatnonzero(masks[row]).tolist() == allowed_in_row(envs.envs, row)
            envs.step(masks.argmax(1))


def test_a_wrapper_that_changes_the_actions_changes_the_masks() -> None:
    """Of the likeliest tokens: in the infos, in the observation, and by the method's name."""
    options: dict[str, Any] = {"engine": "transformers", "observe": "top_k", "top_k": 7, "observe_mask": True}
    one = TopKActions(TokenEnv("Copy", **options))
    many = vector.TopKActions(TokenVectorEnv("Copy", 3, autoreset_mode="SameStep", max_new_tokens=2, **options))
    for env in (one, many):
        observation, info = env.reset(seed=0)
        full = env.unwrapped.mdp.action_mask()
        expected = np.take_along_axis(full, env.unwrapped.mdp.observer.arrays["top_ids"], 1)
        expected = expected[0] if env is one else expected
        assert observation in env.observation_space
        for found in (observation["action_mask"], info["action_mask"], env.action_masks()):
            np.testing.assert_array_equal(found, expected)
        assert env.action_masks().dtype == np.bool_
        env.close()
    envs = SB3TokenVecEnv(vector.TopKActions(TokenVectorEnv("Copy", 2, autoreset_mode="SameStep", **options)))
    envs.reset()
    assert get_action_masks(envs).shape == (2, 7)
    envs.close()
