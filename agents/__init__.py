"""PPO and its relatives for language models, on the token environment, from TorchRL's parts.

`agents.train(config)` does a whole run, `agents.fine_tune(config)` its supervised warm start alone, and
`agents.build(config)` gives its parts, for a loop of your own. The names below are imported when first asked for, so
that reading a configuration does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.algorithms.a2c import A2C
    from agents.algorithms.grpo import GRPO
    from agents.algorithms.ppo import PPO
    from agents.algorithms.reinforce import Reinforce
    from agents.config import TrainConfig
    from agents.config.presets import PRESETS
    from agents.networks.network import Network
    from agents.rollouts.collector import Collector
    from agents.run.loop import Result
    from agents.run.parts import Run, build
    from agents.run.training import fine_tune, train

_HOME = {
    "A2C": "algorithms.a2c",
    "Collector": "rollouts.collector",
    "GRPO": "algorithms.grpo",
    "Network": "networks.network",
    "PPO": "algorithms.ppo",
    "PRESETS": "config.presets",
    "Reinforce": "algorithms.reinforce",
    "Result": "run.loop",
    "Run": "run.parts",
    "TrainConfig": "config",
    "build": "run.parts",
    "fine_tune": "run.training",
    "train": "run.training",
}

__all__ = [
    "A2C",
    "GRPO",
    "PPO",
    "PRESETS",
    "Collector",
    "Network",
    "Reinforce",
    "Result",
    "Run",
    "TrainConfig",
    "build",
    "fine_tune",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"agents.{_HOME[name]}"), name)
