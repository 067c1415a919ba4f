"""Tables of names: whatever can be chosen by a name (a task, a reward, an algorithm) is kept in a `Registry`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

__all__ = ["Registry", "UnknownNameError", "arguments_of", "did_you_mean", "wrong_arguments"]

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name was asked for that nobody registered.

    Args:
        kind: What was asked for, in words: "task", "algorithm".
        name: The name.
        known: The names there are.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(f"unknown {kind} {name!r}; {did_you_mean(name, names)}Known: {', '.join(names) or 'none yet'}")
        self._arguments = (kind, name, names)

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        # An error pickles what it gave to its base class, which here is the message and not the three arguments.
        return type(self), self._arguments


class Registry(Generic[T]):
    """A table from names to things of one kind, which users may add to.

    Args:
        kind: What it holds, in words and in the singular, for messages: "task", "algorithm".
        room: A package whose modules register what they define. They are all imported before anything is looked up, so
            that a new file in it is enough to add something.

    Examples:
        >>> shapes = Registry("shape")
        >>> @shapes.register("circle")
        ... def circle(radius): return 3.14 * radius**2
        >>> shapes.names(), "circle" in shapes, shapes["circle"](1)
        (['circle'], True, 3.14)
        >>> shapes["circel"]
        Traceback (most recent call last):
        rewards.registry.UnknownNameError: unknown shape 'circel'; did you mean 'circle'? Known: circle
    """

    def __init__(self, kind: str, room: str | None = None) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}
        self._room_to_import = room

    def add(self, name: str, thing: T) -> T:
        """Keep a thing under a name, and give it back.

        A notebook runs the cell that defines a class again and again, so a class or function from the same
        module and of the same qualified name replaces the earlier one.

        Raises:
            ValueError: If another thing has that name already.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.kind}: the name is {name!r}; expected a text that is not empty.")
        room = self._room_to_import
        if room is not None and not f"{_origin(thing)[0]}.".startswith(f"{room}."):
            self._all()  # a name that is taken there is refused here, and not when it is first looked up
        known = self._things.get(name)
        if known is not None and known is not thing and _origin(known) != _origin(thing):
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise ValueError(
                f"{article} {self.kind} named {name!r} is already registered ({'.'.join(_origin(known))}): "
                f"give yours another name"
            )
        self._things[name] = thing
        return thing

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to keep it under `name`."""
        return lambda thing: self.add(name, thing)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._all())

    def __getitem__(self, name: str) -> T:
        """The thing of that name; an `UnknownNameError`, which is a ValueError, if there is none."""
        things = self._all()
        if name not in things:
            raise UnknownNameError(self.kind, name, things)
        return things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return f"<Registry of the kind {self.kind!r}: {', '.join(self.names()) or 'empty'}>"

    def _all(self) -> dict[str, T]:
        if self._room_to_import is not None:
            room, self._room_to_import = importlib.import_module(self._room_to_import), None
            for module in pkgutil.iter_modules(room.__path__):
                importlib.import_module(f"{room.__name__}.{module.name}")
        return self._things


def did_you_mean(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.4) -> str:
    """The known names most like a mistyped one, as a question to put into a message.

    Args:
        name: What was given.
        known: What there is.
        count: How many names to show at most.
        cutoff: How alike they must be, from 0 (anything) to 1 (the same); see `difflib.get_close_matches`.

    Returns:
        A question with a space behind it, or an empty text if nothing is near.

    Examples:
        >>> did_you_mean("lenght", ["length", "cost"])
        "did you mean 'length'? "
        >>> did_you_mean("colour", ["length", "cost"], cutoff=0.6)
        ''
    """
    near = difflib.get_close_matches(str(name), dict.fromkeys(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def arguments_of(thing: Callable[..., object]) -> list[str]:
    """The names of the arguments that something registered can be given.

    Those of a class are its constructor's, and those of its bases where it hands `**arguments` on. A function's first
    is left out: it is what the function is called with, such as a rollout.

    Examples:
        >>> def mentions(rollout, word="please"): return float(word in rollout.text)
        >>> arguments_of(mentions)
        ['word']
        >>> class Base:
        ...     def __init__(self, seed=0): self.seed = seed
        >>> class Longer(Base):
        ...     def __init__(self, length, **arguments): super().__init__(**arguments)
        >>> arguments_of(Longer)
        ['length', 'seed']
    """
    return list(_parameters(thing))


def _parameters(thing: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The same with what is known of them."""
    if not isinstance(thing, type):
        return _named(thing)
    found: dict[str, inspect.Parameter] = {}
    for kind in thing.__mro__:
        if kind is object or "__init__" not in vars(kind):
            continue
        constructor = vars(kind)["__init__"]
        found |= {name: p for name, p in _named(constructor).items() if name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
            break
    return found


def _named(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Those that can be given by name, but the first."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return dict([(name, p) for name, p in inspect.signature(function).parameters.items() if p.kind in by_name][1:])


def wrong_arguments(thing: Callable[..., object], given: Mapping[str, object], besides: Collection[str] = ()) -> str:
    """What is wrong with the names of some arguments, in words; empty if they are known, and none is missing.

    Args:
        thing: what they are for.
        given: the arguments, by name.
        besides: names that are given otherwise.

    Examples:
        >>> def mentions(rollout, word="please"): return float(word in rollout.text)
        >>> wrong_arguments(mentions, {"wort": "thanks"})
        "there is no argument 'wort'; did you mean 'word'? it takes word"
    """
    known = {name: parameter for name, parameter in _parameters(thing).items() if name not in besides}
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    for name in given:
        if name not in known:
            return f"there is no argument {name!r}; {did_you_mean(name, known, count=1, cutoff=0.6)}{takes}"
    for name, parameter in known.items():
        if name not in given and parameter.default is parameter.empty:
            return f"the argument {name!r} is missing; {takes}"
    return ""


def _origin(thing: object) -> tuple[str, str]:
    """Where a thing was defined: its module and its name there. An instance is known by its identity alone."""
    name = getattr(thing, "__qualname__", None)
    return (thing.__module__, name) if isinstance(name, str) else (type(thing).__qualname__, f"object {id(thing)}")
