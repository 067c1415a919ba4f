"""The engine that runs anywhere."""

from llm_env.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
