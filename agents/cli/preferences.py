"""`llm-env reward-model` and `llm-env dpo`: what learns from pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from agents.cli.options import flag_registry
from agents.config.preferences import DPOConfig, RewardModelConfig


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
        print(f"the chosen became likelier by   {found['chosen']:.2f} nats, the rejected by {found['rejected']:.2f}")
    print(f"model     {options.settings.out / 'model'}")
