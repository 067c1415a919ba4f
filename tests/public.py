"""What is asked of every public name: a docstring of its own, and an example that runs as a doctest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any


def undocumented(name: str, thing: Any) -> list[str]:
    """What lacks a docstring: the thing itself, or a public method or property that a class defines."""
    text = thing.__doc__ or ""
    # A dataclass without a docstring is given its signature as one.
    missing = [] if text.strip() and not text.startswith(f"{name}(") else [name]
    if isinstance(thing, type):
        missing += [f"{name}.{attribute}" for attribute, value in methods(thing) if not value.__doc__]
    return missing


def has_example(thing: Any) -> bool:
    """Whether its docstring has an example, or, for a class, that of one of its methods."""
    texts = [thing.__doc__]
    if isinstance(thing, type):
        texts += [value.__doc__ for _, value in methods(thing)]
    return any(">>>" in (text or "") for text in texts)


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
            yield name, value
