"""Arguments of several parts."""

import pytest

from agents.config import TrainConfig
from agents.config.arguments import nested
from agents.run.parts import make_task_of
from llm_env.tasks import Copy


def test_names_of_several_parts_make_mappings() -> None:
    given = {"a.b.c": 1, "a.b.d": 2, "a.e": "f", "g": True}
    assert nested(given) == {"a": {"b": {"c": 1, "d": 2}, "e": "f"}, "g": True}
    assert nested({}) == {}


@pytest.mark.parametrize("given", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}])
def test_a_value_and_what_is_inside_of_it_exclude_each_other(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"argument a\.b is inside of 'a'.*: 1|argument a is given .*: {'b': 2}"):
        nested(given)


def test_a_task_gets_them() -> None:
    args = {"dataset": "chain_sum", "config.min_terms": 4, "config.max_terms": 4, "num_train": 20, "num_test": 1}
    task = make_task_of(TrainConfig().replace(task__name="ReasoningGym", task__args=args))
    assert {prompt.text.count(" + ") + prompt.text.count(" - ") for prompt in task.prompts("train")} == {3}


@pytest.mark.parametrize("chat", [None, True, False])
def test_whether_a_chat_template_is_used(chat: bool | None) -> None:
    task = make_task_of(TrainConfig().replace(task__name="Copy", task__chat=chat))
    assert task.chat is (Copy.chat if chat is None else chat)
