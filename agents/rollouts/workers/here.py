"""Processes that write texts on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from agents.rollouts.workers import worker
from agents.rollouts.workers.link import Link, Links
from rewards.isolated import why_ended

ENDING_SECONDS = 0.5

# Not bound to cores: vLLM would bind each of several processes to the same.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Here(Links):
    """Processes on this machine.

    Args:
        threads: that each computes with.
        gpus: that each has for itself, or 0 if it may use them all.
        first_gpu: the first of them; those before are the learner's.
    """

    shares_memory = True

    def __init__(self, threads: int = 1, gpus: int = 0, first_gpu: int = 0) -> None:
        self.threads = threads
        self.gpus = gpus
        self.first_gpu = first_gpu

    def begin(self, place: int, inherits: Sequence[int]) -> Subprocess:
        """Start one."""
        more = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            first = self.first_gpu + place * self.gpus
            more["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(first, self.gpus, os.environ))
        return Subprocess(inherits, {**UNBOUND, **os.environ, **more})


class Subprocess(Link):
    """A process on this machine. It ends with `kill`, with this object, or with the program.

    Args:
        inherits: handles that it is to have.
        environment: its environment variables.
    """

    def __init__(self, inherits: Sequence[int], environment: Mapping[str, str]) -> None:
        self._connection, other = multiprocessing.Pipe()
        with other:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a task prints goes to standard error, not into the program's own output
                pass_fds=[other.fileno(), *inherits],
                env=environment,
                start_new_session=True,  # so that Ctrl-C reaches the program only
            )
        self._finalizer = weakref.finalize(self, _end, self.popen, self._connection)

    def connect(self) -> Connection:
        """It was started with its end of a pipe."""
        return self._connection

    def kill(self) -> None:
        """End it at once, and what it has started."""
        self._finalizer()

    def how_it_ended(self) -> str:
        """By which signal or exit code."""
        try:
            died: int | None = self.popen.wait(ENDING_SECONDS)  # the connection of one that dies is closed a bit before
        except subprocess.TimeoutExpired:
            died = None
        return "it was ended" if died is None else why_ended(died)


def visible_gpus(first: int, count: int, environment: Mapping[str, str]) -> list[str]:
    """The names of some of the GPUs that this process may use, for another one to use.

    Examples:
        >>> visible_gpus(1, 2, {}), visible_gpus(1, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6"})
        (['1', '2'], ['5', '6'])
    """
    mine = environment.get("CUDA_VISIBLE_DEVICES")
    wanted = range(first, first + count)
    if mine is None:
        return [str(number) for number in wanted]
    found = mine.split(",")[wanted.start : wanted.stop]
    if len(found) < count:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {mine}, but GPUs {first} to {first + count - 1} of these are wanted: use fewer "
            "--workers or --worker-gpus, or let this process see more"
        )
    return found


def _end(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    if popen.poll() is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
    connection.close()
