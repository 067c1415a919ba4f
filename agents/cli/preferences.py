"""`llm-env best`, `pairs`, `reward-model` and `dpo`: what is made of scored texts, and what learns from pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.options import flag_registry
from agents.config import Scalar
from agents.config.checks import out_of_range
from agents.config.files import ConfigError, complain
from agents.config.preferences import DPOConfig, RewardModelConfig
from agents.config.ranges import BelowOne, Count
from agents.preferences.collect import best_of, collect, read_texts
from llm_env.files import write_rows
from rewards import Judge, make_reward


@dataclass(frozen=True)
class RewardModelOptions:
    """What `reward-model` is told."""

    settings: Annotated[RewardModelConfig, tyro.conf.arg(name="")]
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on where the same command was stopped."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


@dataclass(frozen=True)
class DPOOptions:
    """What `dpo` is told."""

    settings: Annotated[DPOConfig, tyro.conf.arg(name="")]
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on where the same command was stopped."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


@dataclass(frozen=True)
class PairsOptions:
    """What `pairs` is told."""

    texts: Annotated[Path, tyro.conf.arg(metavar="TEXTS.jsonl")]
    """Texts with their scores, several after each prompt, as llm-env eval --samples 4 --out TEXTS.jsonl writes them."""
    out: Annotated[Path, tyro.conf.arg(metavar="PAIRS.jsonl")]
    """Where to write the pairs."""
    judge: dict[str, Scalar] = field(default_factory=dict)
    """Let a language model compare the texts, in both orders, in place of their scores: arguments of rewards.Judge,
    such as: url http://localhost:8000/v1 model NAME rubric "Which is more polite?" cache answers.sqlite."""
    noise: BelowOne = 0.0
    """The share of the pairs to label the wrong way round, to see what comes of it: people do, in one of four."""
    seed: int = 0
    """Of which texts are compared, and of the noise."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


@dataclass(frozen=True)
class BestOptions:
    """What `best` is told."""

    texts: Annotated[Path, tyro.conf.arg(metavar="TEXTS.jsonl")]
    """Texts with their scores, several after each prompt, as llm-env eval --samples 4 --out TEXTS.jsonl writes them."""
    out: Annotated[Path, tyro.conf.arg(metavar="BEST.jsonl")]
    """Where to write the prompts with their best texts as answers, for the task Dataset and llm-env sft."""
    keep: Count = 1
    """How many texts to keep of each prompt."""
    at_least: float | None = None
    """Leave out texts with a lower score than this, such as 1 for right ones alone."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def best(arguments: Sequence[str]) -> None:
    """Keep the best."""
    options = tyro.cli(
        BestOptions,
        args=arguments,
        default=BestOptions(texts=tyro.MISSING, out=tyro.MISSING),
        prog="llm-env best",
        description="Keep the best texts after each prompt, to fine-tune on (rejection sampling).",
        registry=flag_registry(),
    )
    complain(list(out_of_range(options)))
    rows = best_of(read_texts(options.texts), keep=options.keep, at_least=options.at_least)
    if not rows:
        raise ConfigError(f"{options.texts} has no text with a score of {options.at_least} or more: lower --at-least")
    write_rows(options.out, rows)
    mean = sum(row["score"] for row in rows) / len(rows)
    print(f"{len(rows)} texts, mean score {mean:.4g}: {options.out}")
    print(f"learn     llm-env sft --task.name Dataset --task.args train {options.out} --task.reward exact_match")


def pairs(arguments: Sequence[str]) -> None:
    """Make pairs."""
    options = tyro.cli(
        PairsOptions,
        args=arguments,
        default=PairsOptions(texts=tyro.MISSING, out=tyro.MISSING),
        prog="llm-env pairs",
        description="Make pairs, of which one text is preferred, from texts and their scores.",
        registry=flag_registry(),
    )
    complain(list(out_of_range(options)))
    texts = read_texts(options.texts)
    how: dict[str, Any] = {"noise": options.noise, "seed": options.seed}
    if options.judge:
        judge = make_reward("judge", options.judge)
        assert isinstance(judge, Judge)
        found = collect(texts, compare=judge.compare, workers=judge.workers, **how)
        judge.close()
    else:
        found = collect(texts, **how)
    if not found.rows:
        raise ConfigError(
            f"{options.texts} gives no pairs ({found.ties} of texts of which neither is better): it must have several "
            "texts with different scores after a prompt, as llm-env eval --samples 4 writes them"
        )
    write_rows(options.out, found.rows)
    said = f"{len(found.rows)} pairs, {found.flipped} of them the wrong way round, {found.ties} ties left out"
    print(f"{said}: {options.out}")


def reward_model(arguments: Sequence[str]) -> None:
    """Train reward models."""
    options = tyro.cli(
        RewardModelOptions,
        args=arguments,
        default=RewardModelOptions(RewardModelConfig(pairs=tyro.MISSING)),
        prog="llm-env reward-model",
        description="Train reward models on which of two texts is preferred.",
        registry=flag_registry(),
    )
    from agents.run.reward_model import train_reward_models  # imports torch: --help and slips in flags do without

    found = train_reward_models(options.settings, resume=options.resume)
    print()
    if "accuracy" in found[0]:
        print(f"{'':12}accuracy on held-out pairs   calibration error   correlation with length")
        for number, each in enumerate(found, start=1):
            accuracy = f"{each['accuracy']:.3f} ± {each['interval']:.3f}"
            print(f"member {number:<5}{accuracy:26}   {each['calibration']:17.3f}   {each['length']:23.2f}")
        _doubt(found)
    print(f"reward    --task.reward reward_model --task.reward-args path {options.settings.out}")


def dpo(arguments: Sequence[str]) -> None:
    """Train a policy."""
    options = tyro.cli(
        DPOOptions,
        args=arguments,
        default=DPOOptions(DPOConfig(pairs=tyro.MISSING)),
        prog="llm-env dpo",
        description="Train a policy on which of two texts is preferred, without a reward model.",
        registry=flag_registry(),
    )
    from agents.run.dpo import train_dpo  # imports torch: --help and slips in flags do without

    found = train_dpo(options.settings, resume=options.resume)
    print()
    if "accuracy" in found:
        print(f"accuracy on held-out pairs   {found['accuracy']:.3f} ± {found['interval']:.3f}")
        _doubt([found])
        print(f"the chosen became likelier by   {found['chosen']:.2f} nats, the rejected by {found['rejected']:.2f}")
    print(f"model     {options.settings.out / 'model'}")


def _doubt(found: Sequence[Mapping[str, float]]) -> None:
    """Say so if what was learned cannot be told from guessing."""
    if all(each["accuracy"] - each["interval"] <= 0.5 for each in found):
        print(
            f"warning: on {found[0]['held_out']:.0f} held-out pairs that cannot be told from guessing (0.5): use more "
            "pairs, more --epochs (the best step is kept), or a higher --learning-rate"
        )
