"""The checkers and trainers of the libraries we are to be at home in, on every built-in task."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor
from torchrl.collectors import Collector
from torchrl.envs import ActionMask, GymWrapper, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import RandomPolicy, check_env_specs

from llm_env import SB3TokenVecEnv, TokenVectorEnv, TorchRLTokenEnv
from llm_env.tasks import Copy, Task
from llm_env.wrappers.vector import EpisodeStatistics, FlatTokens, KLReward

TASKS = ["Addition", "Copy", "Countdown", "Maze", "ReasoningGym", "Reverse", "Sentiment", "WordSums"]


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    def test_gymnasium(self, task: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            env = gymnasium.make(f"llm_env/{task}-v0", render_mode="ansi")
            check_env(env.unwrapped)
            assert env.unwrapped.spec.to_json()

    def test_gymnasium_vector(self, task: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            envs = gymnasium.make_vec(f"llm_env/{task}-v0", num_envs=3)
            observation, _ = envs.reset(seed=0)
            assert observation in envs.observation_space
            for _ in range(5):
                observation, reward, *_ = envs.step(envs.action_space.sample())
                assert observation in envs.observation_space
                assert reward.shape == (3,)

    def test_torchrl_specs(self, task: str) -> None:
        check_env_specs(TorchRLTokenEnv(task, num_envs=3, seed=0))

    def test_torchrl_gym_wrapper(self, task: str) -> None:
        envs = TokenVectorEnv(task, num_envs=3, autoreset_mode="Disabled")
        check_env_specs(GymWrapper(envs, categorical_action_encoding=True))

    def test_torchrl_collector(self, task: str) -> None:
        env = TorchRLTokenEnv(task, num_envs=3, seed=0)
        collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=30, total_frames=60)
        batches = list(collector)
        collector.shutdown()
        assert [batch.numel() for batch in batches] == [30, 30]
        assert batches[0]["next", "tokens"].shape == (3, 10, env.mdp.context)

    def test_stable_baselines3(self, task: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it would rather see images
            sb3_check_env(gymnasium.make(f"llm_env/{task}-v0"))
        model = PPO("MultiInputPolicy", SB3TokenVecEnv(task, num_envs=2), n_steps=8, batch_size=16, n_epochs=1)
        before = [parameter.clone() for parameter in model.policy.parameters()]
        model.learn(32)
        assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))


def test_stable_baselines3_trains_on_the_gymnasium_env_itself() -> None:
    PPO("MultiInputPolicy", gymnasium.make("llm_env/Copy-v0"), n_steps=8, batch_size=8, n_epochs=1).learn(8)


def test_stable_baselines3_finds_returns_where_it_looks_for_them() -> None:
    task = Copy(length=2)
    task.when_cut = "bootstrap"
    envs = SB3TokenVecEnv(task, num_envs=2, max_new_tokens=2)
    monitored = VecMonitor(envs)
    monitored.seed(0)
    monitored.reset()
    monitored.step(np.array([5, 5]))
    _, _, done, infos = monitored.step(np.array([5, 5]))
    assert done.all()
    assert [info["episode"]["l"] for info in infos] == [2, 2]
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["terminal_observation"]["length"] == infos[0]["terminal_observation"]["prompt_length"] + 2
    assert envs.reset_infos[0]["prompt_index"] == envs.envs.mdp.prompt_index[0]
    assert monitored.get_attr("num_envs") == [2, 2]
    assert monitored.env_method("render", indices=[0]) == [None]


def test_stable_baselines3_by_its_own_ways() -> None:
    """By id, through `make_vec_env` and `evaluate_policy`, and with what wrappers report."""
    model = PPO("MultiInputPolicy", "llm_env/Copy-v0", n_steps=8, batch_size=8, n_epochs=1)
    make_vec_env("llm_env/Copy-v0", 2).reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, _ = evaluate_policy(model, SB3TokenVecEnv("Copy", 2), n_eval_episodes=3)
    assert mean == 0.0
    wrapped = SB3TokenVecEnv(
        EpisodeStatistics(FlatTokens(TokenVectorEnv("Copy", 2, autoreset_mode="SameStep", max_new_tokens=1)))
    )
    wrapped.reset()
    infos = wrapped.step(np.array([70, 71]))[3]
    assert infos[1]["rollout"]["end"] == "budget"
    assert infos[1]["episode"]["l"] == 1
    assert len(wrapped.env_method("save_rows", [0])[0]) == 1
    masks = wrapped.env_method("action_masks")
    assert [mask.sum() for mask in masks] == [27, 27]
    with pytest.raises(ValueError, match="num_envs=5"):
        SB3TokenVecEnv(TokenVectorEnv("Copy", 2, autoreset_mode="SameStep"), num_envs=5)
    with pytest.raises(TypeError, match="Stable-Baselines3 has no actions such as Dict"):
        SB3TokenVecEnv(
            KLReward(TokenVectorEnv("Copy", 2, autoreset_mode="SameStep"), beta=0.1, reference="transformers")
        )


BY_ID = """
import llm_env
from torchrl.envs import GymEnv
if __name__ == "__main__":
    env = GymEnv("llm_env/Copy-v0", num_envs=2, categorical_action_encoding=True)
    assert env.rollout(20, break_when_any_done=False)["next", "done"].any()
    env.close()
"""


def test_torchrl_makes_it_by_id(tmp_path: Path) -> None:
    """In a script of its own, because it makes an environment in each of several processes."""
    script = tmp_path / "by_id.py"
    script.write_text(BY_ID)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_torchrl_collector_can_be_seeded() -> None:
    seen = []
    for _ in range(2):
        env = TorchRLTokenEnv("Reverse", num_envs=3)
        collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=30, total_frames=90)
        torch.manual_seed(0)
        collector.set_seed(5)
        seen.append([batch["tokens"].clone() for batch in collector])
        collector.shutdown()
    for one, other in list(zip(*seen, strict=True))[1:]:  # the first batch begins where the collector had reset to
        assert (one == other).all()


def test_stable_baselines3_seeds() -> None:
    first, second = (SB3TokenVecEnv("Reverse", num_envs=2) for _ in range(2))
    first.seed(1)
    second.seed(1)
    np.testing.assert_array_equal(first.reset()["tokens"], second.reset()["tokens"])
    with pytest.raises(ValueError, match="autoreset_mode='SameStep'"):
        SB3TokenVecEnv(TokenVectorEnv("Copy", 2))


def test_torchrl_transforms_and_masks() -> None:
    env = TransformedEnv(TorchRLTokenEnv(Copy(length=3), num_envs=4, seed=0), ActionMask())
    env.append_transform(StepCounter())
    env.append_transform(RewardSum())
    check_env_specs(env)
    rollout = env.rollout(40, break_when_any_done=False)
    allowed = rollout["action_mask"].gather(-1, rollout["action"].unsqueeze(-1))
    assert allowed.all()
    assert rollout["next", "step_count"].max() == 4
    assert rollout["next", "done"].any()


def test_torchrl_seeds_and_devices() -> None:
    rollouts = []
    for _ in range(2):
        env = TorchRLTokenEnv("Reverse", num_envs=4)
        env.set_seed(7)
        torch.manual_seed(0)
        rollouts.append(env.rollout(20, break_when_any_done=False))
    assert (rollouts[0] == rollouts[1]).all()
    assert rollouts[0].device == torch.device("cpu")


def test_torchrl_leaves_ended_rows_alone() -> None:
    env = TorchRLTokenEnv(Copy(length=2, dense=True), num_envs=3, seed=0)
    eos = env.mdp.vocabulary.eos_tokens[0]
    step = env.step(env.reset().set("action", torch.tensor([eos, 5, 5])))
    following = env.step_mdp(step)
    following.set("action", torch.tensor([5, 5, 5]))
    following.set("_step", ~following["done"].squeeze(-1))
    second = env.step(following)
    assert second["next", "length"].squeeze(-1).tolist() == [10, 11, 11]
    assert second["next", "done"].squeeze(-1).tolist() == [True, False, False]
    assert second["next", "reward"][0] == 0


def test_a_user_task_is_at_home_everywhere() -> None:
    from llm_env import Prompt, register_task

    @register_task
    class Parrot(Task):
        max_new_tokens = 4

        def splits(self) -> dict[str, list[Prompt]]:
            return {"train": [Prompt("say a: ", {"answer": "a"})]}

        def score(self, rollout) -> float:  # type: ignore[no-untyped-def]
            return float(rollout.text == rollout.metadata["answer"])

    check_env(gymnasium.make("llm_env/Parrot-v0", render_mode="ansi").unwrapped)
    assert gymnasium.make_vec("llm_env/Parrot-v0", num_envs=2).reset()[0]["tokens"].shape[0] == 2
    check_env_specs(TorchRLTokenEnv("Parrot", 2))
    assert SB3TokenVecEnv("Parrot", 2).reset()["tokens"].shape[0] == 2
