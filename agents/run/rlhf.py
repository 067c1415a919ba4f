"""The whole pipeline, again and again: texts, comparisons, reward models, and a policy that learns to please them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agents.config import TrainConfig
from agents.config.checks import flatten, out_of_range
from agents.config.files import DECAYS, ConfigError, check_config, complain, load_config, refuse_changes, save_config
from agents.config.preferences import RewardModelConfig, RLHFConfig
from agents.preferences.collect import collect
from agents.run.claim import claim
from agents.run.intervals import mean_with_interval
from agents.run.judge import Judgement, judge
from agents.run.reward_model import train_reward_models
from agents.run.training import fine_tune, train
from llm_env.files import replace_file, replace_folder, write_rows
from rewards import RewardModel, Rollout

SETTINGS = "rlhf.json"
"""What the pipeline was told, beside the configuration of the policy's run."""
RESULTS = "round.json"
"""What is known of a round; where it is there, the round is done."""
MOST_PROMPTS = 256
"""After how many prompts texts are compared, at most; where more pairs are wanted, several after each."""
ROUNDS = "reward-models"
"""The folder of the reward models, a folder for each round; `RewardModel` reads the last of them."""


def train_rlhf(config: TrainConfig, how: RLHFConfig, resume: bool = False) -> list[dict[str, Any]]:
    """All rounds; what was measured after each, "reward" among it: what the task itself pays for held-out texts.

    The task's reward is that of whoever compares: it labels pairs of texts, and the policy never sees it. In each round
    the policy writes, its texts are compared, reward models are trained on all pairs so far, and the policy goes on
    learning from those.

    Args:
        config: of the policy's run; its iterations are those of each round.
        how: what comes before.
        resume: go on where the same command was stopped. The numbers are those of one that never was. It may be told
            more rounds.

    Examples:
        >>> import tempfile
        >>> small = {"sft__steps": 40, "rollout__batch_size": 8, "evaluation__prompts": 8, "log__display": False}
        >>> config = TrainConfig(out=Path(tempfile.mkdtemp()) / "run", iterations=1).replace(**small)
        >>> config = config.replace(task__name="Copy", task__args={"length": 3, "dense": True})
        >>> start, first = train_rlhf(config, RLHFConfig(rounds=1, pairs=256, members=1, max_length=32))
        <BLANKLINE>
        the supervised warm start
        <BLANKLINE>
        round 1 of 1: texts and their comparison
        ...
        >>> first["round"], 0 < first["pairs"] <= 256
        (1, True)
    """
    _check(config, how)
    claim(config.out / SETTINGS, dataclasses.asdict(how), resume, free=("rounds",))
    saved = config.out / "config.yaml"
    if saved.exists():
        refuse_changes(load_config(saved), config)
    save_config(config, saved)
    start = config.model.name
    if config.sft.steps:
        start = str(_once(config.out / "sft" / "model", lambda: _warm(config)))
    before = _once(config.out / "start.json", lambda: _measure_start(config, start))
    found = [dict(json.loads(before.read_text()))]
    found += [_Round(config, how, start, number).go() for number in range(1, how.rounds + 1)]
    with replace_folder(config.out / "model") as new:
        shutil.copytree(config.out / "policy" / "model", new, dirs_exist_ok=True)
    return found


class _Round:
    """One round. Each step is done once, and leaves a file that says so.

    Args:
        config: of the whole.
        how: of the whole.
        start: the first policy.
        number: of the round, from 1.
    """

    def __init__(self, config: TrainConfig, how: RLHFConfig, start: str, number: int) -> None:
        self.config, self.how, self.start, self.number = config, how, start, number
        self.folder = config.out / f"round-{number}"
        self.models = config.out / ROUNDS / f"round-{number}"
        self.policy = config.out / "policy"

    def go(self) -> dict[str, Any]:
        """All steps that are left."""
        done = self.folder / RESULTS
        if not done.is_file():
            self._say("texts and their comparison")
            pairs = _once(self.folder / "pairs.jsonl", self._compare)
            self._say("reward models")
            self._learn_to_judge()
            self._say("the policy")
            self._learn_to_please()
            _write(done, json.dumps(self._measure(pairs), indent=2) + "\n")
        found: dict[str, Any] = json.loads(done.read_text())
        return found

    def _say(self, what: str) -> None:
        print(f"\nround {self.number} of {self.how.rounds}: {what}", flush=True)

    def _model(self) -> str:
        """The policy before this round."""
        return self.start if self.number == 1 else str(self.policy / "model")

    def _compare(self) -> None:
        """Write texts after training prompts, and pair them by what the task pays."""
        prompts = min(self.how.pairs, MOST_PROMPTS)
        found = _judged(self.config, self._model(), "train", prompts, 2 * -(-self.how.pairs // prompts), self.number)
        pairs = collect(
            found.sampled_rows,
            noise=self.how.noise,
            seed=self.config.seed + self.number,
        )
        if not pairs.rows:
            raise ConfigError(
                f"all texts of round {self.number} that could be compared have equal scores: begin with a model that "
                "is right now and then (--sft.steps), or with more --pairs"
            )
        print(f"{len(pairs.rows)} pairs, {pairs.flipped} of them the wrong way round, {pairs.ties} ties left out")
        write_rows(self.folder / "pairs.jsonl", pairs.rows)

    def _learn_to_judge(self) -> None:
        """Train reward models on all pairs so far, from the first policy's weights."""
        every = self.folder / "all-pairs.jsonl"
        before = [self.config.out / f"round-{number}" / "pairs.jsonl" for number in range(1, self.number + 1)]
        _write(every, "".join(path.read_text() for path in before))
        given = {name: getattr(self.how, name) for name in ("members", "epochs", "batch_size", "max_length")}
        settings = RewardModelConfig(
            every, self.models, self.start, learning_rate=self.how.learning_rate, seed=self.config.seed, **given
        )
        train_reward_models(settings, resume=self.models.exists())

    def _learn_to_please(self) -> None:
        """Go on with the policy's run."""
        args = {"path": str(self.config.out / ROUNDS), "held_out": self.how.members > 2}
        run = self.config.replace(
            out=self.policy,
            model__name=self.start,
            iterations=self.number * self.config.iterations,
            sft__steps=0,
            task__reward="reward_model",
            task__reward_args={**args, "max_length": self.how.max_length},
        )
        train(run, resume=(self.policy / "config.yaml").exists())

    def _measure(self, pairs: Path) -> dict[str, Any]:
        """What the task pays for held-out texts, and how often the new reward models are right about the next texts."""
        prompts = self.config.evaluation.prompts
        found = _judged(self.config, str(self.policy / "model"), "test", prompts, 2, self.number)
        fresh = collect(found.sampled_rows, seed=self.config.seed).rows
        right = {"accuracy_on_its_texts": right_about(self.models, fresh)} if fresh else {}
        return {
            "round": self.number,
            "reward": mean_with_interval(found.sampled.mean(1)),
            "pairs": len(pairs.read_text().splitlines()),
            **right,
        }


def _measure_start(config: TrainConfig, start: str) -> None:
    found = _judged(config, start, "test", config.evaluation.prompts, 2, 0)
    row = {"round": 0, "reward": mean_with_interval(found.sampled.mean(1))}
    _write(config.out / "start.json", json.dumps(row, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as new:
        new.write_text(text, encoding="utf-8")


def _judged(config: TrainConfig, model: str, split: str, prompts: int, samples: int, number: int) -> Judgement:
    """A model's texts, with what the task pays for them; with other random numbers in each round."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]) >> 1
    return judge(config.replace(evaluation__split=split, evaluation__prompts=prompts, seed=seed), model, samples)


def _check(config: TrainConfig, how: RLHFConfig) -> None:
    """Raise for what would go wrong in a later round at the latest."""
    wrong = list(out_of_range(how))
    settings = dict(flatten(config))
    wrong += [
        f"{name} is {settings[name]}, which falls to the last iteration of a run, but here each of {how.rounds} rounds "
        "has its iterations: use constant"
        for name in DECAYS
        if how.rounds > 1 and settings[name] != "constant"
    ]
    if not config.iterations:
        wrong.append("iterations is 0: expected how many the policy learns for in each round")
    complain(wrong)
    check_config(config)


def _once(path: Path, make: Callable[[], object]) -> Path:
    """A file or folder, made if it is not there."""
    if not path.exists():
        make()
    return path


def _warm(config: TrainConfig) -> None:
    """The warm start of the first policy."""
    print("\nthe supervised warm start", flush=True)
    folder = config.out / "sft"
    fine_tune(config.replace(out=folder), resume=(folder / "config.yaml").exists())


def right_about(models: Path, rows: list[dict[str, Any]]) -> float:
    """How often reward models together prefer the chosen text."""
    judge = RewardModel(str(models))
    chosen, rejected = (
        judge([Rollout.of(row[name], row["prompt"]) for row in rows]) for name in ("chosen", "rejected")
    )
    judge.close()
    better = [np.sign(one.value - other.value) for one, other in zip(chosen, rejected, strict=True)]
    return float(0.5 + 0.5 * np.mean(better))
