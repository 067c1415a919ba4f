"""The examples, shortened: each learns something. Their full length is run by `make test-all`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cleanrl_style_ppo  # noqa: E402
import custom_task  # noqa: E402
import game  # noqa: E402
import hints  # noqa: E402
import rlhf_end_to_end  # noqa: E402
import rollout  # noqa: E402
import sb3_maskable_ppo  # noqa: E402
import sb3_ppo  # noqa: E402
import torchrl_reinforce  # noqa: E402


def test_custom_task() -> None:
    _, returns = custom_task.train(steps=40_000, seed=0)
    assert returns[-1] > returns[0] + 0.2


def test_sb3_ppo() -> None:
    returns = sb3_ppo.train(20_000, 0, {"length": 2, "alphabet": "abc", "dense": True})
    assert returns[-1] > returns[0] + 0.2


def test_sb3_maskable_ppo() -> None:
    returns = sb3_maskable_ppo.train(20_000, 0, {"size": 2})
    assert returns[-1] > returns[0] + 0.15


def test_cleanrl_style_ppo() -> None:
    history = cleanrl_style_ppo.train(cleanrl_style_ppo.Args(total_steps=16_000, length=2, alphabet="abc"))
    assert history[-1] > history[0] + 0.2


def test_torchrl_reinforce() -> None:
    history = torchrl_reinforce.train(
        40, 16, 1e-3, 0, {"length": 1, "alphabet": "ab", "dense": True, "num_train": 2, "num_test": 0}
    )
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.15


def test_hints() -> None:
    without, told = (sum(hints.train(given, 6, seed=0)[-2:]) for given in (False, True))
    assert told > without + 0.2


@pytest.mark.slow
def test_rlhf_end_to_end(tmp_path: Path) -> None:
    found = rlhf_end_to_end.pipeline(tmp_path, steps=100, pairs=512, iterations=2, members=2)
    assert list(found) == ["after SFT", "PPO with a reward model", "PPO with 2 reward models", "DPO"]
    assert len(set(found.values())) == 4
    assert (tmp_path / "several" / "member-2" / "reward-model.json").is_file()


def test_game() -> None:
    assert game.train(25, seed=0) > 0.5  # at random: 0.3
    assert game.score_of(lambda low, high: (low + high) // 2) > 0.7


def test_rollout() -> None:
    episodes = rollout.rollout("Copy", "tiny", episodes=10, num_envs=4, temperature=1.0, seed=0)
    assert len(episodes) == 10
    assert episodes == rollout.rollout("Copy", "tiny", episodes=10, num_envs=4, temperature=1.0, seed=0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sandbox.py", ["--hostile", "30", "--rounds", "1"]),
        pytest.param("multi_turn.py", ["--texts", "4", "--rounds", "1"], marks=pytest.mark.slow),
        pytest.param("reward_memory.py", ["--model", "tiny", "--members", "2"], marks=pytest.mark.slow),
    ],
)
def test_benchmarks_of_tasks(name: str, arguments: list[str]) -> None:
    pytest.importorskip("sandlock")
    command = [sys.executable, str(EXAMPLES / "benchmarks" / name), "--json", *arguments]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert all(isinstance(value, float | int) for value in found.values())
    assert found.get("escapes", 0) == found.get("wrong_verdicts", 0) == 0


def test_benchmark_prints_a_flat_json_object() -> None:
    command = [sys.executable, str(EXAMPLES / "benchmarks" / "env_step.py"), "--json"]
    output = subprocess.run(
        [*command, "--envs", "64", "--steps", "20", "--rounds", "1"], capture_output=True, text=True, check=True
    ).stdout
    results = json.loads(output)
    assert {"vector_over_cartpole_64", "torchrl_over_gymwrapper_64"} <= set(results)
    assert all(isinstance(value, int | float) for value in results.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_vllm_benchmark_prints_a_flat_json_object() -> None:
    command = [sys.executable, str(EXAMPLES / "benchmarks" / "vllm_step.py"), "--json", "--fast", "--smollm2"]
    done = subprocess.run(
        [*command, "--tiny", "4", "--tokens", "4", "--rounds", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {"step_over_generate_tiny_b4", "collect_over_generate_tiny_b4", "weight_update_over_copy_tiny"} <= set(
        results
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["custom_task", "sb3_ppo", "cleanrl_style_ppo", "torchrl_reinforce", "hints", "rollout"]
)
def test_from_the_command_line(name: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean return" in done.stdout
