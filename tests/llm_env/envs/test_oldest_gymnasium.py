"""The environments with the oldest Gymnasium that pyproject.toml allows; all other tests run with the one installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def oldest_allowed() -> str:
    """The lower bound, as `gymnasium==...`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [found for each in project["dependencies"] if (found := re.match(r"gymnasium>=([\d.]+),", each))]
    return f"gymnasium=={bound[1]}"


@pytest.mark.slow
def test_the_environments_run_with_the_oldest_gymnasium(tmp_path: Path) -> None:
    folder = tmp_path / "oldest"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=1", "--timeout=20"]
    installed = subprocess.run(
        [*pip, "--target", str(folder), oldest_allowed()], capture_output=True, text=True, check=False
    )
    if installed.returncode != 0:
        pytest.skip(f"{oldest_allowed()} could not be installed: {installed.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
        )

    version = python("-c", "import gymnasium; print(gymnasium.__version__)").stdout.strip()
    assert f"gymnasium=={version}".startswith(oldest_allowed())
    tests = [f"tests/llm_env/{room}" for room in ("envs", "mdp", "wrappers")]
    done = python(
        "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *tests, "llm_env/envs", "llm_env/wrappers"
    )
    assert done.returncode == 0, done.stdout[-5000:]
