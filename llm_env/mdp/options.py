"""The options that all faces share, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from llm_env.mdp.observer import Observe
from llm_env.models import load_vocabulary
from llm_env.tokens.vocabulary import Vocabulary
from rewards.registry import did_you_mean


class MDPOptions(TypedDict, total=False):
    """The keyword arguments every face shares; `TokenMDP` says what they mean."""

    task_kwargs: Mapping[str, Any] | None
    model: Any
    drop_long_prompts: bool
    split: str
    context: int | None
    max_new_tokens: int | None
    completions_per_prompt: int
    shuffle: bool
    engine: Any
    observe: Observe
    top_k: int | None
    on_reward_error: float
    reward_timeout: float | None


def refuse_unknown(unknown: Mapping[str, Any]) -> None:
    """Raise an error for arguments that no face knows, naming those that are near."""
    for name in unknown:
        if name == "max_episode_steps":
            raise TypeError("the length of an episode is part of the task: use max_new_tokens, not max_episode_steps")
        known = [*MDPOptions.__annotations__, "autoreset_mode", "render_mode", "copy", "num_envs"]
        hint = did_you_mean(name, known, cutoff=0.5)
        # Python's own words: libraries that try an argument on every environment look for them.
        message = f"got an unexpected keyword argument {name!r}; {hint}Arguments of the task itself go into task_kwargs"
        raise TypeError(message)


def vocabulary_of(model: Any, engine: Any) -> Vocabulary:
    """The tokens of a model, or of the engine that was handed in."""
    if engine is not None and not isinstance(engine, str):
        # Its own vocabulary counts logits, of which a model may have more than its tokenizer has tokens.
        return Vocabulary(engine.vocabulary.tokenizer, eos_tokens=engine.vocabulary.eos_tokens)
    if isinstance(model, Vocabulary):
        return model
    if hasattr(model, "convert_ids_to_tokens"):
        return Vocabulary(model)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model must be a name, a folder, a hub id or a tokenizer, got {type(model).__name__}: {model!r}"
        )
    return load_vocabulary(str(model))
