"""Arguments of tasks and rewards, as settings hold them: flat names and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with every name of several parts, such as "config.max_terms", made into a mapping in a mapping.

    Examples:
        >>> nested({"dataset": "chain_sum", "config.min_terms": 2, "config.max_terms": 3})
        {'dataset': 'chain_sum', 'config': {'min_terms': 2, 'max_terms': 3}}
    """
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        *outer, last = name.split(".")
        inside = result
        for part in outer:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"the argument {name} is inside of {part!r}, which has a value itself: {inside!r}")
        if isinstance(inside.get(last), dict):
            raise ValueError(f"the argument {name} is given a value, and so is what is inside of it: {inside[last]}")
        inside[last] = value
    return result
