"""What the commands `llm-env train` and `llm-env sft` do."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from transformers.utils.logging import disable_progress_bar

from agents.algorithms.registry import check_algorithm
from agents.config import TrainConfig
from agents.config.files import (
    FAILED,
    ConfigError,
    check_config,
    load_config,
    refuse_a_second_run,
    refuse_changes,
    save_config,
)
from agents.networks.ranks import Ranks
from agents.report.display import Display
from agents.report.log import MACHINE, METRICS
from agents.rollouts.workers import Workers
from agents.run.interruption import Interruption, interruptible
from agents.run.learners import follow, learning_together
from agents.run.links import share_of_threads
from agents.run.loop import CHECKPOINTS, Result, Training
from agents.run.memory import keep_freed_memory
from agents.run.parts import build, check_parts
from agents.run.precision import settle
from agents.run.summary import before_and_after, run_title
from agents.run.warm_start import SFT_CHECKPOINTS, forget_checkpoints, warm_start

WARM = "sft"
"""The folder of the model after the warm start, in that of the run."""


def train(config: TrainConfig, resume: bool = False) -> Result:
    """Do a run, or go on with one.

    Everything lies in `config.out`: config.yaml, metrics.jsonl, samples.jsonl, checkpoints, best, model, curves.png,
    and, after a warm start, its model in sft.

    Args:
        config: what it is.
        resume: go on from the last checkpoint in `config.out`, be it of the warm start or of an iteration. Of what the
            run was told in the beginning, only that may change which does not decide what it learns.

    Raises:
        SystemExit: this is one of several processes that learn together, and the first has failed.
        ConfigError: the configuration cannot be used; or the folder holds a run already, or (with `resume`) one that
            was told otherwise.
        KeyboardInterrupt: Ctrl-C was pressed in the warm start; it can be resumed.

    Examples:
        >>> import tempfile
        >>> config = TrainConfig(iterations=1).replace(task__args={"length": 2}, rollout__batch_size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train(config.replace(out=folder, evaluation__prompts=8, log__display=False))
        >>> result.finished, sorted(result.after)
        (True, ['eval/failed', 'eval/greedy', 'eval/length', 'eval/prompts', 'eval/sampled'])
    """
    keep_freed_memory()
    with learning_together(config) as ranks:
        if ranks.leads:
            result = _train(config, resume, ranks)
            ranks.dismiss(result)
            return result
        return cast(Result, follow(ranks))


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> Result:
    with (
        _begun(config, resume) as config,
        Display(config.iterations, run_title(config), config.log.display) as display,
        interruptible() as asked,
    ):
        model = None
        if config.sft.steps:
            config, model = _warm_model(config, display, resume, asked, ranks)
        run = build(config, model, ranks)
        try:
            config = settle(config, run.speeds, display)
            if isinstance(run.engine, Workers) and run.engine.links.announcement:
                display.message(run.engine.links.announcement)
            with _leaving_cores(config):
                return Training(config, run, display).go(resume, asked)
        finally:
            run.close()


def fine_tune(config: TrainConfig, resume: bool = False) -> Path:
    """The supervised warm start of a run alone; gives the folder of the model, `config.out / "model"`.

    Args:
        config: of the run. What only reinforcement learning reads is checked, too, and then not used.
        resume: go on from the last checkpoint in `config.out`.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; it can be resumed.

    Examples:
        >>> import tempfile
        >>> config = TrainConfig().replace(task__args={"length": 2}, sft__steps=2, evaluation__prompts=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = fine_tune(config.replace(out=folder, rollout__batch_size=8, log__display=False))
        ...     model.name, (model / "config.json").exists()
        ('model', True)
    """
    folder = config.out / "model"
    if not config.sft.steps:
        raise ConfigError("--sft.steps is 0, expected how many optimizer steps to take: use, for example, 500")
    if resume and (config.out / METRICS).exists():
        raise ConfigError(
            f"{config.out} holds a run of `llm-env train`, whose warm start is over: go on with it by "
            f"`llm-env train --resume`, or give another folder"
        )
    title = f"SFT on {config.task.name} with {config.model.name}, seed {config.seed}"
    keep_freed_memory()
    with learning_together(config, supervised=True) as ranks:
        if not ranks.leads:
            return cast(Path, follow(ranks))
        with (
            _begun(config, resume) as config,
            Display(config.sft.steps, title, config.log.display) as display,
            interruptible() as asked,
        ):
            if resume and folder.exists():
                forget_checkpoints(folder)
                display.message(f"the warm start in {config.out} is finished already; its model is {folder}")
            else:
                found = warm_start(config, folder, display, resume, asked, ranks)
                rows = before_and_after(config, found.before, found.after)
                display.summary("supervised fine-tuning: finished", rows, found.samples, {"model": folder})
        ranks.dismiss(folder)
    return folder


@contextlib.contextmanager
def _begun(config: TrainConfig, resume: bool) -> Iterator[TrainConfig]:
    """Check what can be checked before anything heavy is done, and make the run's folder.

    Gives the configuration; in that of a resumed run stands what the run has chosen for itself.

    If the run then fails before its first checkpoint, the folder is left so that the command can be given again.
    """
    check_config(config)
    check_algorithm(config)
    saved = config.out / "config.yaml"
    if not resume:
        refuse_a_second_run(config.out)
        check_parts(config)
        if (config.out / FAILED).exists():
            shutil.rmtree(config.out / "best", ignore_errors=True)  # of the run that failed
    elif saved.exists():
        before = load_config(saved)
        refuse_changes(before, config)
        if config.model.autocast == "auto":
            config = config.replace(model__autocast=before.model.autocast)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / FAILED).unlink(missing_ok=True)
    save_config(config, saved)
    disable_progress_bar()  # transformers would draw bars for loading and saving across our display
    try:
        yield config
    except BaseException as error:
        if not any((config.out / name).exists() for name in (CHECKPOINTS, SFT_CHECKPOINTS, WARM, "model")):
            _leave_free(config.out, error)
        raise


def _leave_free(out: Path, error: BaseException) -> None:
    """Let a folder in which a run has failed be used again; what the run has logged stays there to be looked at."""
    if (out / METRICS).exists():
        (out / FAILED).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        error.add_note(f"There was no checkpoint yet: the same command may be given again. The log is in {out}.")
        return
    (out / "config.yaml").unlink()
    (out / MACHINE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is something else in it
        out.rmdir()


def _warm_model(
    config: TrainConfig, display: Display, resume: bool, asked: Interruption, ranks: Ranks
) -> tuple[TrainConfig, Path]:
    """The folder of the model after supervised fine-tuning, which is done once and then found again.

    Before it comes the configuration, with what the warm start may have chosen.
    """
    folder = config.out / WARM
    if folder.exists():
        forget_checkpoints(folder)
        return config, folder
    found = warm_start(config, folder, display, resume, asked, ranks)
    ranks.forget()  # the run makes a network of its own
    for label, before, after in before_and_after(config, found.before, found.after):
        display.message(f"supervised warm start: {label} {before:.3g} before, {after:.3g} after")
    return config.replace(model__autocast=found.autocast), folder


@contextlib.contextmanager
def _leaving_cores(config: TrainConfig) -> Iterator[None]:
    """Compute with fewer threads while others write ahead at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(share_of_threads(config)[0])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
