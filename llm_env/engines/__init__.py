"""Engines step language models: `make_engine` makes one, `Engine` says what it can do."""

from llm_env.engines.base import Engine, EngineBase
from llm_env.engines.registry import engine_names, make_engine, register_engine
from llm_env.engines.sampling import Sampling
from llm_env.engines.weights import merged_weights
from llm_env.engines.writing import Completion

__all__ = [
    "Completion",
    "Engine",
    "EngineBase",
    "Sampling",
    "engine_names",
    "make_engine",
    "merged_weights",
    "register_engine",
]
