"""Small runs on small models: what the tests of the loop and of whole runs are made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.config import TrainConfig
from agents.config.switches import critic_follows
from agents.report.log import read_metrics
from agents.run.loop import Training
from agents.run.parts import Run, build
from agents.run.training import train
from llm_env.models import load_tokenizer
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout
from tests.agents.small_models import character_model as character_model

Config = Callable[..., TrainConfig]


@register_task
class VowelShare(Task):
    """Every text has another score; some meet a consonant, the others are cut off, and valued where they were."""

    stop = tuple("bcdfghjklmnpqrstvwxz")
    max_new_tokens = 5
    max_prompt_tokens = 12
    when_cut = "bootstrap"
    num_train = 40
    num_test = 8
    hint_names = ("vowels",)

    def sample(self, rng: Any) -> Prompt:
        return Prompt("".join(chr(97 + c) for c in rng.integers(26, size=int(rng.integers(1, 12)))))

    def score(self, rollout: Rollout) -> float:
        return 0.3 * self.hints(rollout)[0] + 0.1 * rollout.num_actions

    def hints(self, rollout: Rollout) -> tuple[float]:
        return (float(sum(letter in "aeiou" for letter in rollout.text)),)


@register_task
class NoNumberHeldOut(VowelShare):
    """The same, but the score of a held-out prompt is no number. Prompts have answers, for a warm start."""

    def splits(self) -> dict[str, list[Prompt]]:
        return {
            name: [Prompt(prompt.text, {"answer": "ab", "held_out": name == "test"}) for prompt in prompts]
            for name, prompts in super().splits().items()
        }

    def score(self, rollout: Rollout) -> float:
        return math.nan if rollout.metadata["held_out"] else super().score(rollout)


def train_until_it_breaks(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, iteration: int, in_the_middle: bool = False
) -> None:
    """Train until an error at an iteration, or in the middle of it, when the batch has been learned from."""
    honest = Training.iterate

    def breaks(self: Training) -> Any:
        if self.algorithm.iteration == iteration:
            if in_the_middle:
                self.algorithm.step()
            raise RuntimeError("the power is gone")
        return honest(self)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "iterate", breaks)
        with pytest.raises(RuntimeError, match="power"):
            train(config)


def save_small_model(folder: Path, **options: Any) -> Path:
    """The same as a folder, with its tokenizer."""
    character_model(**options).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder


WITHOUT_CRITIC = ("grpo", "rloo")


def small_config(out: Path, model: Path | str, **changes: object) -> TrainConfig:
    """A run of a few seconds: small batches, no display, and the task Copy of two letters out of four."""
    base = TrainConfig(out=out).replace(
        iterations=3,
        task__name="Copy",
        task__args={"length": 2, "alphabet": "abcd", "dense": True},
        model__name=str(model),
        rollout__batch_size=16,
        actor__epochs=2,
        actor__minibatches=2,
        actor__learning_rate=3e-3,
        evaluation__prompts=8,
        evaluation__every=2,
        log__display=False,
        log__samples_every=2,
        checkpoint__every=1,
    )
    without = changes.get("algo") in WITHOUT_CRITIC or changes.get("loss__value") == 0
    if without or changes.get("model__critic") == "fitted":
        return base.replace(**changes)
    # One that learns by steps has more that can go wrong than the default has.
    made = base.replace(**{"model__critic": "shared", "critic__epochs": 2, "critic__learning_rate": 3e-3, **changes})
    # A critic that follows the policy has no portions of its own to choose.
    return made if critic_follows(made) else made.replace(**{"critic__minibatches": 2, **changes})


@contextlib.contextmanager
def running(config: TrainConfig) -> Iterator[Run]:
    """The parts of a run, freed in the end."""
    run = build(config)
    try:
        yield run
    finally:
        run.close()


def learn(config: TrainConfig) -> tuple[Run, list[dict[str, float]]]:
    """All iterations, without files; the run and the metrics of each iteration."""
    with running(config) as run:
        history = []
        while run.algorithm.iteration < config.iterations:
            history.append(run.algorithm.step())
            run.update_engine()
        return run, history


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """A copy of everything that was trained."""
    return {name: weight.clone() for name, weight in run.algorithm.network.weights().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Weights agree."""
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).abs().max() <= tolerance, name


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The metrics but what a clock has to do with."""
    return {name: value for name, value in row.items() if not name.startswith(("time", "speed"))}


def same_metrics(one: TrainConfig, other: TrainConfig) -> None:
    """Two runs have logged the same, up to rounding."""
    for ours, theirs in zip(read_metrics(one.out), read_metrics(other.out), strict=True):
        ours, theirs = without_times(ours), without_times(theirs)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


@torch.no_grad()
def wake_up(run: Run) -> None:
    """Values that are not zero, and a policy that has left its reference."""
    network = run.algorithm.network
    # A fitted head is no parameter of the critic.
    head = {f"value_head.{name}": weight for name, weight in network.value_head.named_parameters()}
    for weight in (network.actor_parameters() | network.critic_parameters() | head).values():
        weight += 0.05 * torch.randn_like(weight)
    run.update_engine()


def moved(run: Run, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parts of the network have changed."""
    after = weights_of(run)
    return {
        ("head" if "value_head" in name else name.partition(".")[0])
        for name, weight in before.items()
        if not torch.equal(weight, after[name])
    }
