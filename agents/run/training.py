"""A whole run: warm start, iterations, evaluations, checkpoints, and a report at the end."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from agents.algorithms.registry import check_algorithm
from agents.config import AdvantageConfig, KLConfig, LossConfig, TrainConfig
from agents.config.files import check_config, save_config
from agents.report.curves import plot_curves
from agents.report.display import Display
from agents.report.log import RunLog, read_metrics
from agents.report.warnings import Warnings
from agents.rollouts.packing import Episode
from agents.run.evaluate import Evaluation
from agents.run.parts import Run, build
from agents.run.sft import SFT
from agents.state.checkpoint import Checkpoint, latest_checkpoint, rng_state, save_checkpoint, set_rng_state
from agents.state.files import replace_folder

SAMPLES = 3


@dataclass(frozen=True)
class Result:
    """What a run has led to.

    Attributes:
        before: metrics of the evaluation before the first iteration (empty if the task has no held-out prompts).
        after: of the last.
        model: the trained model, as a Hugging Face folder.
        curves: the PNG.
        finished: False if Ctrl-C has ended the run early; it can be resumed.
    """

    before: dict[str, float]
    after: dict[str, float]
    model: Path
    curves: Path
    finished: bool


def train(config: TrainConfig, resume: bool = False) -> Result:
    """Do a run, or go on with one.

    Everything lies in `config.out`: config.yaml, metrics.jsonl, samples.jsonl, checkpoints, best, model, curves.png.
    """
    _begin(config)
    with Display(config.iterations, _title(config), config.log.display) as display, interruptible() as asked:
        start = _warm_start(config, display) if config.sft.steps else None
        run = build(config, start)
        try:
            return _Training(config, run, display).go(resume, asked)
        finally:
            run.close()


def run_sft(config: TrainConfig) -> Path:
    """The supervised warm start alone; the folder of the model, `config.out / "model"`."""
    _begin(config)
    folder = config.out / "model"
    title = f"SFT on {config.task.name} with {config.model.name}, seed {config.seed}"
    with Display(config.sft.steps, title, config.log.display) as display:
        before, after, samples = warm_start(config, folder, display)
        display.summary("supervised fine-tuning: finished", _rows(config, before, after), samples, {"model": folder})
    return folder


def _begin(config: TrainConfig) -> None:
    check_config(config)
    check_algorithm(config)
    config.out.mkdir(parents=True, exist_ok=True)
    save_config(config, config.out / "config.yaml")
    disable_progress_bar()  # transformers would draw bars for loading and saving across our display


class _Training:
    """The iterations, and what happens around each of them."""

    def __init__(self, config: TrainConfig, run: Run, display: Display) -> None:
        self.config = config
        self.run = run
        self.display = display
        self.algorithm = run.algorithm
        self.warnings = Warnings(config.guard, self.algorithm.collector.rollouts.mdp.max_new_tokens)
        self.before: dict[str, float] = {}
        self.best = -float("inf")
        self.seconds = 0.0  # of earlier processes, should this one go on where they ended

    def go(self, resume: bool, asked: Interruption) -> Result:
        """All iterations that are left."""
        config, algorithm = self.config, self.algorithm
        resumed = self._resume() if resume else False
        self.begun = time.perf_counter()
        log = RunLog(config.out, config.log, algorithm.iteration if resumed else None)
        with log:
            after = self.before
            if resumed:
                self.run.update_engine()
                after = self._last_evaluation()
            else:
                evaluation = self._evaluate()
                self.before = after = evaluation.metrics if evaluation else {}
                if evaluation:
                    log.write({"iteration": 0, "tokens": 0, "time": 0.0} | after, _samples(evaluation.episodes))
                    self.display.update({"iteration": 0} | after, _samples(evaluation.episodes))
                    self._keep_best(after)
            while algorithm.iteration < config.iterations and not asked.stop and not self._reached(after):
                metrics, evaluation = self._iterate()
                after = evaluation.metrics if evaluation else after
                episodes = evaluation.episodes if evaluation else self._written()
                due = _due(algorithm.iteration, config.log.samples_every)
                samples = _samples(episodes) if due or evaluation else None
                log.write(metrics, samples)
                self.display.update(metrics, samples)
                for sentence in self.warnings.look(metrics):
                    self.display.warn(sentence)
                if _due(algorithm.iteration, config.checkpoint.every):
                    self._save()
        return self._finish(after, asked)

    def _iterate(self) -> tuple[dict[str, float], Evaluation | None]:
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
        return self.run.evaluator.evaluate()

    def _reached(self, metrics: dict[str, float]) -> bool:
        goal = self.config.evaluation.stop_at
        return goal is not None and metrics.get(f"eval/{self.config.evaluation.best}", -float("inf")) >= goal

    def _keep_best(self, metrics: dict[str, float]) -> None:
        score = metrics[f"eval/{self.config.evaluation.best}"]
        if score > self.best:
            self.best = score
            self._export("best")

    def _export(self, name: str) -> Path:
        with replace_folder(self.config.out / name) as aside:
            self.algorithm.network.export(aside, self.run.tokenizer)
        return self.config.out / name

    def _save(self) -> None:
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
        save_checkpoint(self.config.out / "checkpoints", checkpoint, self.config.checkpoint.keep)

    def _resume(self) -> bool:
        checkpoint, refused = latest_checkpoint(self.config.out / "checkpoints")
        for reason in refused:
            self.display.warn(reason)
        if checkpoint is None:
            self.display.message("no checkpoint to go on from: beginning anew")
            return False
        state = checkpoint.state
        self.algorithm.load_state(checkpoint.tensors, state)
        set_rng_state(checkpoint.tensors["rng"])
        self.warnings.load_state_dict(state["warnings"])
        self.best, self.before, self.seconds = state["best"], state["before"], state["seconds"]
        self.display.message(f"going on from iteration {checkpoint.step}")
        return True

    def _last_evaluation(self) -> dict[str, float]:
        judged = [row for row in read_metrics(self.config.out) if "eval/sampled" in row]
        return {name: value for name, value in judged[-1].items() if name.startswith("eval/")} if judged else {}

    def _finish(self, after: dict[str, float], asked: Interruption) -> Result:
        config, out = self.config, self.config.out
        self._save()
        finished = not asked.stop
        model = self._export("model")
        plot_curves(read_metrics(out), out / "curves.png", _title(config))
        samples = self._report_samples()
        seconds = self.seconds + time.perf_counter() - self.begun
        how = "finished" if finished else "stopped by Ctrl-C (go on with --resume)"
        self.display.summary(
            f"{_title(config)}: {how}, {self.algorithm.iteration} iterations, {self.algorithm.tokens} tokens, "
            f"{seconds:.0f} s",
            _rows(config, self.before, after),
            samples,
            {"model": model, "best": out / "best", "curves": out / "curves.png", "metrics": out / "metrics.jsonl"},
        )
        return Result(self.before, after, model, out / "curves.png", finished)

    def _written(self) -> list[Episode]:
        return self.algorithm.batch.episodes if self.algorithm.batch else []

    def _report_samples(self) -> list[dict[str, Any]]:
        if self.run.evaluator is None:
            return _samples(self._written())
        return _samples(self.run.evaluator.some(SAMPLES))


def _warm_start(config: TrainConfig, display: Display) -> Path:
    """The folder of the model after supervised fine-tuning; done once, then found again."""
    folder = config.out / "sft"
    if not folder.exists():
        display.phase("supervised warm start")
        warm_start(config, folder, display)
    return folder


def warm_start(
    config: TrainConfig, folder: Path, display: Display
) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
    """Fine-tune the model on the task's answers, and write it to a folder.

    Returns:
        Evaluations before and after (empty if the task has no held-out prompts), and sample texts.
    """
    # The same model and task, with nothing that only reinforcement learning needs.
    plain = config.replace(
        algo="ppo",
        algo_args={},
        advantage=AdvantageConfig(),
        loss=LossConfig(),
        kl=KLConfig(),
        model__critic="shared",
        model__reference="none",
        rollout__engine="transformers",
        rollout__engine_dtype=None,
    )
    run = build(plain)
    network, mdp = run.algorithm.network, run.algorithm.collector.rollouts.mdp
    before = run.evaluator.evaluate().metrics if run.evaluator else {}
    every = max(1, config.sft.steps // 8)

    def report(step: int, loss: float) -> None:
        if step % every == 0 or step == config.sft.steps:
            display.message(f"supervised step {step:5d} of {config.sft.steps}   loss {loss:.4f} nats per token")

    try:
        SFT(config.sft, network, mdp, config.seed).run(report)
        run.update_engine()
        after = run.evaluator.evaluate() if run.evaluator else None
        with replace_folder(folder) as aside:
            network.export(aside, run.tokenizer)
    finally:
        run.close()
    return before, after.metrics if after else {}, _samples(after.episodes) if after else []


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    stop: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ctrl-C asks to stop after the iteration; a second one stops at once."""
    asked = Interruption()
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        asked.stop = True
        signal.signal(signal.SIGINT, previous)

    try:
        signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread, where there is nothing to catch
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def _rows(config: TrainConfig, before: dict[str, float], after: dict[str, float]) -> list[tuple[str, float, float]]:
    """Before and after, in words."""
    labels = {
        "eval/sampled": f"held-out score, sampled at temperature {config.rollout.temperature:g}",
        "eval/greedy": "held-out score, greedy",
        "eval/length": "length of a text",
    }
    return [(label, before[name], after[name]) for name, label in labels.items() if name in before and name in after]


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _samples(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": episode.rollout.prompt,
            "text": episode.rollout.text,
            "score": episode.score.total,
            "end": episode.rollout.end,
        }
        for episode in episodes[:SAMPLES]
    ]


def _title(config: TrainConfig) -> str:
    return f"{config.algo} on {config.task.name} with {config.model.name}, seed {config.seed}"
