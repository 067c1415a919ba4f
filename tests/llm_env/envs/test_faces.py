"""Promise 1: the same actions give the same trajectories through every face: those of the slow reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_env import END_OF_CODE, SB3TokenVecEnv, TokenEnv, TokenVectorEnv, TorchRLTokenEnv
from tests.llm_env.reference import LETTERS, PROMPTS, Probe, SlowEnvs

STEPS = 14
actions_strategy = st.lists(
    st.lists(st.integers(0, len(LETTERS)), min_size=4, max_size=4), min_size=STEPS, max_size=STEPS
)
settings_strategy = st.fixed_dictionaries(
    {"context": st.integers(9, 14), "max_new_tokens": st.integers(1, 7), "shuffle": st.just(False)}
)


def as_tokens(mdp: Any, choices: list[list[int]]) -> np.ndarray:
    """[STEPS, num_envs] token ids: a letter each, the last choice being the end of sequence."""
    palette = [*mdp.vocabulary.encode(LETTERS).tolist(), mdp.vocabulary.eos_tokens[0]]
    return np.array(palette)[np.array(choices)][:, : mdp.num_envs]


def assert_same(observation: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert set(observation) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(observation[key]), value, err_msg=key)


def slow_step(slow: SlowEnvs, actions: np.ndarray, rows: list[int]) -> np.ndarray:
    reward = np.zeros(len(slow.episodes))
    for row in rows:
        reward[row] = slow.episodes[row].act(int(actions[row]))
    return reward


def flags(slow: SlowEnvs) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([episode.terminated for episode in slow.episodes]),
        np.array([episode.truncated for episode in slow.episodes]),
    )


@settings(max_examples=60, deadline=None)
@given(
    choices=actions_strategy,
    options=settings_strategy,
    num_envs=st.integers(1, 4),
    multi_turn=st.booleans(),
    when_cut=st.sampled_from(["score", "bootstrap"]),
)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_vector_env(
    mode: str, choices: list[list[int]], options: dict[str, Any], num_envs: int, multi_turn: bool, when_cut: Any
) -> None:
    task = Probe(multi_turn, when_cut)
    envs = TokenVectorEnv(task, num_envs, autoreset_mode=mode, **options)
    slow = SlowEnvs(envs.mdp)
    everyone = list(range(num_envs))
    for row in everyone:
        slow.begin(row)
    observation, info = envs.reset(seed=3)
    assert_same(observation, slow.observation())
    assert info["prompt_index"].tolist() == [row % len(PROMPTS) for row in everyone]
    ended: list[int] = []
    for actions in as_tokens(envs.mdp, choices):
        if mode == "Disabled" and ended:
            mask = np.isin(everyone, ended)
            for row in ended:
                slow.begin(row)
            observation, _ = envs.reset(options={"reset_mask": mask})
            assert_same(observation, slow.observation())
            ended = []
        acting = [row for row in everyone if mode != "NextStep" or row not in ended]
        expected_reward = slow_step(slow, actions, acting)
        if mode == "NextStep":
            for row in ended:
                slow.begin(row)
        expected_flags = flags(slow)
        ended = [row for row in everyone if slow.episodes[row].end != "running"]
        finals = {row: slow.episodes[row] for row in ended}
        last = slow.observation()
        if mode == "SameStep":
            for row in ended:
                slow.begin(row)

        observation, reward, terminated, truncated, info = envs.step(actions)
        assert_same(observation, slow.observation())
        np.testing.assert_allclose(reward, expected_reward)
        np.testing.assert_array_equal(terminated, expected_flags[0])
        np.testing.assert_array_equal(truncated, expected_flags[1])
        assert [END_OF_CODE[code] for code in info["end_code"]] == [episode.end for episode in slow.episodes]
        assert info["_end_code"].all()
        assert ("final_info" in info) == ("final_obs" in info) == (mode == "SameStep" and bool(ended))
        said = info.get("final_info", info)
        if "final_info" in info:
            assert not info["score"].any()
            assert said["_end_code"].tolist() == said["_prompt_index"].tolist() == np.isin(everyone, ended).tolist()
        for row in ended:
            assert END_OF_CODE[said["end_code"][row]] == finals[row].end
            assert said["prompt_index"][row] == finals[row].prompt_index
            if finals[row].terminated:
                assert said["score/length"][row] == len(finals[row].tokens) - len(finals[row].prompt)
            else:
                assert not said.get("_score/length", np.zeros(num_envs))[row]
            if mode == "SameStep":
                assert_same(info["final_obs"][row], {key: value[row] for key, value in last.items()})


def trajectory_of_one(face: str, choices: list[list[int]], options: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Steps of one episode after another: (observation before, reward, terminated, truncated, observation after)."""
    if face == "single":
        env = TokenEnv(Probe(), **options)
        observation, _ = env.reset(seed=3)
        for (action,) in as_tokens(env.mdp, choices):
            last, reward, terminated, truncated, _ = env.step(action)
            yield observation, reward, terminated, truncated, last
            observation = env.reset()[0] if terminated or truncated else last
    elif face == "vector":
        envs = TokenVectorEnv(Probe(), 1, autoreset_mode="SameStep", **options)
        observation, _ = envs.reset(seed=3)
        for actions in as_tokens(envs.mdp, choices):
            following, reward, terminated, truncated, info = envs.step(actions)
            last = info["final_obs"][0] if "final_obs" in info else {k: v[0] for k, v in following.items()}
            yield {k: v[0] for k, v in observation.items()}, reward[0], terminated[0], truncated[0], last
            observation = following
    elif face == "sb3":
        sb3 = SB3TokenVecEnv(Probe(), 1, **options)
        sb3.seed(3)
        observation = sb3.reset()
        for actions in as_tokens(sb3.envs.mdp, choices):
            following, reward, done, infos = sb3.step(actions)
            last = infos[0].get("terminal_observation", {k: v[0] for k, v in following.items()})
            truncated = infos[0].get("TimeLimit.truncated", False)
            yield {k: v[0] for k, v in observation.items()}, reward[0], done[0] and not truncated, truncated, last
            observation = following
    else:
        native = TorchRLTokenEnv(Probe(), 1, seed=3, **options)
        following = native.reset()
        keys = list(native.observation_spec.keys())
        for actions in as_tokens(native.mdp, choices):
            following["action"] = torch.from_numpy(actions)
            if face == "torchrl":
                step, following = native.step_and_maybe_reset(following)
            else:  # TorchRL's own way, which merges a masked reset
                step = native.step(following)
                following = native.maybe_reset(native.step_mdp(step))
            yield (
                {k: step[k][0].numpy() for k in keys},
                step["next", "reward"].item(),
                step["next", "terminated"].item(),
                step["next", "truncated"].item(),
                {k: step["next", k][0].numpy() for k in keys},
            )


@settings(max_examples=40, deadline=None)
@given(choices=actions_strategy, options=settings_strategy)
def test_every_face_gives_the_same_trajectory(choices: list[list[int]], options: dict[str, Any]) -> None:
    choices = [row[:1] for row in choices]
    reference = SlowEnvs(TokenEnv(Probe(), **options).mdp)
    reference.begin(0)
    expected = []
    for (action,) in as_tokens(reference.mdp, choices):
        before = reference.observation()
        episode = reference.episodes[0]
        reward = episode.act(int(action))
        after = reference.observation()
        expected.append((before, reward, episode.terminated, episode.truncated, after))
        if episode.end != "running":
            reference.begin(0)
    for face in ("single", "vector", "sb3", "torchrl", "torchrl-merged"):
        for step, wanted in zip(trajectory_of_one(face, choices, options), expected, strict=True):
            for part, array in zip((step[0], step[4]), (wanted[0], wanted[4]), strict=True):
                assert_same(part, {k: v[0] for k, v in array.items()})
            assert step[1] == pytest.approx(wanted[1]), face
            assert (bool(step[2]), bool(step[3])) == (wanted[2], wanted[3]), face


@settings(max_examples=30, deadline=None)
@given(choices=actions_strategy, options=settings_strategy)
def test_torchrl_batch_equals_vector_env(choices: list[list[int]], options: dict[str, Any]) -> None:
    native = TorchRLTokenEnv(Probe(), 4, seed=3, **options)
    envs = TokenVectorEnv(Probe(), 4, autoreset_mode="SameStep", **options)
    observation, _ = envs.reset(seed=3)
    following = native.reset()
    for actions in as_tokens(native.mdp, choices):
        following["action"] = torch.from_numpy(actions)
        step, following = native.step_and_maybe_reset(following)
        assert_same({k: step[k] for k in observation}, observation)
        observation, reward, terminated, truncated, _ = envs.step(actions)
        np.testing.assert_allclose(step["next", "reward"].squeeze(-1), reward)
        np.testing.assert_array_equal(step["next", "terminated"].squeeze(-1), terminated)
        np.testing.assert_array_equal(step["next", "truncated"].squeeze(-1), truncated)


def test_seeds_decide_the_prompts() -> None:
    first, second = (gymnasium.make_vec("llm_env/Reverse-v0", num_envs=3) for _ in range(2))
    a, _ = first.reset(seed=5)
    b, _ = second.reset(seed=5)
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
    c, _ = second.reset(seed=6)
    assert (a["tokens"] != c["tokens"]).any()
    d, _ = first.reset()  # without a seed the order goes on
    assert (a["tokens"] != d["tokens"]).any()


def test_observations_are_copies_unless_asked_otherwise() -> None:
    for copy in (True, False):
        envs = TokenVectorEnv("Copy", 2, copy=copy)
        before, _ = envs.reset(seed=0)
        length = before["length"].copy()
        envs.step(np.array([5, 5]))
        assert (before["length"] == length).all() == copy
