"""Trainers of libraries that live in environments of their own (`make test-peers`): their returns rise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = str(Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)

TASK = {"length": 2, "alphabet": "ab", "dense": True}


def test_rllib() -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.rllib")
    import rllib_ppo

    runtime = {"env_vars": {"PYTHONPATH": EXAMPLES}}
    ray.init(include_dashboard=False, configure_logging=False, num_cpus=2, runtime_env=runtime)
    try:
        returns = rllib_ppo.train(6, 0, TASK)
    finally:
        ray.shutdown()
    assert returns[-1] > max(0.8, returns[0] + 0.2)


def test_tianshou() -> None:
    pytest.importorskip("tianshou")
    import tianshou_ppo

    returns = tianshou_ppo.train(5, 0, TASK)
    assert returns[-1] > max(0.8, returns[0] + 0.2)
