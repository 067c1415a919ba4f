"""Engines by name: `register_engine` makes a class known, `make_engine` makes an engine.

The engines that come with this library are the packages beside this file. Each needs libraries that the others do not,
so its package is imported when its name is first asked for, and registers its class then.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llm_env.engines.forks import use_one_thread_if_forked
from llm_env.engines.protocol import Engine
from rewards.registry import Registry, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EngineClass = TypeVar("EngineClass", bound=Callable[..., Engine])

_ENGINES: Registry[Callable[..., Engine]] = Registry("engine")
_PACKAGE = __name__.rpartition(".")[0]


def register_engine(name: str) -> Callable[[EngineClass], EngineClass]:
    """Register a class of engines under a name. Use it as a decorator, here or in a module of your own.

    The class is called with the model and with `num_slots=` and `context=`, and whatever else `make_engine` was given.

    Examples:
        >>> from llm_env.engines import EngineBase, engine_names
        >>> @register_engine("my_engine")
        ... class MyEngine(EngineBase):
        ...     def __init__(self, model, *, num_slots, context): ...
        >>> "my_engine" in engine_names()
        True
    """

    def register(engine: EngineClass) -> EngineClass:
        home = f"{_PACKAGE}.{name}"
        if name in _built_in() and not f"{engine.__module__}.".startswith(f"{home}."):
            raise ValueError(f"an engine named {name!r} comes with this library ({home}): give yours another name")
        _ENGINES.add(name, engine)
        return engine

    return register


def engine_names() -> list[str]:
    """The names that `make_engine` knows: the engines of this library, and those that were registered.

    Examples:
        >>> {"transformers", "vllm"} <= set(engine_names())
        True
    """
    return sorted({*_ENGINES, *_built_in()})


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
    if engine not in engine_names():
        raise UnknownNameError("engine", engine, engine_names())
    if model is None:
        raise ValueError(f"the engine {engine!r} needs a model: a name such as 'tiny', or a model object")
    use_one_thread_if_forked()  # making the model computes already
    if engine not in _ENGINES:
        importlib.import_module(f"{_PACKAGE}.{engine}")
    return _ENGINES[engine](model, num_slots=num_slots, context=context, **options)


def _built_in() -> list[str]:
    """The packages beside this file; they are not imported."""
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.ispkg]
