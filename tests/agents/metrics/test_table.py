"""The table of metrics: whatever is logged has an entry or a sensible stand-in, and users may add their own."""

from __future__ import annotations

import pytest

from agents.metrics import METRICS, Metric, metric, register_metric
from agents.metrics.built_in import BUILT_IN


def test_every_entry_says_what_it_is() -> None:
    assert len({entry.name for entry in BUILT_IN}) == len(BUILT_IN)
    for entry in BUILT_IN:
        assert entry.meaning.endswith("."), entry.name
        assert entry.label
        assert METRICS[entry.name] == metric(entry.name) == entry


def test_names_that_a_task_makes_up() -> None:
    part = metric("reward/right answer")
    assert (part.name, part.label, part.column, part.group) == (
        "reward/right answer",
        "right answer",
        "score",
        "reward",
    )
    assert metric("time/searching").column == "phases"
    assert metric("reward/").column is None
    assert metric("policy/x_loss").label == "x loss"
    assert metric("policy/entropy_loss").label == "entropy loss"
    assert metric("policy/_loss").label == "policy/_loss"
    assert metric("policy/TERM").label == "policy/TERM"


def test_unknown_names_are_averaged_and_called_what_they_are() -> None:
    unknown = metric("my/max_depth")
    assert (unknown.label, unknown.reduce, unknown.column, unknown.panel) == ("my/max_depth", "mean", None, None)


@pytest.mark.usefixtures("own_metrics")
def test_ones_own_metric() -> None:
    mine = Metric(name="my/depth", label="depth", meaning="Deepest bracket.", reduce="max")
    register_metric(mine)
    assert metric("my/depth").reduce == "max"
    again = Metric(name="my/depth", label="depth of brackets", meaning="Deepest bracket.")
    register_metric(again)  # a notebook's cell is run again
    assert metric("my/depth") is again


def test_our_own_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match=r"llm-env itself measures 'policy/entropy' .*such as 'my/entropy'"):
        register_metric(Metric(name="policy/entropy", label="entropy", meaning="Something else."))
    register_metric(METRICS["policy/entropy"])


def test_entries_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        Metric(name="", label="x", meaning="x")
    with pytest.raises(ValueError, match=r"'my/depth': reduce must be one of .* got 'sum'"):
        Metric(name="my/depth", label="x", meaning="x", reduce="sum")  # type: ignore[arg-type]
