"""The fast engine."""

from llm_env.engines.vllm.engine import VLLMEngine, VLLMError

__all__ = ["VLLMEngine", "VLLMError"]
