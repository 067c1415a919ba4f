"""PPO and its relatives for language models, on the token environment, from TorchRL's parts.

`agents.train.train(config)` does a whole run; `agents.build.build(config)` gives its parts, for a loop of your own. The
names below are imported when first asked for, so that reading a configuration does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.a2c import A2C
    from agents.build import Run
    from agents.collector import Collector
    from agents.config import TrainConfig
    from agents.grpo import GRPO
    from agents.network import Network
    from agents.ppo import PPO
    from agents.presets import PRESETS
    from agents.reinforce import Reinforce
    from agents.train import Result

_HOME = {
    "A2C": "a2c",
    "Collector": "collector",
    "GRPO": "grpo",
    "Network": "network",
    "PPO": "ppo",
    "PRESETS": "presets",
    "Reinforce": "reinforce",
    "Result": "train",
    "Run": "build",
    "TrainConfig": "config",
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
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"agents.{_HOME[name]}"), name)
