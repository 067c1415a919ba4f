"""The one table of metrics: what each is called, what it means, how it is averaged, and where it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from agents.metrics.built_in import BUILT_IN
from agents.metrics.entry import Metric

FAMILIES = (
    Metric(
        name="reward/PART",
        label="PART",
        meaning="Mean of one part of the reward, by the part's own name.",
        column="score",
    ),
    Metric(
        name="policy/TERM_loss",
        label="TERM loss",
        meaning="A loss term of your own times its weight, as it is minimised.",
        needs="a registered term (loss.terms)",
    ),
    Metric(
        name="time/PHASE",
        label="PHASE",
        meaning="Seconds of one phase of an iteration.",
        column="phases",
        needs="a phase of your own",
    ),
)
"""Metrics whose names are made up elsewhere, by a task for example: the word in capitals stands for any other."""

_METRICS = {entry.name: entry for entry in BUILT_IN}
_MEASURED_HERE = frozenset(_METRICS)

METRICS: Mapping[str, Metric] = MappingProxyType(_METRICS)
"""All metrics by name, in the order in which they are shown; `register_metric` adds to it."""


def register_metric(entry: Metric) -> Metric:
    """Add a metric of your own, so that it is labelled, averaged and drawn as you say.

    Logging a metric does not need it: one that is not in the table is logged, and averaged over tokens. Registering a
    name of your own again replaces the entry, as happens in notebooks.

    Raises:
        ValueError: if one of ours has that name.

    Examples:
        >>> rhymes = Metric(name="text/rhymes", label="rhymes", meaning="Share of the texts that rhyme.", panel="Form")
        >>> register_metric(rhymes) is metric("text/rhymes")
        True
    """
    if entry.name in _MEASURED_HERE and entry != _METRICS[entry.name]:
        raise ValueError(
            f"llm-env itself measures {entry.name!r} ({_METRICS[entry.name].meaning}); log and register yours under "
            f"a name of its own, such as 'my/{entry.name.rpartition('/')[2]}'"
        )
    _METRICS[entry.name] = entry
    return entry


def metric(name: str) -> Metric:
    """The entry of a metric; one that nobody has described gets its name as label, and is averaged.

    Examples:
        >>> metric("ratio/max").reduce, metric("reward/spelling").label, metric("my/own").label
        ('max', 'spelling', 'my/own')
        >>> metric("policy/surprise_loss").label
        'surprise loss'
    """
    if name in _METRICS:
        return _METRICS[name]
    for family in FAMILIES:
        before, word, after = re.split("([A-Z]+)", family.name)
        found = re.fullmatch(f"{before}(.+){after}", name, flags=re.DOTALL)
        if found:
            return replace(family, name=name, label=family.label.replace(word, found[1]))
    return Metric(name=name, label=name, meaning="Not described: see register_metric.")


def described(names: Iterable[str]) -> list[Metric]:
    """The entries of these metrics in the order of the table; those that it does not have come last.

    Examples:
        >>> [entry.label for entry in described(["my/own", "policy/entropy", "reward/mean"])]
        ['reward', 'entropy', 'my/own']
    """
    names = list(names)
    wanted = set(names)
    known = [entry for name, entry in list(_METRICS.items()) if name in wanted]
    return known + [metric(name) for name in names if name not in _METRICS]
