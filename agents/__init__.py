"""PPO and its relatives for language models, on the token environment, from TorchRL's parts.

`agents.train(config)` does a whole run, `agents.fine_tune(config)` its supervised warm start alone, and
`agents.build(config)` gives its parts, for a loop of your own. `agents.train_reward_models` and `agents.train_dpo`
learn from pairs. The names below are imported when first asked for, so that reading a configuration does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.algorithms.advantages import register_advantage
    from agents.algorithms.base import Algorithm
    from agents.algorithms.registry import algorithm_class, algorithm_names, register_algorithm
    from agents.config import TrainConfig
    from agents.config.preferences import DPOConfig, RewardModelConfig, RLHFConfig
    from agents.config.presets import PRESETS
    from agents.losses import TokenLoss, register_loss, register_term
    from agents.networks.network import Network
    from agents.preferences.best_of_n import best_of_n
    from agents.preferences.pairs import Pair, Pairs, read_pairs
    from agents.rollouts.collector import Batch, Collector
    from agents.rollouts.packing import pack
    from agents.rollouts.writers import EngineWriter, PolicyWriter, Writer
    from agents.run.dpo import train_dpo
    from agents.run.loop import Result
    from agents.run.parts import Run, build
    from agents.run.reward_model import train_reward_models
    from agents.run.rlhf import train_rlhf
    from agents.run.training import fine_tune, train

_HOME = {
    "Algorithm": "algorithms.base",
    "Batch": "rollouts.collector",
    "Collector": "rollouts.collector",
    "DPOConfig": "config.preferences",
    "EngineWriter": "rollouts.writers",
    "Network": "networks.network",
    "PRESETS": "config.presets",
    "Pair": "preferences.pairs",
    "Pairs": "preferences.pairs",
    "PolicyWriter": "rollouts.writers",
    "RLHFConfig": "config.preferences",
    "Result": "run.loop",
    "RewardModelConfig": "config.preferences",
    "Run": "run.parts",
    "TokenLoss": "losses",
    "TrainConfig": "config",
    "Writer": "rollouts.writers",
    "algorithm_class": "algorithms.registry",
    "algorithm_names": "algorithms.registry",
    "best_of_n": "preferences.best_of_n",
    "build": "run.parts",
    "fine_tune": "run.training",
    "pack": "rollouts.packing",
    "read_pairs": "preferences.pairs",
    "register_advantage": "algorithms.advantages",
    "register_algorithm": "algorithms.registry",
    "register_loss": "losses",
    "register_term": "losses",
    "train": "run.training",
    "train_dpo": "run.dpo",
    "train_reward_models": "run.reward_model",
    "train_rlhf": "run.rlhf",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"agents.{_HOME[name]}"), name)
