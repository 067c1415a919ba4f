"""Engines step language models: `make_engine` makes one, `Engine` says what it can do."""

from llm_env.engines.base import EngineBase
from llm_env.engines.protocol import Engine
from llm_env.engines.registry import engine_names, make_engine, register_engine
from llm_env.engines.sampling import Sampling
from llm_env.engines.weights import merged_weights
from llm_env.engines.writing import Job

__all__ = [
    "Engine",
    "EngineBase",
    "Job",
    "Sampling",
    "engine_names",
    "make_engine",
    "merged_weights",
    "register_engine",
]
