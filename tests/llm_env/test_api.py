"""The public names of `llm_env` and its rooms: a change here is a change for every user."""

from __future__ import annotations

import importlib

import pytest

from tests.public import has_example, undocumented

PUBLIC = {
    "llm_env": [
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
    ],
    "llm_env.engines": [
        "Engine",
        "EngineBase",
        "Job",
        "Sampling",
        "engine_names",
        "make_engine",
        "merged_weights",
        "register_engine",
    ],
    "llm_env.engines.transformers": ["TransformersEngine"],
    "llm_env.engines.vllm": ["VLLMEngine", "VLLMError"],
    "llm_env.tasks": [
        "GEM",
        "GSM8K",
        "Addition",
        "CalculatorSums",
        "Copy",
        "Countdown",
        "Curriculum",
        "Dataset",
        "Episodes",
        "Functions",
        "HumanEval",
        "Maze",
        "Mixture",
        "Nim",
        "OpenEnv",
        "OwnRandom",
        "ReasoningGym",
        "Reverse",
        "Sentiment",
        "SessionError",
        "SkyRLGym",
        "Task",
        "TaskError",
        "TextArena",
        "Tools",
        "TurnTask",
        "Verifiers",
        "WordSums",
        "make_task",
        "register_task",
        "register_tool",
        "task_class",
        "task_names",
    ],
    "llm_env.wrappers": [
        "AllowedTokens",
        "EpisodeStatistics",
        "FlatTokens",
        "KLReward",
        "OneHotTokens",
        "ScaleReward",
        "TopKActions",
        "vector",
    ],
}

VALUES = {"END_OF_CODE"}
WITHOUT_EXAMPLE = {
    "Job",  # four numbers; `Engine.write` takes it
    "vector",  # a module, whose classes have examples
    "VLLMError",  # raised where vLLM fails, which no example can count on
}

NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_list(module: str) -> None:
    assert importlib.import_module(module).__all__ == PUBLIC[module]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_is_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if name not in VALUES:
        assert undocumented(name, thing) == []
        assert has_example(thing) == (name not in WITHOUT_EXAMPLE), "add an example, or keep the list of exceptions"
