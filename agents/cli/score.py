"""`llm-env score`: scores texts that were written elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.options import flag_registry
from agents.config import TaskConfig, TrainConfig
from agents.config.files import check_config
from agents.config.modules import import_module_of
from llm_env.files import write_rows
from llm_env.tasks import task_class
from rewards.registry import arguments_of


@dataclass(frozen=True)
class ScoreOptions:
    """What the command is told."""

    texts: Annotated[Path, tyro.conf.arg(metavar="TEXTS.jsonl")]
    """The texts, a line each: {"prompt_index": 0, "text": "..."}."""
    out: Annotated[Path, tyro.conf.arg(metavar="SCORES.jsonl")]
    """Where to write the scores, a line for each text in the same order: prompt_index, score, parts, failed."""
    task: TaskConfig = field(default_factory=TaskConfig)
    split: str = "test"
    """Which of the task's sets of prompts prompt_index counts in. Of a task that reads one file (--task.args path FILE)
    that is the file's own order, line by line."""
    model: str = "tiny"
    """Whose tokenizer says what tokens a text has: only rewards that look at tokens depend on it."""
    module: str | None = None
    """A Python module to import first, which may register tasks and rewards of your own."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def score(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(
        ScoreOptions,
        args=arguments,
        default=ScoreOptions(texts=tyro.MISSING, out=tyro.MISSING),
        prog="llm-env score",
        description="Score texts that were written elsewhere, by any task.",
        registry=flag_registry(),
    )
    config = TrainConfig(module=options.module, task=_of_one_file(options))
    check_config(config)
    from agents.run.parts import make_task_of  # imports torch: --help and slips in flags do without
    from agents.run.score_texts import TextScorer, read_texts
    from llm_env.models import load_vocabulary

    task = make_task_of(config)
    prompts = task.prompts(options.split)
    texts = read_texts(options.texts, len(prompts))
    scorer = TextScorer(task, load_vocabulary(options.model), config.task.reward_timeout)
    try:
        rows = list(_with_progress(scorer.scores(prompts, texts), len(texts)))
        write_rows(options.out, rows)
    finally:
        scorer.close()
    mean = sum(row["score"] for row in rows) / max(1, len(rows))
    failed = sum(row["failed"] is not None for row in rows)
    print(f"{len(rows)} texts, mean score {mean:.4g}, {failed} failed: {options.out}")


def _of_one_file(options: ScoreOptions) -> TaskConfig:
    """A task that reads one file takes all of it for the split that is asked for."""
    import_module_of(TrainConfig(module=options.module))
    task, args = options.task, options.task.args
    if "path" in args and "split" not in args and "split" in arguments_of(task_class(task.name)):
        return replace(task, args={**args, "split": options.split})
    return task


def _with_progress(rows: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """Say on a terminal where it is, every two seconds."""
    begun = said = time.monotonic()
    for done, row in enumerate(rows, start=1):
        yield row
        now = time.monotonic()
        if sys.stderr.isatty() and now - said > 2:
            said = now
            print(f"{done} of {total} texts, about {(now - begun) / done * (total - done):.0f} s left", file=sys.stderr)
