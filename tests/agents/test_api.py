"""The public names of `agents` and its rooms: a change here is a change for every user."""

from __future__ import annotations

import importlib

import pytest

from tests.public import has_example, undocumented

PUBLIC = {
    "agents": [
        "PRESETS",
        "Algorithm",
        "Batch",
        "Collector",
        "DPOConfig",
        "EngineWriter",
        "Network",
        "Pair",
        "Pairs",
        "PolicyWriter",
        "RLHFConfig",
        "Result",
        "RewardModelConfig",
        "Run",
        "TokenLoss",
        "TrainConfig",
        "Writer",
        "algorithm_class",
        "algorithm_names",
        "best_of_n",
        "build",
        "fine_tune",
        "pack",
        "read_pairs",
        "register_advantage",
        "register_algorithm",
        "register_loss",
        "register_term",
        "train",
        "train_dpo",
        "train_reward_models",
        "train_rlhf",
    ],
    "agents.config": [
        "AdvantageConfig",
        "CheckpointConfig",
        "EvaluationConfig",
        "GuardConfig",
        "KLConfig",
        "LogConfig",
        "LoraConfig",
        "LossConfig",
        "ModelConfig",
        "OptimizerConfig",
        "RewardConfig",
        "RolloutConfig",
        "SFTConfig",
        "Scalar",
        "TaskConfig",
        "TrainConfig",
    ],
    "agents.metrics": ["METRICS", "Average", "Metric", "described", "metric", "register_metric"],
    "agents.losses": [
        "TokenLoss",
        "loss_class",
        "loss_names",
        "loss_term",
        "register_loss",
        "register_term",
        "term_names",
    ],
    "agents.cli": ["main"],
}

# These are values and types without a docstring of their own; it stands below them in the source.
VALUES = {"METRICS", "PRESETS", "Scalar"}
WITHOUT_EXAMPLE = {
    *(name for name in PUBLIC["agents.config"] if name != "TrainConfig"),  # its parts, made and changed through it
    "Batch",  # what a `Collector` gives
    "Result",  # what `train` gives
    "Run",  # what `build` gives
    "Writer",  # what `EngineWriter` and `PolicyWriter` have in common
    "main",  # the command: it prints, and ends the process
}

NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_list(module: str) -> None:
    assert importlib.import_module(module).__all__ == PUBLIC[module]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_is_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if name not in VALUES:
        assert undocumented(name, thing) == []
        assert has_example(thing) == (name not in WITHOUT_EXAMPLE), "add an example, or keep the list of exceptions"
