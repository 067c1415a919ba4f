"""Scoring in a separate process that can be killed: what `rewards.Guard` does when it has a timeout.

A thread that hangs cannot be ended and a signal handler works in the main thread only, so a reward that
may hang (an endless loop, a regular expression that backtracks forever, the agent's own code) needs a
process. It is started from scratch rather than forked, since forking a program that has threads or uses a GPU
is unsafe; and not by `multiprocessing`, which would run the user's main script again.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
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

# Loading a reward may import large libraries; one that takes longer than this is taken to hang.
STARTUP_SECONDS = 120.0


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

    Args:
        reward: The reward; it travels by cloudpickle, so functions of the main script and closures do too.
        timeout: Seconds a rollout may take. Starting the process does not count.

    Raises:
        TypeError: If the reward cannot be pickled.

    Example:
        >>> from rewards import as_reward
        >>> isolated = Isolated(as_reward(lambda rollout: len(rollout.text)), timeout=10)
        >>> isolated.score(Rollout.of("four")).value
        4.0
        >>> isolated.close()
    """

    def __init__(self, reward: Reward, timeout: float) -> None:
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
        self.__setstate__((payload, timeout))

    def __getstate__(self) -> tuple[bytes, float]:
        return self._payload, self.timeout

    def __setstate__(self, state: tuple[bytes, float]) -> None:
        self._payload, self.timeout = state
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._has_started = False

    def score(self, rollout: Rollout) -> Score:
        """Score one rollout.

        Raises:
            IsolationError: If the reward raised, timed out or ended its process on this rollout.
            RewardError: If what it returned is no score.
            StartupError: If no worker process could load the reward.
        """
        # pickle would not do: metadata may hold objects whose classes are defined in the main script.
        request = cloudpickle.dumps(rollout)
        with self._lock:
            try:
                reply = self._ask(request)
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
                    raise IsolationError(f"the worker process ended while scoring ({_why(code)})") from None
                raise
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

    def _ask(self, request: bytes) -> tuple[Any, ...]:
        known = self._process
        process = self._started()
        try:
            return process.ask(request, self.timeout)
        except (EOFError, ConnectionError):
            if process is not known:
                raise
        # An old worker may have died while it was idle without our noticing, so it is replaced and asked again. Only
        # the death of a new one (raised above) is blamed on this rollout.
        self._end()
        return self._started().ask(request, self.timeout)

    def _started(self) -> _Process:
        if self._process is not None and not self._process.is_ready():
            self._end()
        if self._process is None:
            process = _Process(self)
            self._process = process
            try:
                reply = process.load(self._payload)
            except (TimeoutError, EOFError, ConnectionError) as error:
                reply = ("failed", f"{type(error).__name__}: {error} ({_why(self._end())})", "")
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
        process, self._process = self._process, None
        return None if process is None else process.end()


class _Process:
    """One worker process and the connection to it. It ends when its user is collected, or the program ends."""

    def __init__(self, user: Isolated) -> None:
        self.owner = os.getpid()
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what the reward prints goes to standard error, not into the program's own output
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that it is killed with its children, and Ctrl-C reaches the parent only
            )
        self._finalizer = weakref.finalize(user, _end, self.popen, self.connection, self.owner)

    def load(self, payload: bytes) -> tuple[Any, ...]:
        deadline = time.monotonic() + STARTUP_SECONDS
        hello = (list(sys.path), self.owner, payload)
        worker.send(self.connection, pickle.dumps(hello), deadline)
        return self._reply(deadline)

    def is_ready(self) -> bool:
        """Whether it is alive, and was started by this process rather than by one that this was forked from."""
        if self.owner != os.getpid():
            return False
        self.connection.setblocking(False)
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False  # it closed the connection, or sent something without being asked

    def ask(self, request: bytes, timeout: float) -> tuple[Any, ...]:
        deadline = time.monotonic() + timeout
        worker.send(self.connection, request, deadline)
        return self._reply(deadline)

    def _reply(self, deadline: float) -> tuple[Any, ...]:
        reply: tuple[Any, ...] = pickle.loads(worker.receive(self.connection, deadline))
        return reply

    def end(self) -> int | None:
        """Kill the process group and return the exit code; None if that was done before."""
        code: int | None = self._finalizer()
        return code


def _end(popen: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> int | None:
    connection.close()
    if owner != os.getpid():
        return None  # this is a forked copy of the program: the worker belongs to the original
    # Kill before waiting: once it was waited for, its id, which also names the group, may be given to another process.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    return popen.wait()


def _why(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
