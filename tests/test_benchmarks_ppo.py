"""The PPO benchmarks, shortened, without TRL; what they compute from curves; and that they measure what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ppo_learning  # noqa: E402
import ppo_shared  # noqa: E402
from ppo_learning import Point, reached_at, summary  # noqa: E402


def run(script: str, *arguments: str) -> dict[str, float | str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert all(isinstance(value, int | float | str | None) for value in results.values())
    return results


def line(*sampled: float) -> list[Point]:
    return [Point(100.0 * i, 10.0 * i, value, 1.0) for i, value in enumerate(sampled)]


def test_where_a_curve_reaches_an_accuracy() -> None:
    curve = line(0.2, 0.4, 0.3, 0.8)
    assert reached_at(curve, 0.3, "tokens") == pytest.approx(50)
    assert reached_at(curve, 0.6, "seconds") == pytest.approx(26)
    assert reached_at(curve, 0.2, "tokens") == 0
    assert math.isinf(reached_at(curve, 0.9, "tokens"))


def test_the_summary_takes_medians_of_each_seeds_own_ratio() -> None:
    fast, slow, never = line(0.2, 0.6), line(0.2, 0.4, 0.6), line(0.2, 0.3)
    trl = line(0.2, 0.3, 0.3, 0.3, 0.6)  # 400 tokens, 40 seconds
    results = summary({0: {"ours": fast, "trl": trl}, 1: {"ours": slow, "trl": trl}, 2: {"ours": never, "trl": trl}})
    ratios = [results[f"tokens_to_trl_final_over_trl_seed{seed}"] for seed in range(3)]
    assert ratios == [0.25, 0.5, None]
    assert results["tokens_to_trl_final_over_trl"] == results["seconds_to_trl_final_over_trl"] == 0.5
    assert results["trl_final_sampled"] == 0.6


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


@pytest.mark.slow
def test_the_learning_benchmark_prints_a_flat_json_object_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    options = ["--tokens", "3000", "--every", "1", "--prompts", "32", "--sft-steps", "3", "--seeds", "0"]
    results = run("ppo_learning.py", "--json", "--no-trl", "--png", str(picture), *options)
    assert {"ours_final_sampled", "ours_final_greedy_seed0", "ours_tokens_seed0"} <= set(results)
    assert results["ours_tokens_seed0"] >= 3000
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_learning_benchmark_gives_trl_the_prompts_and_answers_of_the_task() -> None:
    from llm_env.mdp.core import TokenMDP

    mdp = TokenMDP("Reverse")
    prompts, answers = ppo_learning.question_ids(mdp, 3)
    words = [mdp.vocabulary.decode(ids).removeprefix("reverse ").removesuffix(": ") for ids in prompts]
    assert [mdp.vocabulary.decode(ids) for ids in answers] == [word[::-1] for word in words]
