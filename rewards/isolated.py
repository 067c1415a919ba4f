"""Scoring in a separate process that can be killed: what `rewards.Guard` does when it has a timeout.

A thread that hangs cannot be ended and a signal handler works in the main thread only, so a reward that
may hang (an endless loop, a regular expression that backtracks forever, the agent's own code) needs a
process. It is started from scratch rather than forked, since forking a program that has threads or uses a GPU
is unsafe; and not by `multiprocessing`, which would run the user's main script again.

What a reward starts ends with its worker: children, their children, and on Linux also those that have made a session
of their own or have outlived their parents, since a supervisor between program and worker adopts them
(`rewards.worker`). This keeps order among processes; it is no prison. Without the rights of an administrator nobody
can hold on to a process that does not want it: one that kills or stops the supervisor first, that replaces itself
faster than it can be killed, that runs with the rights of another user (sudo), or that a service which runs already
was asked to start (systemd, Docker, cron). Code that may attack its surroundings needs a container around it. Elsewhere
than on Linux, a process that has made a session of its own survives.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from rewards import worker
from rewards.base import Reward
from rewards.rollout import Rollout
from rewards.score import RewardError, Score

logger = logging.getLogger("rewards")

# Loading a reward may import large libraries; one that takes longer than this is taken to hang.
STARTUP_SECONDS = 120.0

# Ending the worker and what it has started is a matter of milliseconds; a supervisor that takes longer is stopped.
ENDING_SECONDS = 10.0


class IsolationError(RuntimeError):
    """A rollout could not be scored: its reward raised, ran out of time or ended the worker process.

    Args:
        summary: What happened, in a line.
        trace: The worker's traceback, where it could still give one.
    """

    def __init__(self, summary: str, trace: str = "") -> None:
        super().__init__(summary)
        self.trace = trace


class StartupError(RuntimeError):
    """No worker process could load the reward, not even the first: scoring would fail on every rollout."""


class Isolated:
    """Scores rollouts with a reward in a worker process, which is killed when one takes too long.

    The process starts with the first rollout, and anew with the next one after it ended. It has a copy of
    the reward as it was when this object was made. Any thread may use this object; calls take turns.

    What the reward draws from `random`, `numpy.random` and torch's global generator is decided by a number for each
    rollout, which comes from a generator of this object if there is a seed, and else from the program's own `random`.
    So runs that begin with the same seed agree, whenever workers are replaced. Generators that a reward makes for
    itself without a seed, such as `numpy.random.default_rng()`, differ each time, as everywhere.

    If the reward forks, and the child comes back from scoring as if it were the worker, it is ended, its answer is
    dropped, and there is a warning (logger "rewards"): each rollout has one score, the worker's.

    Args:
        reward: The reward; it travels by cloudpickle, so functions of the main script and closures do too.
        timeout: Seconds a rollout may take. Starting the process does not count.
        seed: Of what the reward draws at random; None follows the program's `random`.

    Raises:
        TypeError: If the reward cannot be pickled.

    Example:
        >>> from rewards import as_reward
        >>> isolated = Isolated(as_reward(lambda rollout: len(rollout.text)), timeout=10)
        >>> isolated.score(Rollout.of("four")).value
        4.0
        >>> isolated.close()
    """

    def __init__(self, reward: Reward, timeout: float, seed: int | None = None) -> None:
        if os.name != "posix":
            raise OSError(
                f"A reward with a timeout needs process groups to be killed, which {sys.platform} does not "
                "have; expected Linux or macOS. Use timeout=None there."
            )
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout is {timeout}; expected a number of seconds > 0, or None for no limit.")
        try:
            payload = cloudpickle.dumps(reward)
        except Exception as error:
            raise TypeError(
                f"{reward!r} cannot be sent to the worker process that a timeout needs, since it cannot be "
                f"pickled: {error}. Keep locks, connections and open files out of the reward (open them on "
                "first use), or use timeout=None."
            ) from error
        self.__setstate__((payload, timeout, reward.name, None))
        self.reseed(seed)

    def __getstate__(self) -> tuple[bytes, float, str, random.Random | None]:
        return self._payload, self.timeout, self._name, self._own_random

    def __setstate__(self, state: tuple[bytes, float, str, random.Random | None]) -> None:
        self._payload, self.timeout, self._name, self._own_random = state
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._has_started = False
        self._number = 0
        self._num_strays = 0

    def reseed(self, seed: int | None) -> None:
        """Begin what the reward draws at random anew, from this seed; None follows the program's `random`."""
        if seed is not None and seed < 0:
            raise ValueError(f"seed is {seed}; expected a whole number of 0 or more, or None.")
        self._own_random = None if seed is None else random.Random(seed)

    def score(self, rollout: Rollout) -> Score:
        """Score one rollout.

        Raises:
            IsolationError: If the reward raised, timed out or ended its process on this rollout.
            RewardError: If what it returned is no score.
            StartupError: If no worker process could load the reward.
        """
        # pickle would not do: metadata may hold objects whose classes are defined in the main script.
        pickled = cloudpickle.dumps(rollout)
        with self._lock:
            self._number += 1
            seed = (self._own_random or random).getrandbits(64)
            try:
                reply = self._ask(self._number, seed, pickled)
            except BaseException as error:
                # The process is ended on KeyboardInterrupt as well. Otherwise its answer to this rollout would arrive
                # later, and be taken for the answer to the next one.
                code = self._end()
                # With any other exit code than that of our own SIGKILL, the worker had ended by itself before the time
                # was over, and a process that it had forked kept the connection open.
                if isinstance(error, TimeoutError) and code in (None, -signal.SIGKILL):
                    raise IsolationError(
                        f"TimeoutError: no score after {self.timeout} s; the worker process was killed"
                    ) from None
                if isinstance(error, TimeoutError | EOFError | ConnectionError):
                    raise IsolationError(f"the worker process ended while scoring ({why_ended(code)})") from None
                raise
            self._look_for_strays()
        match reply:
            case ("score", Score() as score):
                return score
            case ("invalid", message):
                raise RewardError(message)
            case (_, summary, trace):
                raise IsolationError(summary, trace)
        raise AssertionError(f"unknown reply {reply!r}")

    def close(self) -> None:
        """End the worker process; another one starts if there is anything to score after that."""
        with self._lock:
            self._end()

    def _ask(self, number: int, seed: int, pickled: bytes) -> tuple[Any, ...]:
        known = self._process
        process = self._started()
        try:
            return process.ask(number, seed, pickled, self.timeout)
        except (EOFError, ConnectionError):
            if process is not known:
                raise
        # An old worker may have died while it was idle without our noticing, so it is replaced and asked again. Only
        # the death of a new one (raised above) is blamed on this rollout.
        self._end()
        return self._started().ask(number, seed, pickled, self.timeout)

    def _started(self) -> _Process:
        if self._process is not None and not self._process.is_ready():
            self._end()
        if self._process is None:
            process = _Process(self)
            self._process = process
            try:
                reply = process.load(self._payload)
            except (TimeoutError, EOFError, ConnectionError) as error:
                reply = ("failed", f"{type(error).__name__}: {error} ({why_ended(self._end())})", "")
            if reply[0] != "ready":
                self._end()
                _, summary, trace = reply
                if self._has_started:
                    raise IsolationError(f"the worker process could not be started again: {summary}", trace)
                raise StartupError(
                    f"A worker process could not load the reward: {summary}. It must be able to import what "
                    f"the reward uses.\n{trace}"
                )
            self._has_started = True
        return self._process

    def _end(self) -> int | None:
        if self._process is None:
            return None
        code = self._process.end()
        self._look_for_strays()
        self._process = None
        return code

    def _look_for_strays(self) -> None:
        found = 0 if self._process is None else self._process.new_strays()
        before, self._num_strays = self._num_strays, self._num_strays + found
        if before.bit_length() < self._num_strays.bit_length():  # at 1, 2, 4, ...
            logger.warning(
                "reward %r: a process that it had forked came back from scoring as if it were the worker process; its "
                "answer was dropped (%d so far). Let a forked process end with os._exit, or use subprocess or "
                "multiprocessing.",
                self._name,
                self._num_strays,
            )


class _Process:
    """One worker process and the connection to it. It ends when its user is collected, or the program ends."""

    def __init__(self, user: Isolated) -> None:
        self.owner = os.getpid()
        self.connection, connection = socket.socketpair()
        self.control, control = socket.socketpair()
        self._dropped = 0
        self._noticed = bytearray()
        with connection, control:
            ends = [connection.fileno(), control.fileno()]
            self.popen = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, *map(str, ends), str(self.owner)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what the reward prints goes to standard error, not into the program's own output
                pass_fds=ends,
                start_new_session=True,  # so that Ctrl-C reaches the program only
            )
        sockets = (self.connection, self.control)
        self._finalizer = weakref.finalize(user, _end, self.popen, *sockets, self._noticed, self.owner)

    def load(self, payload: bytes) -> tuple[Any, ...]:
        deadline = time.monotonic() + STARTUP_SECONDS
        return self._exchange((0, list(sys.path), payload), deadline)

    def is_ready(self) -> bool:
        """Whether it is alive, and was started by this process rather than by one that this was forked from."""
        if self.owner != os.getpid():
            return False
        self.connection.setblocking(False)
        try:
            # Where there is something that nobody has asked for, `_exchange` leaves it out.
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except ConnectionError:
            return False

    def ask(self, number: int, seed: int, pickled: bytes, timeout: float) -> tuple[Any, ...]:
        return self._exchange((number, seed, pickled), time.monotonic() + timeout)

    def _exchange(self, message: tuple[Any, ...], deadline: float) -> tuple[Any, ...]:
        """Send a message, and receive the answer that has its number."""
        worker.send(self.connection, pickle.dumps(message), deadline)
        while True:
            number, *answer = pickle.loads(worker.receive(self.connection, deadline))
            if number == message[0]:
                return tuple(answer)
            self._dropped += 1

    def new_strays(self) -> int:
        """How many answers were not the worker's since this was asked the last time."""
        if self._finalizer.alive:
            _read_notices(self.control, self._noticed)
        found = len(self._noticed) + self._dropped
        self._noticed.clear()
        self._dropped = 0
        return found

    def end(self) -> int | None:
        """Kill it and all that it has started, and return its exit code; None if that was done before."""
        code: int | None = self._finalizer()
        return code


def _end(
    popen: subprocess.Popen[bytes], connection: socket.socket, control: socket.socket, noticed: bytearray, owner: int
) -> int | None:
    with connection, control:
        if owner != os.getpid():
            return None  # this is a forked copy of the program: the worker belongs to the original
        with contextlib.suppress(OSError):  # not connected any more: the supervisor has ended by itself
            control.shutdown(socket.SHUT_WR)
        try:
            code = popen.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()  # somebody has stopped the supervisor; the worker notices that it is gone, and ends
            code = popen.wait()
        _read_notices(control, noticed)
        return code


def _read_notices(control: socket.socket, noticed: bytearray) -> None:
    control.setblocking(False)
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while found := control.recv(4096):
            noticed += found


def why_ended(code: int | None) -> str:
    """How a process has ended, in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
