"""Engines step language models: `make_engine` makes one, `Engine` says what it can do."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any, cast

from llm_env.engines.base import EngineBase
from llm_env.engines.protocol import Engine
from llm_env.engines.sampling import Sampling
from llm_env.engines.weights import merged_weights
from llm_env.engines.writing import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where each engine lives; imported when asked for, because each needs libraries that the others do not.
_ENGINES = {
    "transformers": "llm_env.engines.transformers:TransformersEngine",
    "vllm": "llm_env.engines.vllm:VLLMEngine",
}

__all__ = ["Engine", "EngineBase", "Job", "Sampling", "engine_names", "make_engine", "merged_weights"]


def engine_names() -> list[str]:
    """The names that `make_engine` knows."""
    return sorted(_ENGINES)


def make_engine(
    engine: str | Engine,
    model: str | PreTrainedModel | None = None,
    *,
    num_slots: int,
    context: int,
    **options: Any,
) -> Engine:
    """An engine by name, or an engine you already have, checked to be large enough.

    Args:
        engine: a name (see `engine_names`), or an engine.
        model: what it runs; only with a name.
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        options: what else the engine's class takes; only with a name.

    Examples:
        >>> make_engine("transformers", "tiny", num_slots=2, context=16).vocab_size
        100
    """
    if not isinstance(engine, str):
        if model is not None or options:
            raise ValueError("model and options are for an engine given by name; this one is made already")
        if engine.num_slots < num_slots or engine.context < context:
            raise ValueError(
                f"the engine has {engine.num_slots} slots of {engine.context} tokens, but {num_slots} of {context} "
                "are needed: make a larger engine"
            )
        return engine
    if engine not in _ENGINES:
        near = difflib.get_close_matches(engine, engine_names(), cutoff=0.4)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown engine {engine!r}.{guess} Known engines are {', '.join(engine_names())}")
    if model is None:
        raise ValueError(f"the engine {engine!r} needs a model: a name such as 'tiny', or a model object")
    module, name = _ENGINES[engine].split(":")
    return cast(
        Engine,
        getattr(importlib.import_module(module), name)(model, num_slots=num_slots, context=context, **options),
    )
