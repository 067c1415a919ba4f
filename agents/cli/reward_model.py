"""`llm-env reward-model`: trains reward models on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from agents.cli.options import flag_registry
from agents.config.reward_model import RewardModelConfig


@dataclass(frozen=True)
class RewardModelOptions(RewardModelConfig):
    """What the command is told."""

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on where the same command was stopped."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def reward_model(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(
        RewardModelOptions,
        args=arguments,
        default=RewardModelOptions(pairs=tyro.MISSING),
        prog="llm-env reward-model",
        description="Train reward models on which of two texts is preferred.",
        registry=flag_registry(),
    )
    fields = {name: getattr(options, name) for name in RewardModelConfig.__dataclass_fields__}
    from agents.run.reward_model import train_reward_models  # imports torch: --help and slips in flags do without

    found = train_reward_models(RewardModelConfig(**fields), resume=options.resume)
    print()
    if "accuracy" in found[0]:
        print(f"{'':12}accuracy on held-out pairs   calibration error   correlation with length")
        for number, each in enumerate(found, start=1):
            accuracy = f"{each['accuracy']:.3f} ± {each['interval']:.3f}"
            print(f"member {number:<5}{accuracy:26}   {each['calibration']:17.3f}   {each['length']:23.2f}")
    print(f"reward    --task.reward reward_model --task.reward-args path {options.out}")
