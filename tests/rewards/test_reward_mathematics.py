"""Math: which answer a text gives, and whether it is the expected one."""

import importlib.util
import logging
import random

import pytest

from rewards import Guard, Math, Rollout, final_answer, make_reward


@pytest.fixture(scope="module")
def maths():
    reward = Math()
    yield reward
    reward.close()


def value(reward, text, answer):
    return reward([Rollout.of(text, metadata={"answer": answer})])[0].value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7} or rather \boxed{\frac{1}{2}} and 3", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{\frac{1}{2", "2"),  # cut off: the last number then
        ("5 + 5 = 10\n#### 10\n", "10"),
        ("#### 3 apples\nThat is all, in 2 lines", "3 apples"),
        ("####\n7", "7"),
        ("7 ####", "7"),  # nothing stands behind the mark
        ("It costs $1,200.50 in all.", "1200.50"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 72.", "72"),
        ("#### 72", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"),
        (r"\boxed{72\text{ clips}}", "72"),
        ("#### $1,200.00", "1200"),
        ("#### 50%", "50"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{(x+1)^2}", "x^2 + 2x + 1"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{x = 3}", "3"),
        (r"\boxed{\text{Monday}}", "monday"),
        (r"\boxed{(1, 2)}", r"\boxed{(1,2)}"),
    ],
)
def test_equal_answers(maths, text, answer):
    assert value(maths, text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 72 or 73.", "72"),
        (r"\boxed{72} and not 73", "73"),
        (r"\boxed{\frac{1}{2}}", "2"),
        (r"\boxed{(x+1)^2}", "x^2 + 1"),
        (r"\boxed{(2, 1)}", "(1, 2)"),
        (r"\boxed{won}", "now"),  # as products of letters they would be equal
        (r"\boxed{x+1}", "x-1"),
        (r"\boxed{}", "3"),
        (r"\boxed{" + "1+" * 2000 + "1}", "2001"),  # longer than any answer
        ("-3", "3"),
    ],
)
def test_other_answers(maths, text, answer):
    assert value(maths, text, answer) == 0.0


def test_parts(maths):
    [score] = maths([Rollout.of("no idea", metadata={"answer": "3"})])
    assert (score.value, score.parts["answered"], score.parts["unverified"]) == (0.0, 0.0, 0.0)
    [score] = maths([Rollout.of("4", metadata={"answer": "3"})])
    assert (score.value, score.parts["answered"]) == (0.0, 1.0)


def test_a_formula_that_never_ends_is_wrong_and_the_next_is_scored(caplog):
    reward = Math(timeout=1.0)
    with caplog.at_level(logging.WARNING, logger="rewards"):
        [score] = reward([Rollout.of(r"\boxed{9^{9^{9^{9}}}+\frac{x}{2}}", metadata={"answer": r"\frac{x}{2}"})])
    assert (score.value, score.parts["unverified"]) == (0.0, 1.0)
    assert "could not be verified" in caplog.text
    assert value(reward, r"\boxed{\frac{2}{4}}", r"\frac{1}{2}") == 1.0
    reward.close()


def test_it_works_in_a_guards_process_and_leaves_random_numbers_alone():
    with_timeout = Guard(Math(), timeout=20.0)
    assert value(with_timeout, r"\boxed{\frac{2}{4}}", "0.5") == 1.0
    with_timeout.close()
    reward = Math()
    random.seed(3)
    expected = random.random()
    random.seed(3)
    assert value(reward, r"\boxed{\frac{2}{4}}", "0.5") == 1.0
    assert random.random() == expected
    reward.close()


def test_by_name_and_without_the_package(monkeypatch):
    assert repr(make_reward("math", {"key": "solution"})) == "Math(key='solution', timeout=5.0)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package math-verify.*pip install 'llm-env\[tasks\]'"):
        Math()
