"""Environments by id in processes that have not imported llm_env, such as workers of Gymnasium's `AsyncVectorEnv`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IN_WORKERS = """
import sys
import gymnasium
import numpy as np
import torch

def build():
    return gymnasium.make("llm_env:llm_env/Copy-v0", engine="transformers", observe="logits")

if __name__ == "__main__":
    torch.set_num_threads(2)
    (torch.arange(10.0**6) * 1e-6).exp().sum()  # as a learner would: in several threads
    assert "llm_env" not in sys.modules
    envs = gymnasium.vector.AsyncVectorEnv([build] * 2, context=sys.argv[1])
    envs.reset(seed=0)
    observation, *_ = envs.step(np.array([70, 71]))
    assert observation["logits"].shape == (2, 100)
    assert observation["logits"].any(axis=1).all()
    envs.close()
"""

BY_ID = """
import gymnasium
print(gymnasium.make("llm_env:llm_env/Copy-v0").unwrapped)
print(gymnasium.make_vec("llm_env:llm_env/Copy-v0", num_envs=2))
"""


def run(script: Path, *arguments: str) -> str:
    """What a script prints, run with several threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_module_in_front_of_an_id_makes_it_known(tmp_path: Path) -> None:
    script = tmp_path / "by_id.py"
    script.write_text(BY_ID)
    assert run(script).splitlines() == [
        "TokenEnv(Copy, model='tiny', context=20)",
        "TokenVectorEnv(Copy, num_envs=2, model='tiny', context=20)",
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked here")
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_engines_in_workers(tmp_path: Path, context: str) -> None:
    """Forked, they hung: the parent's torch had started threads."""
    script = tmp_path / "in_workers.py"
    script.write_text(IN_WORKERS)
    said = run(script, context)
    assert ("computes in one thread here" in said) == (context == "fork")
