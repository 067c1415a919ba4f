"""Whole runs: what they leave behind, and that a stop is only a pause."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.config import TrainConfig
from agents.config.files import ConfigError, load_config, save_config
from agents.report.log import read_metrics
from agents.run import loop
from agents.run.loop import Result
from agents.run.training import fine_tune, train
from llm_env.models import load_model
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score
from tests.agents.runs import WITHOUT_CRITIC, running, save_small_model, small_config, train_until_it_breaks

Config = Callable[..., TrainConfig]

# What every iteration writes down with a reference model and a critic.
NAMES = """
    iteration episodes tokens time
    reward/mean reward/std reward/failures return/mean
    kl/reference kl/sequence kl/beta kl/old
    policy/loss policy/clip_fraction policy/entropy policy/gradient_norm policy/learning_rate policy/epochs
    ratio/mean ratio/max ratio/min ratio/ess
    value/loss value/explained_variance value/gradient_norm value/learning_rate
    text/length text/cut text/distinct_1 text/distinct_2 text/eos
    speed/rollout_tokens_per_s speed/update_tokens_per_s
    time/rollout time/score time/update time/weights time/total
    guard/skipped guard/unscored
""".split()  # noqa: SIM905


@register_task
class NoTest(Task):
    """Nothing is held out; the score has parts."""

    max_new_tokens = 2
    max_prompt_tokens = 1

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("a"), Prompt("b")]}

    def score(self, rollout: Rollout) -> Score:
        letters = sum(character.isalpha() for character in rollout.text)
        return Score(letters, {"letters": letters})


@register_task
class Failing(NoTest):
    """Its reward is no number at all."""

    def score(self, rollout: Rollout) -> Score:
        return Score(math.nan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.1)


def config_in(out: Path, folder: Path, **changes: object) -> TrainConfig:
    own: dict[str, object] = {"iterations": 5, "sft__steps": 30, "sft__learning_rate": 1e-2, "kl__beta": 0.05}
    return small_config(out, folder, **own | changes)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    return lambda **changes: config_in(tmp_path / "run", folder, **changes)


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Result]:
    """An undisturbed run."""
    config = config_in(tmp_path_factory.mktemp("runs") / "run", folder)
    return config, train(config)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The metrics as they are written, without what a clock has to do with."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time", "speed"))} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows_of(one) == rows_of(other)
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert (one / name).read_text() == (other / name).read_text()
    for name in ("model", "best"):
        ours, theirs = (load_file(out / name / "model.safetensors") for out in (one, other))
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            assert torch.equal(weight, theirs[key]), f"{name}: {key}"
    assert not [path.name for path in other.iterdir() if path.name.startswith(".")]


# What is left behind.


@pytest.mark.parametrize(("every", "minutes", "kept"), [(20, 1e-9, 2), (20, 10.0, 1), (0, 1e-9, 1), (1, 10.0, 2)])
def test_when_checkpoints_are_written(
    config: Config, monkeypatch: pytest.MonkeyPatch, every: int, minutes: float, kept: int
) -> None:
    """Every so many iterations, and when the last is long ago; one more at the end, whatever it is."""
    saved: list[int] = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda out, checkpoint, keep: saved.append(checkpoint.step))
    made = config(iterations=2, checkpoint__every=every, checkpoint__minutes=minutes, evaluation__every=0)
    train(made)
    assert sorted(set(saved)) == ([1, 2] if kept == 2 else [2])


def test_the_files_of_a_run(done: tuple[TrainConfig, Result]) -> None:
    config, result = done
    assert sorted(path.name for path in config.out.iterdir()) == [
        "best",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "machine.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "samples.jsonl",
        "sft",
        "tokens.jsonl",
    ]
    assert load_config(config.out / "config.yaml") == config
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    assert result.finished
    assert result.model == config.out / "model"
    assert result.curves.read_bytes().startswith(b"\x89PNG")


def test_the_numbers_of_a_run(done: tuple[TrainConfig, Result]) -> None:
    config, result = done
    first, *rows = read_metrics(config.out)
    assert first.keys() == {"iteration", "tokens", "time", *result.before}
    assert [first["iteration"], *(row["iteration"] for row in rows)] == list(range(6))
    for row in rows:
        assert set(NAMES) <= row.keys(), set(NAMES) - row.keys()
        missing = [name for name, value in row.items() if math.isnan(value) and name != "value/explained_variance"]
        assert not missing
        judged = row["iteration"] in (2, 4, 5)  # every second one, and the last
        assert ("eval/sampled" in row) == ("eval/greedy" in row) == ("time/eval" in row) == judged
    for name in ("tokens", "time"):
        assert all(one[name] < other[name] for one, other in zip([first, *rows], rows, strict=False))
    assert rows[-1]["tokens"] == sum(row["text/length"] * row["episodes"] for row in rows)
    assert result.before == {name: first[name] for name in result.before}
    assert result.after == {name: rows[-1][name] for name in result.after}
    assert 0 <= result.after["eval/greedy"] <= 1
    assert rows[0]["kl/reference"] == pytest.approx(0, abs=1e-5)  # the reference is the warm start
    assert abs(rows[-1]["kl/reference"]) > 1e-3


def test_the_samples_of_a_run(done: tuple[TrainConfig, Result]) -> None:
    config, _ = done
    samples = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    assert [sample["iteration"] for sample in samples] == [i for i in (0, 2, 4, 5) for _ in range(3)]
    for sample in samples:
        assert sample["prompt"].startswith("copy ")
        assert sample["end"] in ("eos", "budget")
        assert 0 <= sample["reward"] <= 1


def test_models_are_ordinary_folders(done: tuple[TrainConfig, Result]) -> None:
    """Transformers loads them, and they compute what the network of the run did."""
    config, _ = done
    checkpoint = load_file(config.out / "checkpoints" / "step-00000005" / "weights.safetensors")
    for name in ("model", "best", "sft"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(config.out / name)
        tokenizer = AutoTokenizer.from_pretrained(config.out / name)
        tokens = torch.tensor([tokenizer.encode("copy ab: ")])
        assert tokenizer.decode(tokens[0]) == "copy ab: "
        with torch.no_grad():
            logits = loaded(tokens).logits
        assert logits.std() > 0.1
        if name == "model":
            fresh: Any = load_model(config.model.name)
            state = {key.removeprefix("actor."): w for key, w in checkpoint.items() if key.startswith("actor.")}
            fresh.load_state_dict(state, strict=False)
            with torch.no_grad():
                torch.testing.assert_close(fresh(tokens).logits, logits)
                assert not torch.allclose(load_model(config.model.name)(tokens).logits, logits, atol=1e-2)


def test_the_best_model_is_the_best(done: tuple[TrainConfig, Result], tmp_path: Path) -> None:
    """Judged again, it has the best score of the run."""
    config, _ = done
    best = max(row["eval/sampled"] for row in read_metrics(config.out) if "eval/sampled" in row)
    with running(config.replace(model__name=str(config.out / "best"), sft__steps=0)) as run:
        assert run.evaluator is not None
        assert run.evaluator.evaluate().metrics["eval/sampled"] == pytest.approx(best, abs=1e-6)


def test_the_warm_start_has_helped(config: Config) -> None:
    made = config(sft__steps=150, iterations=1)
    warm = train(made)
    cold = train(made.replace(sft__steps=0, out=made.out.with_name("cold")))
    assert warm.before["eval/greedy"] > cold.before["eval/greedy"] + 0.2


def test_the_warm_start_alone(config: Config) -> None:
    made = config(sft__steps=150)
    model = fine_tune(made)
    assert model == made.out / "model"
    assert sorted(path.name for path in made.out.iterdir()) == ["config.yaml", "model"]
    with running(made.replace(model__name=str(model))) as run:
        assert run.evaluator is not None
        assert run.evaluator.evaluate().metrics["eval/greedy"] > 0.3


@pytest.mark.parametrize("algo", ["grpo", "a2c", "reinforce", "rloo"])
def test_other_algorithms_and_lora_are_runs_too(config: Config, algo: str) -> None:
    group = {"rollout__completions_per_prompt": 4} if algo in WITHOUT_CRITIC else {}
    made = config(algo=algo, iterations=2, model__lora__rank=2, **group)
    assert train(made).finished
    loaded: Any = AutoModelForCausalLM.from_pretrained(made.out / "model")
    assert not any("lora" in name for name, _ in loaded.named_parameters())


# Stopping and going on.


def test_a_run_that_is_done_stays_done(done: tuple[TrainConfig, Result], tmp_path: Path) -> None:
    import shutil

    config, result = done
    copy = tmp_path / "copy"
    shutil.copytree(config.out, copy)
    again = train(config.replace(out=copy), resume=True)
    assert again.finished
    assert (again.before, again.after) == (result.before, result.after)
    assert_same_run(config.out, copy)


@pytest.mark.parametrize(("checkpoint", "task"), [(1, "Copy"), (2, "Copy"), (0, "Copy"), (2, "NoTest")])
def test_a_run_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str, checkpoint: int
) -> None:
    """An error in the middle of an iteration: the same folder goes on to the same end."""
    args = config().task.args if task == "Copy" else {}
    steps = 30 if task == "Copy" else 0
    made = config(task__name=task, task__args=args, sft__steps=steps, checkpoint__every=checkpoint)
    whole = made.replace(out=tmp_path / "whole")
    train(whole)
    train_until_it_breaks(made, monkeypatch, iteration=3, in_the_middle=True)
    train(made, resume=True)
    if task == "Copy":
        assert_same_run(whole.out, made.out)
    else:
        assert rows_of(whole.out) == rows_of(made.out)
        assert not (made.out / "best").exists()
        train(made, resume=True)  # done: nothing is left to do, and nothing was ever judged
        assert rows_of(whole.out) == rows_of(made.out)


def test_a_goal_that_is_reached_ends_the_run(config: Config) -> None:
    made = config(evaluation__stop_at=0.0)
    result = train(made)
    assert result.finished
    assert [row["iteration"] for row in read_metrics(made.out)] == [0]
    train(made, resume=True)
    assert [row["iteration"] for row in read_metrics(made.out)] == [0]


def test_a_reward_that_is_no_number_from_the_first_batch_on(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """It is counted, and there is no sample to show; the run ends with advice."""
    from agents.algorithms.steps import TrainingDiverged

    made = config(task__name="Failing", task__args={}, sft__steps=0, iterations=4, log__samples_every=1)
    with pytest.raises(TrainingDiverged, match="finite number for any text"):
        train(made.replace(guard__max_skipped=3))
    assert [row["guard/unscored"] for row in rows_of(made.out)] == [1, 2]
    printed = capsys.readouterr()
    assert "The reward of a text was not a finite number" in printed.out + printed.err
    assert "learning-rate" not in printed.out + printed.err
    result = train(made.replace(out=made.out.with_name("patient"), guard__max_skipped=9))
    assert result.finished


@pytest.mark.parametrize("command", [train, fine_tune])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rollout__batch_size": 0}, "batch-size is 0"),
        ({"algo": "ppq"}, "unknown algorithm 'ppq'"),
        ({"task__name": "Revers", "task__args": {}}, "unknown task 'Revers'"),
        ({"task__args": {"lenght": 3}}, "cannot make the task"),
        ({"task__reward": "exact"}, "unknown reward 'exact'"),
        ({"rollout__engine": "vlm"}, "unknown engine 'vlm'"),
        ({"model__name": "tinny"}, "unknown model 'tinny'"),
    ],
)
def test_a_wrong_configuration_leaves_nothing_behind(
    config: Config, command: Callable[[TrainConfig], object], wrong: dict[str, object], message: str
) -> None:
    """A folder with a configuration in it would be taken for a run, when the command is given again, mended."""
    made = config(**wrong)
    with pytest.raises((ValueError, TypeError), match=message):
        command(made)
    assert not made.out.exists()


def test_a_warm_start_alone_needs_steps(config: Config) -> None:
    made = config(sft__steps=0)
    with pytest.raises(ConfigError, match=r"--sft.steps is 0, expected how many"):
        fine_tune(made)
    assert not made.out.exists()


def test_training_in_a_thread(config: Config) -> None:
    """Where no signal can be caught, nothing else is different."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(train(config(sft__steps=0, iterations=1))))
    thread.start()
    thread.join()
    assert found[0].finished


def test_a_handler_of_ctrl_c_is_put_back(config: Config) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(config(sft__steps=0, iterations=1))
    assert signal.getsignal(signal.SIGINT) is before


def command(config: TrainConfig, *more: str) -> list[str]:
    path = config.out.with_suffix(".yaml")
    save_config(config, path)
    return [sys.executable, "-m", "agents.cli", "train", "--config", str(path), "--out", str(config.out), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_ctrl_c_finishes_the_iteration_and_saves(config: Config, tmp_path: Path) -> None:
    made = config(iterations=60, checkpoint__every=0, evaluation__every=0, sft__steps=10, log__display=True)
    process = subprocess.Popen(
        command(made), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    metrics = made.out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 130), said
    assert "stopped by Ctrl-C (go on with --resume)" in said
    last = read_metrics(made.out)[-1]["iteration"]
    assert 3 <= last < 60
    kept = [path.name for path in (made.out / "checkpoints").iterdir()]
    assert kept == [f"step-{int(last):08d}"]
    assert (made.out / "model" / "model.safetensors").exists()
    assert (made.out / "curves.png").exists()

    silent = made.replace(log__display=False)
    train(silent, resume=True)
    whole = silent.replace(out=tmp_path / "whole")
    train(whole)
    assert_same_run(whole.out, made.out)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_run_with_vllm(tmp_path: Path) -> None:
    """Its texts are those of the trainer's own model, from the first batch to the last."""
    folder = save_small_model(tmp_path / "model", width=64, spread=0.1)
    made = config_in(tmp_path / "run", folder, rollout__engine="vllm", rollout__engine_dtype="float32", iterations=3)
    result = subprocess.run(command(made), text=True, capture_output=True, env=environment(), timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    for row in read_metrics(made.out)[1:]:
        assert row["kl/mismatch"] < 1e-2
        assert row["ratio/is_weight"] == pytest.approx(1, abs=1e-2)
        assert row["policy/gradient_norm"] > 0
