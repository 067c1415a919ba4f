"""One process that writes texts, as the program that has started it sees it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import cloudpickle  # type: ignore[import-untyped]

from agents.rollouts import worker
from agents.rollouts.shards import Alive, Answer, Done, Failed, Ready, Shard, Text
from rewards.isolated import why_ended

STARTING_SECONDS = 600.0
ENDING_SECONDS = 0.5


class WorkerLostError(RuntimeError):
    """A process that writes texts has died, hangs, or says what makes no sense."""


class WorkerError(RuntimeError):
    """What a process that writes texts raised, where the error itself cannot be had."""


class WorkerProcess:
    """A process that writes texts. It ends with `end`, with this object, or with the program.

    Args:
        start: the first message, see `agents.rollouts.worker`.
        inherits: handles that it is to have.
        threads: that it computes with.
        patience: seconds in which it must be heard of while it writes.
    """

    def __init__(self, start: bytes, inherits: Sequence[int], threads: int, patience: float) -> None:
        self.patience = patience
        self.connection, other = multiprocessing.Pipe()
        with other:
            handles = [other.fileno(), *inherits]
            self.popen = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a task prints goes to standard error, not into the program's own output
                pass_fds=handles,
                # Not bound to cores: vLLM would bind each of several processes to the same.
                env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # so that Ctrl-C reaches the program only
            )
        self._finalizer = weakref.finalize(self, _end, self.popen, self.connection)
        self._send(start)
        self._is_ready = False

    def wait_until_ready(self) -> None:
        """Raise unless it can write."""
        if self._is_ready:
            return
        answer = self._heard(STARTING_SECONDS)
        if isinstance(answer, Failed):
            raise error_of(answer)
        if not isinstance(answer, Ready):
            raise WorkerLostError(f"said {answer!r} before it was ready")
        self._is_ready = True

    def write(self, shard: Shard, take: Callable[[Text], None]) -> Done:
        """Let it write.

        Args:
            shard: what.
            take: is given each text as it ends.

        Raises:
            WorkerLostError: if nothing sensible came back; another may be asked.
        """
        self.wait_until_ready()
        self._send(cloudpickle.dumps(shard))  # metadata may hold what the main script defines
        left = {job.request for job in shard.jobs}
        while True:
            answer = self._heard(self.patience)
            if isinstance(answer, Alive):
                continue
            if isinstance(answer, Failed):
                raise error_of(answer)
            if isinstance(answer, Text) and answer.number == shard.number and answer.request in left:
                if answer.episode.version != shard.version:
                    raise WorkerLostError(f"wrote with weights {answer.episode.version}, not {shard.version}")
                left.remove(answer.request)
                take(answer)
            elif isinstance(answer, Done) and answer.number == shard.number and not left:
                return answer
            else:
                raise WorkerLostError(f"said what nobody had asked for: {str(answer)[:200]}")

    def end(self) -> str:
        """Kill it, if it lives, and say how it ended."""
        try:
            died: int | None = self.popen.wait(ENDING_SECONDS)  # the connection of one that dies is closed a bit before
        except subprocess.TimeoutExpired:
            died = None
        self.kill()
        return "it was ended" if died is None else why_ended(died)

    def kill(self) -> None:
        """End it at once; once more does no harm."""
        self._finalizer()

    def _send(self, message: bytes) -> None:
        try:
            self.connection.send_bytes(message)
        except OSError as error:
            raise WorkerLostError(f"could not be asked: {error}") from error

    def _heard(self, patience: float) -> Answer:
        deadline = time.monotonic() + patience
        try:
            while not self.connection.poll(max(0.0, min(1.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise WorkerLostError(f"was not heard of for {patience:g} seconds")
            answer: Answer = pickle.loads(self.connection.recv_bytes())
        except WorkerLostError:
            raise
        except (EOFError, OSError) as error:
            raise WorkerLostError("has died") from error
        except Exception as error:
            raise WorkerLostError(f"said what cannot be read ({type(error).__name__}: {error})") from error
        return answer


def error_of(failed: Failed) -> Exception:
    """What a process raised, to be raised here."""
    error: Exception | None = None
    if failed.pickled is not None:
        loaded = pickle.loads(failed.pickled)
        error = loaded if isinstance(loaded, Exception) else None
    if error is None:
        error = WorkerError(f"a process that writes texts raised {failed.error}")
    error.add_note(f"In a process that writes texts:\n{failed.trace}")
    return error


def _end(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    if popen.poll() is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
