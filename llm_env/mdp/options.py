"""The options that all faces share, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from llm_env.mdp.observer import Observe
from llm_env.models import load_vocabulary
from llm_env.tokens.vocabulary import Vocabulary
from rewards.registry import did_you_mean


class MDPOptions(TypedDict, total=False):
    """The keyword arguments that `TokenMDP` and every face of it take."""

    task_kwargs: Mapping[str, Any] | None
    """Arguments of a task given by name."""
    model: Any
    """Whose tokens are used: a name, folder or hub id (see `llm_env.models`), or a tokenizer; by default "tiny"."""
    split: str
    """Which prompts: "train" (the default), "test", or another split that the task has."""
    context: int | None
    """How many tokens prompt and text may have together; by default what the task expects of both."""
    drop_long_prompts: bool
    """Leave out prompts that leave no room to act in this context; by default they are an error."""
    max_new_tokens: int | None
    """How many tokens the agent may choose; by default what the task says."""
    completions_per_prompt: int
    """How many episodes begin with the same prompt, one after the other; 1 by default."""
    shuffle: bool
    """Deal the prompts in random order (the default); False goes through them as they are, for evaluation."""
    engine: Any
    """A language model that reads along: the name of an engine ("transformers"), which then serves `model`, or an
    engine, whose own tokens are then used. Observations hold its distribution of the next token."""
    observe: Observe | None
    """With an engine, "logits" (all of them) or "top_k" (ids and log-probs of the likeliest, the default)."""
    top_k: int | None
    """How many of the likeliest; 50 by default."""
    observe_mask: bool
    """Put the task's `action_mask` into observations too, for libraries that look for it there: all ones for a task
    that has none. By default it is in the infos only, and for TorchRL in the tensordict."""
    on_reward_error: float
    """The score of a rollout whose reward raised or took longer than `reward_timeout`; 0 by default."""
    reward_timeout: float | None
    """Seconds a reward may take for one rollout; it then runs in a killable process of its own, as a copy. A task that
    scores by itself (`score`) and acts while texts are written (`reply`, `over`, `token_reward`) is refused then."""


DEFAULTS: MDPOptions = {
    "task_kwargs": None,
    "model": None,
    "split": "train",
    "context": None,
    "drop_long_prompts": False,
    "max_new_tokens": None,
    "completions_per_prompt": 1,
    "shuffle": True,
    "engine": None,
    "observe": None,
    "top_k": None,
    "observe_mask": False,
    "on_reward_error": 0.0,
    "reward_timeout": None,
}


def with_defaults(options: Mapping[str, Any]) -> MDPOptions:
    """All options, those that were not given as they are by default; an error for one that does not exist."""
    refuse_unknown(options.keys() - DEFAULTS.keys())
    return cast(MDPOptions, {**DEFAULTS, **options})


def refuse_unknown(unknown: Iterable[str]) -> None:
    """Raise an error for arguments that no face knows, naming those that are near."""
    for name in sorted(unknown):
        if name == "max_episode_steps":
            raise TypeError("the length of an episode is part of the task: use max_new_tokens, not max_episode_steps")
        known = [*DEFAULTS, "autoreset_mode", "render_mode", "copy", "num_envs"]
        hint = did_you_mean(name, known, cutoff=0.5)
        # Python's own words: libraries that try an argument on every environment look for them.
        message = f"got an unexpected keyword argument {name!r}; {hint}Arguments of the task itself go into task_kwargs"
        raise TypeError(message)


def vocabulary_of(model: Any, engine: Any) -> Vocabulary:
    """The tokens of a model, or of the engine that was handed in."""
    if engine is not None and not isinstance(engine, str):
        own: Vocabulary = engine.vocabulary
        return own
    if isinstance(model, Vocabulary):
        return model
    if hasattr(model, "convert_ids_to_tokens"):
        return Vocabulary(model)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model must be a name, a folder, a hub id or a tokenizer, got {type(model).__name__}: {model!r}"
        )
    return load_vocabulary(str(model))
