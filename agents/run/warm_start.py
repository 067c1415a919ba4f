"""The warm start of a run: supervised fine-tuning that is judged, and goes on where it was stopped."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.config import TrainConfig
from agents.config.files import ConfigError
from agents.config.schema import Autocast
from agents.networks.ranks import ALONE, Ranks
from agents.report.display import Display
from agents.run.ending import Ending
from agents.run.evaluate import Evaluation
from agents.run.interruption import Interruption
from agents.run.parts import Parts, build_parts, without_learning
from agents.run.precision import settle
from agents.run.sft import SFT
from agents.run.summary import rough_time, samples_of
from agents.state.checkpoint import Checkpoint, latest_checkpoint, rng_state, save_checkpoint, set_rng_state
from llm_env.files import replace_folder

SFT_CHECKPOINTS = "sft-checkpoints"
"""The folder beside the model that is being made."""


@dataclass(frozen=True)
class WarmStart:
    """What a warm start has led to.

    Attributes:
        before: metrics of the evaluation before it (empty if the task has no held-out prompts).
        after: of the one after it.
        samples: texts that the model then wrote.
        autocast: whether it was computed in bfloat16, as all that comes after it is to be.
    """

    before: dict[str, float]
    after: dict[str, float]
    samples: list[dict[str, Any]]
    autocast: Autocast


def warm_start(
    config: TrainConfig,
    folder: Path,
    display: Display,
    resume: bool = False,
    asked: Interruption | None = None,
    ranks: Ranks = ALONE,
) -> WarmStart:
    """Fine-tune the model on the task's own answers, and write it to a folder.

    Its checkpoints lie beside that folder until it is there.

    Args:
        config: of the run.
        folder: of the model that comes out of it.
        display: is told how it goes.
        resume: go on from the last checkpoint, if there is one. The numbers are those of a run that was never stopped.
        asked: looked at after each step; if it says stop, a checkpoint is written and `KeyboardInterrupt` raised.
        ranks: processes that learn together, of which this is the first.
    """
    display.phase("supervised warm start")
    plain = without_learning(config)
    if ranks.size == 1 or config.listen is not None:  # who has come to write texts does not come twice
        plain = plain.replace(listen=None, rollout__engine="transformers")
        plain = plain.replace(rollout__engine_dtype=None, rollout__tensor_parallel=1)
    else:  # the model may be too large for an engine here
        plain = plain.replace(workers=config.workers)
    parts = build_parts(plain, ranks=ranks, supervised=True)
    try:
        config = settle(config, parts.speeds, display)
        progress = _Progress(config, parts, display, folder.with_name(SFT_CHECKPOINTS))
        progress.begin(resume)
        progress.go(asked or Interruption())
        parts.update_engine()
        after = progress.judge()
        with replace_folder(folder) as new:
            parts.network.export(new, parts.tokenizer)
    finally:
        parts.close()
    forget_checkpoints(folder)
    return WarmStart(
        progress.before,
        after.metrics if after else {},
        samples_of(after.episodes) if after else [],
        "on" if parts.network.config.in_bfloat16 else "off",
    )


def forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of the warm start that has made this folder; if it was killed then, they are left."""
    shutil.rmtree(folder.with_name(SFT_CHECKPOINTS), ignore_errors=True)


class _Progress:
    """The supervised steps, their checkpoints, and what is said of them."""

    def __init__(self, config: TrainConfig, parts: Parts, display: Display, checkpoints: Path) -> None:
        self.config = config
        self.parts = parts
        self.display = display
        self.checkpoints = checkpoints
        self.sft = SFT(config.sft, parts.network, parts.mdp, config.seed)
        self.ending = Ending(config.sft, parts.network, self._score, display)
        self.before: dict[str, float] = {}

    def begin(self, resume: bool) -> None:
        """Go on from a checkpoint, or judge the model as it is before the first step."""
        if self.config.sft.stop_at is not None and self.parts.evaluator is None:
            raise ConfigError(
                f"--sft.stop-at is {self.config.sft.stop_at:g}, but the task has no held-out prompts to judge the "
                "model by: leave it out, or give the task some"
            )
        if resume and self._resume():
            return
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        if evaluation := self.judge():
            self.before = evaluation.metrics
        if self.config.sft.checkpoint_every:
            self._save()  # the evaluation may have taken longer than many steps

    def judge(self) -> Evaluation | None:
        """Evaluate the present policy, if there are held-out prompts."""
        evaluation = self.parts.evaluator.evaluate() if self.parts.evaluator else None
        if evaluation and evaluation.failure:
            self.display.warn(evaluation.failure)
        return evaluation

    def go(self, asked: Interruption) -> None:
        """All steps that are left."""
        total, every = self.config.sft.steps, self.config.sft.checkpoint_every
        first, start = self.sft.steps, time.perf_counter()

        def report(step: int, loss: float) -> bool:
            self.display.phase(f"supervised warm start, step {step} of {total}")
            if step % max(1, total // 8) == 0 or step == total:
                seconds = (time.perf_counter() - start) / (step - first) * (total - step)
                left = f"   about {rough_time(seconds)} left" if step < total else ""
                self.display.message(f"supervised step {step:5d} of {total}   loss {loss:.4f} nats per token{left}")
            if asked.stop or (every and step % every == 0):
                self._save()
            if asked.stop:
                self.display.message(f"stopped by Ctrl-C after supervised step {step} (go on with --resume)")
                raise KeyboardInterrupt
            return self.ending.reached(step)

        self.sft.run(report)

    def _score(self) -> float:
        """What the present policy gets on held-out prompts, as `sft.stop_at` counts it."""
        self.parts.update_engine()
        evaluation = self.judge()
        return evaluation.metrics.get(f"eval/{self.config.evaluation.best}", -math.inf) if evaluation else -math.inf

    def _save(self) -> None:
        tensors, state = self.sft.state()
        tensors["rng"] = rng_state()
        tensors["below"] = self.ending.below
        state["before"] = self.before
        save_checkpoint(self.checkpoints, Checkpoint(self.sft.steps, tensors, state), self.config.checkpoint.keep)

    def _resume(self) -> bool:
        checkpoint, refused = latest_checkpoint(self.checkpoints)
        for reason in refused:
            self.display.warn(reason)
        if checkpoint is None:
            return False
        self.sft.load_state(checkpoint.tensors, checkpoint.state)
        set_rng_state(checkpoint.tensors["rng"])
        self.ending.below = dict(checkpoint.tensors.get("below", {}))
        self.before = checkpoint.state["before"]
        self.display.message(f"going on from supervised step {checkpoint.step}")
        return True
