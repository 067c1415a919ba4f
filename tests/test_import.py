"""The package starts fast: what it does not need, it does not import."""

from __future__ import annotations

import subprocess
import sys


def imported_by(code: str) -> set[str]:
    """The top-level modules that running some code in a fresh interpreter imports."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_torch_is_not_needed_to_step_the_tiny_vocabulary() -> None:
    modules = imported_by(
        "import gymnasium, llm_env\n"
        "envs = gymnasium.make_vec('llm_env/Reverse-v0', num_envs=2)\n"
        "envs.reset(seed=0)\n"
        "envs.step(envs.action_space.sample())\n"
    )
    assert "llm_env" in modules
    assert not modules & {"torch", "torchrl", "tensordict", "stable_baselines3", "vllm"}


def test_rewards_stand_alone() -> None:
    assert not imported_by("import rewards") & {"torch", "llm_env", "gymnasium", "transformers", "agents"}
