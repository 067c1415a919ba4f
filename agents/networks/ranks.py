"""Several processes that learn one policy together: the first does the run, and the others follow it.

The first process does all that a run does, by itself. Where the weights are needed, which no process has whole, it asks
the others to do the same at the same time: a method that is marked with `together` is called in all of them, on the
part of the same name, with the same arguments.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from tensordict import TensorDictBase
from torch import distributed

Method = TypeVar("Method", bound=Callable[..., Any])
Each = TypeVar("Each")

PATIENCE = datetime.timedelta(days=30)
"""How long a process waits for the first one, which may be writing texts, or be stopped."""


class Ranks:
    """The processes that learn together, as one of them sees them.

    Args:
        rank: the number of this one, from 0 on.
        size: how many there are.

    Attributes:
        parts: what the first can ask for, by name.

    Examples:
        >>> ALONE.gather("what this process has found")
        ['what this process has found']
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.parts: dict[str, Any] = {}
        self._asking = self._broken = False
        # Objects go from process to process on the CPU, whatever computes.
        self._talk = distributed.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is the process that does the run."""
        return self.rank == 0

    def say(self, message: Any) -> None:
        """The first tells the others."""
        if self.size > 1:
            distributed.broadcast_object_list([message], src=0, group=self._talk)

    def hear(self) -> Any:
        """What the first says next."""
        heard = [None]
        distributed.broadcast_object_list(heard, src=0, group=self._talk)
        return heard[0]

    def share(self, lengths: torch.Tensor) -> torch.Tensor:
        """Which of several texts this process reads: as many as any other, and about as long.

        Examples:
            >>> ranks = Ranks()
            >>> ranks.size = 2
            >>> ranks.share(torch.tensor([5, 2, 7, 3])).tolist()
            [1, 0]
        """
        return lengths.argsort(stable=True)[self.rank :: self.size]

    def gather(self, each: Each) -> list[Each]:
        """What all have found, in their order, in each of them."""
        if self.size == 1:
            return [each]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, each, group=self._talk)
        return found

    def follow(self) -> Any:
        """Do what the first asks for until it says something else, which is returned."""
        while isinstance(asked := self.hear(), _Asked):
            method = getattr(self.parts[asked.part], asked.method)
            method(*asked.args, **asked.options)
        return asked

    def _ask(self, part: Any, method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.size == 1 or not self.leads or self._asking:
            return method(part, *args, **options)
        [name] = [name for name, each in self.parts.items() if each is part]
        with self.as_one():
            self.say(_Asked(name, method.__name__, tuple(map(_portable, args)), options))
            self._asking = True  # what the method itself calls is called by the others, too
            try:
                return method(part, *args, **options)
            finally:
                self._asking = False

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """What all do at the same time: if the first fails in it, the others wait for it, and end when it does."""
        self._broken = True
        yield
        self._broken = False

    def forget(self) -> None:
        """Let the parts go, and the memory that they take: optimizers and networks refer to each other."""
        self.parts.clear()
        gc.collect()

    def dismiss(self, last: Any = None) -> None:
        """The first has nothing more to ask for; what it says last is what `follow` returns to the others.

        Where it has failed in what all were doing, it says nothing: they wait for each other, and end when it does.
        """
        if not self._broken:
            self.say(last)


class _Asked:
    """What the first process asks the others to do."""

    def __init__(self, part: str, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.part = part
        self.method = method
        self.args = args
        self.options = options


def together(method: Method) -> Method:
    """Mark a method that all processes must call at the same time: where the first calls it, the others do.

    It belongs to a class whose instances have `ranks`, and are among their parts if there are several.
    """

    @functools.wraps(method)
    def called(self: Any, *args: Any, **options: Any) -> Any:
        return self.ranks._ask(self, method, args, options)

    return cast(Method, called)


@functools.cache
def launched() -> Ranks:
    """The processes that `torchrun` has started, of which this is one; or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not distributed.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(distributed.destroy_process_group)
    return Ranks(distributed.get_rank(), size)


def _portable(argument: Any) -> Any:
    """What goes to the others: of tensors by name, such as all weights, their shapes only, see `sharding.like`."""
    if isinstance(argument, TensorDictBase | torch.Tensor):
        return argument.cpu()
    return _shapes(argument) if isinstance(argument, Mapping) else argument


def _shapes(named: Any) -> Any:
    if isinstance(named, Mapping):
        return {name: _shapes(each) for name, each in named.items()}
    return _Shape(named) if isinstance(named, torch.Tensor) and named.ndim else named


class _Shape:
    """A tensor that comes without its numbers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(torch.empty, self.shape, dtype=self.dtype), ()


ALONE = Ranks()
"""One process by itself."""
