"""The PPO benchmarks, shortened, without TRL; and that they measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ppo_shared  # noqa: E402


def run(script: str, *arguments: str) -> dict[str, float | str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert all(isinstance(value, int | float | str | None) for value in results.values())
    return results


def test_texts_of_the_throughput_benchmark_have_exactly_their_length() -> None:
    shape = ppo_shared.Shape("tiny", 64, 5, 7)
    run_ = ppo_shared.open_run(ppo_shared.configuration(shape))
    run_.algorithm.step()
    batch = run_.algorithm.batch
    assert batch is not None
    assert batch.data["mask"].sum(1).tolist() == [7] * 64
    assert batch.data["prompt_length"].tolist() == [5] * 64
    run_.close()


@pytest.mark.slow
def test_the_benchmark_of_ragged_texts() -> None:
    results = run("ragged.py", "--json", "--no-trl", "--models", "tiny", "--rounds", "1")
    assert results["packed_over_padded_per_padding_ratio_tiny"] == pytest.approx(
        results["packed_over_padded_tiny"] / results["padding_ratio_tiny"], rel=1e-2
    )
    assert 1.5 < results["padding_ratio_tiny"] < 2.5


@pytest.mark.slow
def test_the_throughput_benchmark_prints_a_flat_json_object() -> None:
    results = run("ppo_throughput.py", "--json", "--no-trl", "--models", "tiny", "--rounds", "1")
    assert {
        "update_over_bare_tiny",
        "update_over_bare_tiny_separate",
        "same_work_iteration_seconds_tiny",
        "default_iteration_seconds_tiny",
        "memory_lora_over_one_model_tiny",
        "update_us_per_token_len32",
        "update_us_per_token_len512",
    } <= set(results)
    assert not any("trl" in name for name in results)
