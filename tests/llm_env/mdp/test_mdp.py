"""The token MDP: groups, chosen prompts, copies, rendering, and options that make no sense."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from llm_env import END_OF_CODE, Prompt, Task, TokenEnv, TokenMDP, TokenVectorEnv
from llm_env.tasks import Copy, Dataset
from rewards import Rollout


def test_groups_share_a_prompt() -> None:
    envs = TokenVectorEnv("Reverse", 6, completions_per_prompt=3, autoreset_mode="Disabled")
    observation, info = envs.reset(seed=0)
    assert info["group"].tolist() == [0, 0, 0, 1, 1, 1]
    assert len({tuple(row) for row in observation["tokens"]}) == 2
    assert (observation["tokens"][0] == observation["tokens"][2]).all()


def test_prompts_can_be_chosen() -> None:
    envs = TokenVectorEnv("Reverse", 2, split="test")
    _, info = envs.reset(seed=0, options={"prompt_indices": [5, 0]})
    assert info["prompt_index"].tolist() == [5, 0]
    assert envs.mdp.prompt(0) == envs.mdp.task.prompts("test")[5]
    env = TokenEnv("Reverse")
    assert env.reset(options={"prompt_index": 7})[1]["prompt_index"] == 7
    for wrong in ([0], [0, 10_000], [-1, 0], [1.5, 2.9]):
        with pytest.raises(ValueError, match="must name one of the 256 prompts for each of the 2 rows"):
            envs.reset(options={"prompt_indices": wrong})


def test_chosen_prompts_form_groups_of_their_own() -> None:
    envs = TokenVectorEnv("Reverse", 4, completions_per_prompt=2, autoreset_mode="Disabled")
    assert envs.reset(seed=0)[1]["group"].tolist() == [0, 0, 1, 1]
    options = {"reset_mask": np.array([False, False, True, True]), "prompt_indices": [7, 7]}
    assert envs.reset(options=options)[1]["group"].tolist() == [0, 0, -1, -1]
    assert envs.reset(options={"prompt_indices": [7, 9, 7, 9]})[1]["group"].tolist() == [-3, -2, -3, -2]
    envs.reset(options={"reset_mask": np.array([True, False, False, False])})
    assert envs.reset()[1]["group"].tolist() == [3, 3, 4, 4]  # what was left of group 2 is not dealt out


def test_evaluation_goes_through_the_held_out_prompts_in_order() -> None:
    envs = TokenVectorEnv(Copy(3, num_test=5), 3, split="test", shuffle=False, autoreset_mode="SameStep")
    seen = envs.reset(seed=0)[1]["prompt_index"].tolist()
    _, _, _, _, info = envs.step(np.full(3, envs.mdp.vocabulary.eos_tokens[0]))
    assert seen + info["prompt_index"].tolist() == [0, 1, 2, 3, 4, 0]


def test_sampling_of_prompts_goes_on_where_it_was() -> None:
    first = TokenMDP("Reverse", 3)
    first.reset(seed=1)
    state = first.sampler.state_dict()
    expected = first.prompt_index[first.reset()].tolist()
    second = TokenMDP("Reverse", 3)
    second.sampler.load_state_dict(state)
    assert second.prompt_index[second.reset()].tolist() == expected


def test_rendering() -> None:
    env = gymnasium.make("llm_env/Copy-v0", task_kwargs={"length": 2}, render_mode="ansi")
    assert env.unwrapped.render() == "(no episode yet: call reset)"
    env.reset(seed=0, options={"prompt_index": 0})
    answer = env.unwrapped.mdp.prompt(0).metadata["answer"]
    for token in env.unwrapped.mdp.vocabulary.encode(answer):
        env.step(token)
    assert env.render() == f"copy {answer}: {answer}\n[Copy] token 2/3, return 0, running"
    env.step(env.unwrapped.mdp.vocabulary.eos_tokens[0])
    assert env.render() == f"copy {answer}: {answer}\n[Copy] token 3/3, return 1, ended (eos)"
    envs = TokenVectorEnv("Copy", 2, render_mode="ansi")
    envs.reset(seed=0)
    assert len(envs.render() or ()) == 2
    with pytest.raises(TypeError, match="render_mode must be None or 'ansi', got 'human'"):
        TokenEnv("Copy", render_mode="human")


def test_restored_episodes_keep_their_prompt() -> None:
    train, test = TokenVectorEnv(Copy(3), 2), TokenVectorEnv(Copy(3), 2, split="test")
    train.reset(seed=0)
    test.reset(seed=0)
    test.restore_rows([1], train.save_rows([0]))
    assert test.mdp.prompt(1) == train.mdp.prompt(0)
    for rows in (slice(0, 1), 0, [True, False], [0, 0], [2]):
        with pytest.raises(ValueError, match="row"):
            train.save_rows(rows)


def test_bad_actions_change_nothing() -> None:
    envs = TokenVectorEnv("Copy", 2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="row 0 was given action 5, but its episode has not begun: reset it first"):
        envs.step(np.array([5, 5]))
    envs.reset(seed=0)
    for wrong, message in (
        ([5, 100], "token id 100; this vocabulary has ids 0 to 99"),
        ([5], "expected 2 actions"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.step(np.array(wrong))
    envs.step(np.array([5, envs.mdp.vocabulary.eos_tokens[0]]))
    with pytest.raises(
        ValueError, match=r"row 1 was given action 6, but its episode has ended \(eos\): reset it first"
    ):
        envs.step(np.array([5, 6]))
    assert envs.mdp.state.num_actions.tolist() == [1, 1]
    following = TokenVectorEnv("Copy", 2)
    following.reset(seed=0)
    following.step(np.array([5, following.mdp.vocabulary.eos_tokens[0]]))
    with pytest.raises(ValueError, match=r"expected actions of shape \(2,\), one per row; got shape \(1,\)"):
        following.step(np.array([5]))


def test_bad_resets() -> None:
    envs = TokenVectorEnv("Copy", 2)
    for options, message in (
        ({"reset_mask": [True, False]}, r"reset_mask must be a bool array of shape \(2,\)"),
        ({"reset_mask": np.array([1, 0])}, "reset_mask must be a bool array"),
        ({"mask": None}, r"unknown reset options \['mask'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.reset(options=options)
    with pytest.raises(TypeError, match=r"seed must be one int, got \[1, 2\]"):
        envs.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="known is 'prompt_index'"):
        TokenEnv("Copy").reset(options={"prompt": 3})


def test_a_prompt_longer_than_the_context() -> None:
    class Long(Task):
        def splits(self) -> dict[str, list[Prompt]]:
            return {"train": [Prompt("x" * 30)]}

        def score(self, rollout: Rollout) -> float:
            return 0.0

    with pytest.raises(
        ValueError, match=r"at most 29 tokens fit, and prompt 0 has 30 \('x+'\). Use a context of at least 31"
    ):
        TokenEnv(Long, context=30)
    with pytest.raises(ValueError, match="all 1 prompts have more than 29 tokens: none is left"):
        TokenEnv(Long, context=30, drop_long_prompts=True)
    mixed = Dataset(["x" * 30, "ab", "x" * 31], reward=lambda rollout: 0.0)
    env = TokenEnv(mixed, context=20, drop_long_prompts=True)
    assert (len(env.mdp.prompts), env.mdp.prompts.dropped) == (1, 2)
    env = TokenEnv(Long, context=31)
    env.reset()
    assert END_OF_CODE[env.step(5)[4]["end_code"]] == "context"


def test_same_seed_same_run() -> None:
    runs = []
    for _ in range(2):
        envs = TokenVectorEnv("Countdown", 4, engine="transformers", observe="top_k", top_k=3, max_new_tokens=6)
        observation, _ = envs.reset(seed=11)
        rng = np.random.default_rng(0)
        seen = []
        for _ in range(12):
            observation, reward, *_ = envs.step(observation["top_ids"][np.arange(4), rng.integers(3, size=4)])
            seen.append((observation["tokens"].tolist(), observation["top_log_probs"].tolist(), reward.tolist()))
        runs.append(seen)
        envs.close()
    assert runs[0] == runs[1]
