from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable

import pytest

from rewards.registry import Registry, UnknownNameError, did_you_mean


def shape(answer: int, qualname: str = "shape", module: str = __name__) -> Callable[[], int]:
    def made() -> int:
        return answer

    made.__qualname__, made.__module__ = qualname, module
    return made


@pytest.fixture
def shapes() -> Registry[Callable[[], int]]:
    return Registry("shape")


def test_what_was_added_is_found_and_names_are_sorted(shapes):
    square, circle = shape(4), shape(3)
    assert shapes.add("square", square) is square
    assert shapes.register("circle")(circle) is circle
    assert shapes["square"] is square
    assert shapes["circle"] is circle
    assert shapes.names() == list(shapes) == ["circle", "square"]
    assert len(shapes) == 2
    assert "circle" in shapes
    assert "oval" not in shapes
    assert repr(shapes) == "<Registry of the kind 'shape': circle, square>"


def test_names_is_a_copy(shapes):
    shapes.add("square", shape(4))
    shapes.names().clear()
    assert shapes.names() == ["square"]


def test_an_unknown_name_lists_what_there_is(shapes):
    shapes.add("circle", shape(3))
    shapes.add("square", shape(4))
    with pytest.raises(ValueError, match=r"^unknown shape 'circel'; did you mean 'circle'\? Known: circle, square$"):
        shapes["circel"]
    with pytest.raises(UnknownNameError, match=r"^unknown shape 'xyz'; Known: circle, square$"):
        shapes["xyz"]


def test_the_error_survives_pickling(shapes):
    shapes.add("circle", shape(3))
    with pytest.raises(UnknownNameError) as caught:
        shapes["circel"]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_empty_table_says_so(shapes):
    with pytest.raises(ValueError, match=r"^unknown shape 'circle'; Known: none yet$"):
        shapes["circle"]
    assert repr(shapes) == "<Registry of the kind 'shape': empty>"


def test_another_thing_under_a_known_name_is_refused(shapes):
    first = shapes.add("circle", shape(3, "Round", "mine"))
    with pytest.raises(ValueError, match=r"a shape named 'circle' is already registered \(mine.Round\)"):
        shapes.add("circle", shape(4, "Round", "yours"))
    with pytest.raises(ValueError, match="already registered"):
        shapes.add("circle", shape(4, "Other", "mine"))
    assert shapes["circle"] is first


def test_the_same_definition_again_replaces_it(shapes):
    shapes.add("circle", shape(3))
    again = shapes.add("circle", shape(4))
    assert shapes["circle"] is again
    assert len(shapes) == 1


def test_instances_are_told_apart():
    numbers: Registry[list[int]] = Registry("number")
    one = numbers.add("one", [1])
    assert numbers.add("one", one) is one
    with pytest.raises(ValueError, match="already registered"):
        numbers.add("one", [1])


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_must_be_a_text(shapes, name):
    with pytest.raises(ValueError, match="expected a text"):
        shapes.add(name, shape(1))


def test_did_you_mean_shows_the_nearest_first():
    known = ["length", "lengths", "cost"]
    assert did_you_mean("length_", known) == "did you mean 'length' or 'lengths'? "
    assert did_you_mean("length_", known, count=1) == "did you mean 'length'? "
    assert did_you_mean("length_", iter(known), cutoff=1.0) == ""
    assert did_you_mean("anything", []) == ""
    assert did_you_mean("length_", ["length", "length"]) == "did you mean 'length'? "  # each name once


def test_a_room_is_imported_at_the_first_look_or_addition_from_outside(tmp_path, monkeypatch):
    (tmp_path / "plug_ins").mkdir()
    (tmp_path / "plug_ins" / "__init__.py").write_text(
        "from rewards.registry import Registry\nshapes = Registry('shape', 'plug_ins')"
    )
    (tmp_path / "plug_ins" / "round.py").write_text("from plug_ins import shapes\nshapes.add('circle', round)")
    monkeypatch.syspath_prepend(tmp_path)
    plug_ins = importlib.import_module("plug_ins")
    try:
        assert "plug_ins.round" not in sys.modules
        with pytest.raises(ValueError, match="a shape named 'circle' is already registered"):
            plug_ins.shapes.add("circle", shape(9))
        assert "plug_ins.round" in sys.modules
        plug_ins.shapes.add("square", shape(4))
        assert plug_ins.shapes["circle"] is round
        assert plug_ins.shapes.names() == ["circle", "square"]
    finally:
        for name in ("plug_ins", "plug_ins.round"):
            sys.modules.pop(name, None)
