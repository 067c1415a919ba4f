"""Token generation as a batched Gymnasium environment.

Importing this package registers its tasks with Gymnasium:

    >>> import gymnasium, llm_env
    >>> envs = gymnasium.make_vec("llm_env/Reverse-v0", num_envs=2)
    >>> observation, info = envs.reset(seed=0)
    >>> sorted(observation)
    ['length', 'prompt_length', 'tokens']

An id may name the module that registers it: `gymnasium.make("llm_env:llm_env/Reverse-v0")` works in a process that has
not imported this package, such as a worker of `gymnasium.vector.AsyncVectorEnv`. So does `"my_tasks:llm_env/Greet-v0"`.

The engines, `TorchRLTokenEnv` and `SB3TokenVecEnv` are imported on first use, so that this package starts without their
libraries.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_env.envs.single import TokenEnv
from llm_env.envs.vector import TokenVectorEnv
from llm_env.mdp.core import TokenMDP
from llm_env.tasks import Task, make_task, register_task, task_names
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.state import END_OF_CODE, TokenState
from llm_env.tokens.vocabulary import Vocabulary
from rewards import End

if TYPE_CHECKING:
    from llm_env.engines import Engine, Sampling, make_engine, register_engine
    from llm_env.envs.sb3 import SB3TokenVecEnv
    from llm_env.envs.torchrl import TorchRLTokenEnv

__version__ = "0.1.0"

_HOME = {
    "Engine": "engines",
    "SB3TokenVecEnv": "envs.sb3",
    "Sampling": "engines",
    "TorchRLTokenEnv": "envs.torchrl",
    "make_engine": "engines",
    "register_engine": "engines",
}

__all__ = [
    "END_OF_CODE",
    "End",
    "Engine",
    "Episode",
    "Prompt",
    "SB3TokenVecEnv",
    "Sampling",
    "Task",
    "TokenEnv",
    "TokenMDP",
    "TokenState",
    "TokenVectorEnv",
    "TorchRLTokenEnv",
    "Vocabulary",
    "make_engine",
    "make_task",
    "register_engine",
    "register_task",
    "task_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"llm_env.{_HOME[name]}"), name)
