"""Tasks that isolate a fault: each is learned in seconds, and not at all once the one thing it probes is broken."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import agents.algorithms.advantages
import agents.algorithms.base
from agents.config import TrainConfig
from agents.rollouts.writers import EngineWriter
from llm_env.models import load_tokenizer
from llm_env.tasks import Task, register_task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score
from tests.agents.runs import running, save_small_model, small_config

Config = Callable[..., TrainConfig]
XYXY = np.array(load_tokenizer("tiny").encode("xyxy"))


class Probe(Task):
    """Texts of so many tokens, unless they end themselves."""

    max_new_tokens = 1
    max_prompt_tokens = 4

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("a"), Prompt("b"), Prompt("c")]}


@register_task
class ProbeConstant(Probe):
    """One letter is right."""

    def score(self, rollout: Rollout) -> float:
        return float(rollout.text == "k")


@register_task
class ProbePrompt(Probe):
    """Which letter is right depends on the prompt."""

    right = {"a": "x", "b": "y", "c": "z"}  # noqa: RUF012

    def score(self, rollout: Rollout) -> float:
        return float(rollout.text == self.right[rollout.prompt])


@register_task
class ProbeCredit(Probe):
    """Only the first of many letters counts, and all that is known of it comes at the end."""

    max_new_tokens = 6

    def score(self, rollout: Rollout) -> float:
        return float(rollout.text.startswith("k"))


@register_task
class ProbeTiming(Probe):
    """Letters by turns; each is paid for at once, and nothing later counts if the discount is 0."""

    max_new_tokens = 4

    def score(self, rollout: Rollout) -> Score:
        return Score(0.0, per_token=(rollout.tokens == XYXY[: rollout.num_actions]) / 4)


@register_task
class ProbeValue(Probe):
    """One for every token, for ever, as far as the agent is concerned: the budget only interrupts."""

    max_new_tokens = 4
    when_cut = "bootstrap"

    def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows))

    def score(self, rollout: Rollout) -> float:
        return 0.0


@register_task
class ProbeReply(Probe):
    """After the first token the task speaks, and often writes z after an a; after the last a, k is right."""

    max_new_tokens = 2
    max_prompt_tokens = 4
    max_reply_tokens = 9
    stop = tuple(string.printable[:95])  # every letter ends a turn

    def reply(self, rollout: Rollout) -> str | None:
        return "azazazaza" if rollout.num_actions < 2 else None

    def score(self, rollout: Rollout) -> float:
        return float(rollout.text.endswith("k"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    def make(task: str, **changes: object) -> TrainConfig:
        own: dict[str, object] = {
            "task__args": {},
            "iterations": 36,
            "rollout__batch_size": 128,
            "actor__learning_rate": 3e-3,  # at 5e-3, rounding decides which of the last batches is a bad one
            "critic__learning_rate": 1e-2,
            "loss__value_clip": None,  # the critic learns fast here
        }
        return small_config(tmp_path / "run", folder, task__name=task, **own | changes)

    return make


def success(config: TrainConfig) -> float:
    """The mean reward of the last five batches."""
    with running(config) as run:
        rewards = [metrics["reward/mean"] for metrics in run.algorithm]
    return float(np.mean(rewards[-5:]))


def test_one_right_token(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert success(config("ProbeConstant")) > 0.95
    pay_the_neighbour(monkeypatch, 1, 0)
    assert success(config("ProbeConstant")) < 0.5


def test_the_right_token_depends_on_the_prompt(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("ProbePrompt", actor__learning_rate=3e-3)  # at 5e-3 one seed in four ends below the bound
    assert success(made) > 0.95
    pay_the_neighbour(monkeypatch, 1, 0)
    assert success(made) < 0.5


def test_credit_travels_over_many_steps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("ProbeCredit")
    assert success(made) > 0.95
    honest = agents.algorithms.advantages.gae

    def short_sighted(*arguments: Any) -> torch.Tensor:
        *given, _, lmbda = arguments
        return honest(*given, 0.0, lmbda)

    monkeypatch.setattr(agents.algorithms.advantages, "gae", short_sighted)
    assert success(made) < 0.5


@pytest.mark.parametrize("shift", [-1, 1])
def test_rewards_belong_to_their_own_step(config: Config, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    made = config("ProbeTiming", advantage__gamma=0.0, iterations=50)
    if shift > 0:
        assert success(made) > 0.95
    pay_the_neighbour(monkeypatch, shift, 1)
    assert success(made) < 0.6


def pay_the_neighbour(monkeypatch: pytest.MonkeyPatch, shift: int, dimension: int) -> None:
    """The fault: rewards go to the next text (dimension 0) or the next step (1)."""
    honest = agents.algorithms.base.shape_rewards

    def shifted(*arguments: Any) -> torch.Tensor:
        return honest(*arguments).roll(shift, dimension)

    monkeypatch.setattr(agents.algorithms.base, "shape_rewards", shifted)


def values_by_step(config: TrainConfig) -> list[float]:
    """After learning: the mean value of the states before each of the four steps, and of the last one."""
    with running(config) as run:
        for _ in run.algorithm:
            pass
        data: TensorDict = run.algorithm.score(run.algorithm.collector.collect())
    value, mask = data["state_value"][..., 0], data["mask"]
    cut = data["next", "truncated"][..., 0].any(1)
    steps = [float(value[:, step][mask[:, step]].mean()) for step in range(4)]
    return [*steps, float(data["last_value"][cut].mean())]


def test_a_text_that_was_interrupted_would_have_gone_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a token, discounted by half, is worth 2 at any time; a text rarely ends itself (1 in 100 tokens)."""
    made = config(
        "ProbeValue",
        advantage__gamma=0.5,
        model__critic="separate",
        critic_warmup=1000,  # the policy stays as it is
        iterations=60,
        critic__learning_rate=3e-3,
        critic__epochs=4,
    )
    assert values_by_step(made) == pytest.approx([1.98] * 5, abs=0.1)
    honest = agents.algorithms.advantages.gae

    def forgetful(*arguments: Any) -> torch.Tensor:
        reward, value, last_value, mask, truncated, *rest = arguments
        return honest(reward, value, last_value, mask, torch.zeros_like(truncated), *rest)

    monkeypatch.setattr(agents.algorithms.advantages, "gae", forgetful)
    assert values_by_step(made)[:4] == pytest.approx([1.86, 1.74, 1.5, 1.0], abs=0.1)


def test_what_the_task_has_written_is_not_learned(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a baseline every text that is paid for is made likelier: the task's own words too, were they actions."""
    made = config("ProbeReply", advantage__baseline="none", advantage__normalize=False)
    assert success(made) > 0.95
    honest = EngineWriter.episodes

    def all_are_actions(self: EngineWriter, *arguments: Any) -> list[Episode]:
        return [unmasked(episode) for episode in honest(self, *arguments)]

    monkeypatch.setattr(EngineWriter, "episodes", all_are_actions)
    # The log-probs of the task's words are not known; the trainer finds them for itself.
    assert (
        success(made.replace(model__autocast="off", rollout__engine_dtype="float32", loss__importance_cap=None)) < 0.7
    )


def unmasked(episode: Episode) -> Episode:
    """The fault: all tokens after the prompt count as the agent's."""
    old = episode.rollout
    rollout = Rollout(old.prompt_tokens, old.tokens, old.metadata, old.end, None, old._decode)
    return Episode(
        rollout,
        episode.score,
        np.zeros(len(old.tokens), np.float32),
        None,
        episode.truncated,
        episode.prompt_index,
        episode.group,
    )
