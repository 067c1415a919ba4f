"""`llm-env rlhf`: the whole pipeline in rounds."""

from __future__ import annotations

from collections.abc import Sequence

from agents.cli.options import read_options, split_options
from agents.config import TrainConfig
from agents.config.preferences import RLHFConfig

# A reward model is right about texts like those it has seen: without a penalty the policy leaves them at once.
DEFAULTS = TrainConfig().replace(out="runs/rlhf", kl__beta=0.05)


def rlhf(arguments: Sequence[str]) -> None:
    """Run the command."""
    how, rest = split_options(
        arguments,
        RLHFConfig(),
        "llm-env rlhf",
        "In rounds: the policy writes, its texts are compared by the task's reward (or by a judge: "
        "--task.reward judge), reward models learn from all pairs so far, and the policy learns from those.",
        "All flags of `llm-env train --help` say how the policy learns, --iterations in each round, with "
        f"--kl.beta {DEFAULTS.kl.beta:g}.",
    )
    options = read_options(rest, "llm-env rlhf", DEFAULTS)
    from agents.run.rlhf import train_rlhf  # imports torch: --help and slips in flags do without

    found = train_rlhf(options.settings, how, resume=options.resume)
    print("\nround   reward of held-out texts   95% interval       reward models right about its texts")
    for each in found:
        reward = each["reward"]
        interval = f"{reward['low']:.3f} to {reward['high']:.3f}"
        right = f"{each['accuracy_on_its_texts']:.3f}" if "accuracy_on_its_texts" in each else ""
        print(f"{each['round'] or 'start':<8}{reward['mean']:<27.3f}{interval:<19}{right}")
    first, last = found[0]["reward"], found[-1]["reward"]
    if last["high"] < first["low"]:
        print(
            "warning: the texts are worse than at first: the policy has learned what the reward models are wrong "
            "about. Use more --pairs, fewer --iterations in a round, or a larger --kl.beta"
        )
    print(f"model     {options.settings.out / 'model'}")
