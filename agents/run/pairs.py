"""A run that learns from pairs: what it reads, its checkpoints, the best model, and what is said on the way."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from agents.config.checks import out_of_range
from agents.config.files import ConfigError, complain
from agents.config.preferences import PairConfig
from agents.preferences.pairs import Pair, read_pairs
from agents.preferences.steps import PairTrainer
from agents.run.claim import claim
from agents.run.summary import rough_time
from agents.state.checkpoint import Checkpoint, latest_checkpoint, rng_state, save_checkpoint, set_rng_state

SETTINGS = "settings.json"
"""What a run was told, in its folder."""


def begin(config: PairConfig, resume: bool, wrong: Sequence[str] = ()) -> tuple[list[Pair], list[Pair]]:
    """Check what a run is told, make the folder its own, and read the pairs: those to learn from, and those held out.

    Args:
        config: what it is told.
        resume: it has begun already.
        wrong: contradictions in it.
    """
    complain([*out_of_range(config), *wrong])
    claim(config.out / SETTINGS, dataclasses.asdict(config), resume)
    pairs = read_pairs(config.pairs)
    train, test = pairs.split(config.validation, config.seed)
    if not train or (config.validation and not test):
        raise ConfigError(
            f"{config.pairs} has {len(pairs)} pairs, of which {len(test)} are held out: use more pairs, or another "
            "--validation"
        )
    left_out = "".join(f", {count} left out ({reason})" for reason, count in pairs.left_out.items())
    print(f"{len(train)} pairs to learn from, {len(test)} held out{left_out}")
    for warning in pairs.warnings():
        print(f"warning: {warning}")
    return train, test


class PairRun:
    """All steps of a trainer.

    Args:
        trainer: what steps.
        checkpoints: the folder of its checkpoints.
        name: what lines begin with.
        export: writes the model; it is given what was measured of it.

    Attributes:
        best: what was measured of the best model.
    """

    def __init__(
        self, trainer: PairTrainer, checkpoints: Path, name: str, export: Callable[[dict[str, float]], None]
    ) -> None:
        self.trainer = trainer
        self.checkpoints = checkpoints
        self.name = name
        self.best: dict[str, float] = {"loss": math.inf}
        self._export = export

    def go(self) -> dict[str, float]:
        """All steps that are left; what was measured of the best model."""
        trainer = self.trainer
        every = max(1, trainer.total // trainer.config.evaluations)
        self._resume()
        begun, first = time.perf_counter(), trainer.steps
        losses: list[float] = []
        while trainer.steps < trainer.total:
            losses.append(trainer.step())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss of step {trainer.steps} is {losses[-1]}: try a lower --learning-rate")
            if trainer.steps % every and trainer.steps < trainer.total:
                continue
            seconds = (time.perf_counter() - begun) / (trainer.steps - first) * (trainer.total - trainer.steps)
            left = f"   about {rough_time(seconds)} left" if trainer.steps < trainer.total else ""
            said = f"{self.name}step {trainer.steps} of {trainer.total}   loss {sum(losses) / len(losses):.4f}"
            print(f"{said}{self._judge()}{left}", flush=True)
            losses = []
            self._save()
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return self.best

    def _judge(self) -> str:
        """Look at the held-out pairs, and keep the model if it is the best so far; without any, keep the latest."""
        said = ""
        found = {"loss": -float(self.trainer.steps)}
        if self.trainer.config.validation:
            found = self.trainer.evaluate()
            said = f"   held-out loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f} ± {found['interval']:.3f}"
        if not found["loss"] < self.best["loss"]:
            return said
        self.best = {**found, "step": self.trainer.steps}
        self._export(self.best)
        return f"{said}   (best)" if said else said

    def _save(self) -> None:
        tensors, state = self.trainer.state()
        tensors["rng"] = rng_state()
        best = {name: value for name, value in self.best.items() if math.isfinite(value)}
        save_checkpoint(self.checkpoints, Checkpoint(self.trainer.steps, tensors, {**state, "best": best}), keep=1)

    def _resume(self) -> None:
        checkpoint, refused = latest_checkpoint(self.checkpoints)
        for reason in refused:
            print(f"warning: {reason}")
        if checkpoint is not None:
            self.trainer.load_state(checkpoint.tensors, checkpoint.state)
            set_rng_state(checkpoint.tensors["rng"])
            self.best = {"loss": math.inf, **checkpoint.state["best"]}
            print(f"{self.name}going on from step {checkpoint.step}")
