"""The settings themselves: every number has a range, every setting a help text, and `out` may be a string."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from agents.config import Scalar, TrainConfig
from agents.config.checks import flatten, problems
from agents.config.explain import help_texts
from agents.config.ranges import BelowOne, Count, CountOrZero, Finite, Positive, Range, UpToOne, expected

INF, NAN = float("inf"), float("nan")


def parts(kind: type = TrainConfig) -> list[type]:
    """The dataclass and all that it is made of."""
    inner = [hint for hint in get_type_hints(kind).values() if dataclasses.is_dataclass(hint)]
    return list(dict.fromkeys([kind, *(part for each in inner for part in parts(each))]))


def has_ranges(hint: Any) -> bool:
    """Whether every number in the type has a range; the free arguments of tasks and the like need none."""
    if hint == Scalar:
        return True
    if get_origin(hint) is Annotated:
        return any(isinstance(mark, Range) for mark in get_args(hint)[1:]) or has_ranges(get_args(hint)[0])
    return hint not in (int, float) and all(map(has_ranges, get_args(hint)))


def without_range(kind: type) -> list[str]:
    return [name for name, hint in get_type_hints(kind, include_extras=True).items() if not has_ranges(hint)]


def badly_explained(kind: type) -> list[str]:
    """The fields whose help is no sentence; a part may be explained by the docstring of its class instead."""
    texts = help_texts(kind)
    of_class = {name: hint.__doc__ for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}
    explained = {
        field.name: texts.get(field.name) or of_class.get(field.name, "") for field in dataclasses.fields(kind)
    }
    return [name for name, text in explained.items() if len(text.split()) < 4 or not text.endswith(".")]


def test_every_number_has_a_range() -> None:
    assert len(parts()) == 15
    for part in parts():
        assert without_range(part) == [], part


def test_a_number_without_a_range_is_noticed() -> None:
    @dataclass
    class Careless:
        good: Count = 1
        maybe: Positive | None = None
        name: str = ""
        args: dict[str, Scalar] = dataclasses.field(default_factory=dict)
        whole: int = 1
        number: float | None = None
        pair: tuple[BelowOne, float] = (0.0, 0.0)
        weights: dict[str, float] = dataclasses.field(default_factory=dict)
        remark: Annotated[int, "no range"] = 1

    assert without_range(Careless) == ["whole", "number", "pair", "weights", "remark"]


def test_every_setting_is_explained_in_a_sentence() -> None:
    for part in parts():
        assert badly_explained(part) == [], part


def test_a_poor_help_text_is_noticed() -> None:
    @dataclass
    class Terse:
        rate: Count = 1
        """At its highest."""
        steps: Count = 1
        """How many steps are taken at most"""
        fine: Count = 1
        """How many of them are taken,
        at most."""
        silent: Count = 1

    assert badly_explained(Terse) == ["rate", "steps", "silent"]
    assert help_texts(Terse)["fine"] == "How many of them are taken, at most."


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        (Count, [1, 10**9], [0, -1], "at least 1"),
        (CountOrZero, [0], [-1], "0 or more"),
        (Positive, [1e-30, 5], [0, 0.0, -1.0, INF, NAN], "a number above 0"),
        (BelowOne, [0, 0.999], [1, -0.1], "a number from 0 to below 1"),
        (UpToOne, [1, 0.1], [0, 1.01], "a number above 0 and at most 1"),
        (Finite, [-1e300, 0], [INF, -INF, NAN], "a finite number"),
        (Count | None, [None, 1], [0], "at least 1"),
        (tuple[Count, Positive], [(1, 0.5)], [(0, 0.5)], "2 values, each at least 1"),
        (dict[str, Positive], [{}, {"a": 1.0}], [{"a": 1.0, "b": 0.0}], "values that are each a number above 0"),
        (Scalar, [0, -1.0, True, "x"], [], ""),
    ],
)
def test_ranges(kind: Any, good: list[Any], bad: list[Any], words: str) -> None:
    assert [expected(kind, value) for value in good] == [None] * len(good)
    assert [expected(kind, value) for value in bad] == [words] * len(bad)


def test_every_number_is_checked() -> None:
    """Whatever the range, it holds no NaN: each number of a run is set to it, and named."""
    for name, value in flatten(TrainConfig()):
        if type(value) in (int, float):
            found = next(problems(TrainConfig().replace(**{name.replace(".", "__"): NAN})))
            assert found.startswith(f"--{name.replace('_', '-')} is nan, expected ")


def test_out_may_be_a_string() -> None:
    config = TrainConfig(out="runs/x")  # type: ignore[arg-type]
    assert config.out == Path("runs/x")
    assert isinstance(config.out, Path)
    assert config == TrainConfig(out=Path("runs/x"))
    changed = TrainConfig().replace(out="runs/y", seed=1)
    assert (changed.out, changed.seed) == (Path("runs/y"), 1)
    assert isinstance(changed.out, Path)
    for wrong in (3, None, ["runs"]):
        with pytest.raises(TypeError, match="expected the path of a folder") as error:
            TrainConfig().replace(out=wrong)
        assert f"out is {wrong!r}," in str(error.value)
