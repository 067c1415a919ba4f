"""`llm-env eval`: how good a model is on a task."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.options import flag_registry, model_of
from agents.config import TaskConfig, TrainConfig
from agents.config.files import ConfigError, check_config, load_config
from agents.preferences.collect import read_texts
from llm_env.files import write_rows


@dataclass(frozen=True)
class EvalOptions:
    """What the command is told."""

    model: tyro.conf.Positional[str]
    """The model: the folder of a run (its best model, or the last), of a model, a built-in name, or a hub id."""
    task: TaskConfig = field(default_factory=TaskConfig)
    split: str = "test"
    """Which of the task's sets of prompts it is judged on."""
    prompts: int = 256
    """The most prompts that it is judged on."""
    samples: int = 1
    """How many texts are sampled after each prompt; pass@k and maj@k (the answer that most of them give) need k."""
    right: float = 1.0
    """The reward from which a text counts as right, for pass@k and maj@k."""
    by: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Break the mean down by what prompts have under this name in their metadata; those of a Mixture or a Curriculum
    are broken down by their part in any case."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="TEXTS.jsonl")] = None
    """Texts of another model after the same prompts, which --out has written: how often this one's are better."""
    temperature: float = 1.0
    """How random the sampled texts are."""
    seed: int = 0
    """Of the sampled texts."""
    engine: str = "transformers"
    """What writes the texts: transformers or vllm."""
    slots: int = 64
    """How many texts are written at the same time."""
    device: str = "cpu"
    """What to compute on."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="TEXTS.jsonl")] = None
    """Write every text there, with its score and its parts. Until it is done, what there is so far is kept beside it
    (.part): the same command goes on from there."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object in place of the table."""
    module: str | None = None
    """A Python module to import first, which may register tasks and rewards of your own."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def evaluate(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(
        EvalOptions,
        args=arguments,
        default=_defaults(arguments),
        prog="llm-env eval",
        description="Judge a model on a task. Of a run's folder the task, temperature and seed are the run's own.",
        registry=flag_registry(),
    )
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}, expected 1 or more")
    config = TrainConfig(module=options.module, task=options.task, seed=options.seed, device=options.device).replace(
        evaluation__split=options.split,
        evaluation__prompts=options.prompts,
        rollout__temperature=options.temperature,
        rollout__engine=options.engine,
        rollout__slots=options.slots,
    )
    check_config(config)
    against = None if options.against is None else read_texts(options.against)
    from agents.run.judge import judge  # imports torch: --help and slips in flags do without

    begun = time.monotonic()

    def told(done: int, total: int) -> None:
        if sys.stderr.isatty() and done < total:
            left = (time.monotonic() - begun) / done * (total - done)
            print(f"{done} of {total} passes over the prompts, about {left:.0f} s left", file=sys.stderr)

    kept = None if options.out is None else options.out.with_name(options.out.name + ".part")
    found = judge(config, model_of(options.model), options.samples, told, options.by, kept)
    summary = {
        "model": options.model,
        "task": options.task.name,
        "split": options.split,
        **found.summary(options.right, against),
    }
    if options.out is not None and kept is not None:
        write_rows(options.out, found.rows)
        kept.unlink(missing_ok=True)
    print(json.dumps(summary) if options.json else table(summary))


def table(summary: dict[str, Any]) -> str:
    """The figures as text.

    Examples:
        >>> figures = {"mean": 0.5, "low": 0.25, "high": 0.75}
        >>> print(table({"model": "tiny", "task": "Copy", "split": "test", "prompts": 8, "samples": 2,
        ...              "temperature": 1.0, "right": 1.0, "sampled": figures, "greedy": figures,
        ...              "pass": {"1": 0.5, "2": 0.75}, "parts": {"exact": 0.5}}))
        tiny on Copy (test): 8 prompts, 2 samples each at temperature 1
        <BLANKLINE>
                        mean   95% interval
        sampled        0.500   0.250 to 0.750
        greedy         0.500   0.250 to 0.750
        pass@1         0.500   right: a reward of 1 or more
        pass@2         0.750
        part exact     0.500
    """
    each = "sample" if summary["samples"] == 1 else "samples"
    lines = [
        f"{summary['model']} on {summary['task']} ({summary['split']}): {summary['prompts']} prompts, "
        f"{summary['samples']} {each} each at temperature {summary['temperature']:g}",
        "",
        f"{'':<12} {'mean':>7}   95% interval",
    ]
    for name in ("sampled", "greedy"):
        of = summary[name]
        lines.append(f"{name:<12} {of['mean']:>7.3f}   {of['low']:.3f} to {of['high']:.3f}")
    for place, (k, value) in enumerate(summary["pass"].items()):
        why = "" if place else f"   right: a reward of {summary['right']:g} or more"
        lines.append(f"{f'pass@{k}':<12} {value:>7.3f}{why}")
    for place, (k, value) in enumerate(summary.get("majority", {}).items()):
        lines.append(f"{f'maj@{k}':<12} {value:>7.3f}" + ("" if place else "   the answer that most of them give"))
    lines += [f"{f'part {name}':<12} {value:>7.3f}" for name, value in summary["parts"].items()]
    for name, of in summary.get("groups", {}).items():
        lines.append(f"{name:<12} {of['mean']:>7.3f}   {of['low']:.3f} to {of['high']:.3f}   {of['prompts']} prompts")
    names = {"distinct_2": "of all pairs of tokens differ", "self_bleu": "1: all texts after a prompt are the same"}
    lines += [f"{name:<12} {summary[name]:>7.3f}   {said}" for name, said in names.items() if name in summary]
    if against := summary.get("against"):
        wins, equal = against["wins"], against["wins_at_equal_length"]
        lines.append(
            f"{'wins':<12} {wins['mean']:>7.3f}   {wins['low']:.3f} to {wins['high']:.3f}   against the others"
        )
        lines.append(f"{'':<12} {equal:>7.3f}   at equal length")
    return "\n".join(lines)


def _defaults(arguments: Sequence[str]) -> EvalOptions:
    """Those of the run, if it is one's folder that is to be judged."""
    first = next(iter(arguments), "-")
    if first.startswith("-") or not (saved := Path(first) / "config.yaml").is_file():
        return EvalOptions(model=tyro.MISSING)
    run = load_config(saved)
    return EvalOptions(
        model=tyro.MISSING,
        task=run.task,
        split=run.evaluation.split,
        prompts=run.evaluation.prompts,
        temperature=run.rollout.temperature,
        seed=run.seed,
        module=run.module,
    )
