"""The iterations of a run, with the evaluations, checkpoints and samples between them, and a report at the end."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.config import TrainConfig
from agents.config.checks import flatten
from agents.report.curves import plot_curves
from agents.report.display import Display
from agents.report.log import RunLog, read_metrics
from agents.report.page import REPORT, write_report
from agents.report.warnings import Warnings
from agents.run.doctor import here
from agents.run.evaluate import Evaluation
from agents.run.interruption import Interruption
from agents.run.parts import Run
from agents.run.summary import SAMPLES, before_and_after, run_title, samples_of
from agents.run.tokens import token_rows
from agents.state.checkpoint import Checkpoint, latest_checkpoint, rng_state, save_checkpoint, set_rng_state
from llm_env.files import replace_folder
from llm_env.tokens.episode import Episode

CHECKPOINTS = "checkpoints"
"""Their folder in that of the run."""


@dataclass(frozen=True)
class Result:
    """What a run has led to; `train` gives it.

    Attributes:
        before: metrics of the evaluation before the first iteration (empty if the task has no held-out prompts; only
            eval/failed if it has failed).
        after: metrics of the last evaluation.
        model: the trained model, as a Hugging Face folder.
        curves: the picture of its metrics, a PNG file.
        finished: False if Ctrl-C has ended the run early; it can be resumed.
    """

    before: dict[str, float]
    after: dict[str, float]
    model: Path
    curves: Path
    finished: bool


class Training:
    """The iterations, and what happens around each of them."""

    def __init__(self, config: TrainConfig, run: Run, display: Display) -> None:
        self.config = config
        self.run = run
        self.display = display
        self.algorithm = run.algorithm
        self.warnings = Warnings(config.guard, self.algorithm.collector.writer.mdp.max_new_tokens)
        self.before: dict[str, float] = {}
        self.best = -math.inf
        self.seconds = 0.0  # that earlier processes have spent on this run, if it was resumed

    def go(self, resume: bool, asked: Interruption) -> Result:
        """All iterations that are left."""
        config, algorithm = self.config, self.algorithm
        resumed = self._resume() if resume else False
        self.begun = self.kept = time.perf_counter()
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in flatten(config)}
        begin = algorithm.iteration if resumed else None
        log = RunLog(config.out, config.log, begin, settings=settings, machine=here())
        with log:
            after = self.before
            if resumed:
                self.run.update_engine()
                after = self._last_evaluation()
            else:
                evaluation = self._evaluate()
                self.before = after = evaluation.metrics if evaluation else {}
                if evaluation:
                    log.write({"iteration": 0, "tokens": 0, "time": 0.0} | after, samples_of(evaluation.episodes))
                    self.display.update({"iteration": 0} | after, samples_of(evaluation.episodes))
                    self._keep_best(after)
            while algorithm.iteration < config.iterations and not asked.stop and not self._reached(after):
                metrics, evaluation = self.iterate()
                after = evaluation.metrics if evaluation else after
                episodes = evaluation.episodes if evaluation else self._written()
                due = _due(algorithm.iteration, config.log.samples_every)
                samples = samples_of(episodes) if due or evaluation else None
                tokens = token_rows(algorithm, config.log.texts) if samples and config.log.texts else None
                said = self.warnings.look(metrics)
                failed = [evaluation.failure] if evaluation and evaluation.failure else []
                log.write(metrics, samples, tokens, [*failed, *said])
                self.display.update(metrics, samples)
                for sentence in said:
                    self.display.warn(sentence)
                if self._is_worth_keeping():
                    self._save()
        return self._finish(after, asked)

    def iterate(self) -> tuple[dict[str, float], Evaluation | None]:
        """One iteration: its metrics, and the evaluation after it if there was one."""
        algorithm = self.algorithm
        self.display.phase("writing and learning")
        metrics = algorithm.step()
        start = time.perf_counter()
        self.run.update_engine()
        metrics["time/weights"] = time.perf_counter() - start
        evaluation = None
        last = algorithm.iteration == self.config.iterations
        if last or _due(algorithm.iteration, self.config.evaluation.every):
            start = time.perf_counter()
            evaluation = self._evaluate()
            metrics["time/eval"] = time.perf_counter() - start
        if evaluation:
            metrics |= evaluation.metrics
            self._keep_best(evaluation.metrics)
        return metrics | {"time": self.seconds + time.perf_counter() - self.begun}, evaluation

    def _evaluate(self) -> Evaluation | None:
        if self.run.evaluator is None:
            return None
        self.display.phase("judging on held-out prompts")
        evaluation = self.run.evaluator.evaluate()
        if evaluation.failure:
            self.display.warn(evaluation.failure)
        return evaluation

    def _reached(self, metrics: dict[str, float]) -> bool:
        goal = self.config.evaluation.stop_at
        if self.config.guard.stop_on_hacking and self.warnings.hacking:
            return True
        return goal is not None and self._judged(metrics) >= goal

    def _keep_best(self, metrics: dict[str, float]) -> None:
        if self._judged(metrics) > self.best:
            self.best = self._judged(metrics)
            self._export("best")

    def _judged(self, metrics: dict[str, float]) -> float:
        """What counts for the best model and the end; less than anything if there was no evaluation, or it failed."""
        return metrics.get(f"eval/{self.config.evaluation.best}", -math.inf)

    def _export(self, name: str) -> Path:
        with replace_folder(self.config.out / name) as new:
            self.algorithm.network.export(new, self.run.tokenizer)
        return self.config.out / name

    def _is_worth_keeping(self) -> bool:
        """Whether a checkpoint is due."""
        every, seconds = self.config.checkpoint.every, 60 * self.config.checkpoint.minutes
        return _due(self.algorithm.iteration, every) or (every > 0 and time.perf_counter() - self.kept > seconds)

    def _save(self) -> None:
        self.kept = time.perf_counter()
        tensors, state = self.algorithm.state()
        tensors["rng"] = rng_state()
        state |= {
            "algo": self.config.algo,
            "best": self.best,
            "before": self.before,
            "seconds": self.seconds + time.perf_counter() - self.begun,
            "warnings": self.warnings.state_dict(),
        }
        checkpoint = Checkpoint(self.algorithm.iteration, tensors, state)
        save_checkpoint(self.config.out / CHECKPOINTS, checkpoint, self.config.checkpoint.keep)

    def _resume(self) -> bool:
        checkpoint, refused = latest_checkpoint(self.config.out / CHECKPOINTS)
        for reason in refused:
            self.display.warn(reason)
        if checkpoint is None:
            self.display.message("no iteration has a checkpoint yet: beginning with the first")
            return False
        state = checkpoint.state
        self.algorithm.load_state(checkpoint.tensors, state)
        set_rng_state(checkpoint.tensors["rng"])
        self.warnings.load_state_dict(state["warnings"])
        self.best, self.before, self.seconds = state["best"], state["before"], state["seconds"]
        self.display.message(f"going on from iteration {checkpoint.step}")
        return True

    def _last_evaluation(self) -> dict[str, float]:
        judged = [row for row in read_metrics(self.config.out) if "eval/failed" in row]
        return {name: value for name, value in judged[-1].items() if name.startswith("eval/")} if judged else {}

    def _finish(self, after: dict[str, float], asked: Interruption) -> Result:
        config, out = self.config, self.config.out
        self._save()
        finished = not asked.stop
        model = self._export("model")
        metrics = read_metrics(out)
        plot_curves(metrics, out / "curves.png", run_title(config))
        if metrics:
            write_report([out], out / REPORT)
        samples = self._report_samples()
        seconds = self.seconds + time.perf_counter() - self.begun
        how = "finished" if finished else "stopped by Ctrl-C (go on with --resume)"
        self.display.summary(
            f"{run_title(config)}: {how}, {self.algorithm.iteration} iterations, {self.algorithm.tokens} tokens, "
            f"{seconds:.0f} s",
            before_and_after(config, self.before, after),
            samples,
            {"model": model, "best": out / "best", "report": out / REPORT, "curves": out / "curves.png"},
        )
        return Result(self.before, after, model, out / "curves.png", finished)

    def _written(self) -> list[Episode]:
        return self.algorithm.batch.episodes if self.algorithm.batch else []

    def _report_samples(self) -> list[dict[str, Any]]:
        if self.run.evaluator is None:
            return samples_of(self._written())
        return samples_of(self.run.evaluator.some(SAMPLES))


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
