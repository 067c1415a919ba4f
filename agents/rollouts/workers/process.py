"""One process that writes texts, as the program sees it."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import cloudpickle  # type: ignore[import-untyped]

from agents.rollouts.workers.link import Link, WorkerLostError
from agents.rollouts.workers.shards import Alive, Answer, Done, Failed, Leg, Ready, Shard, Text, WeightsFollow
from agents.rollouts.workers.shared_weights import SharedWeights

STARTING_SECONDS = 600.0


class WorkerError(RuntimeError):
    """What a process that writes texts raised, where the error itself cannot be had."""


class WorkerProcess:
    """A process that writes texts.

    Args:
        link: the way to it.
        start: the first message, see `agents.rollouts.workers.worker`.
        weights: to send before it writes with them; None if it has the memory that they lie in.
        patience: seconds in which it must be heard of while it writes.
    """

    def __init__(self, link: Link, start: bytes, weights: SharedWeights | None, patience: float) -> None:
        self.link = link
        self.patience = patience
        self.is_ready = False
        self._start = start
        self._weights = weights
        self._version: int | None = None
        self._connection: Connection | None = None

    def wait_until_ready(self) -> None:
        """Raise unless it can write.

        Raises:
            NobodyCameError: it is not there yet; ask again.
            WorkerLostError: it has died or hangs.
        """
        if self.is_ready:
            return
        if self._connection is None:
            self._connection = self.link.connect()
            self._send(self._start)
        answer = self._heard(STARTING_SECONDS)
        if isinstance(answer, Failed):
            raise error_of(answer)
        if not isinstance(answer, Ready):
            raise WorkerLostError(f"said {answer!r} before it was ready")
        self.is_ready = True

    def write(self, shard: Shard, take: Callable[[Text], None]) -> Done:
        """Let it write.

        Args:
            shard: what.
            take: is given each text as it ends.

        Raises:
            WorkerLostError: if nothing sensible came back; another may be asked.
        """
        self.wait_until_ready()
        if self._weights is not None:
            if self._version != shard.version:
                self._send(pickle.dumps(WeightsFollow()))
                self._send(self._weights.bytes_of(shard.copy))
                self._version = shard.version
            shard = replace(shard, copy=0)
        self._send(cloudpickle.dumps(shard))  # metadata may hold what the main script defines
        return self._take_all(shard, take) if shard.leg is None else self._take_leg(shard, shard.leg, take)

    def _take_all(self, shard: Shard, take: Callable[[Text], None]) -> Done:
        left = {job.request for job in shard.jobs}
        while True:
            answer = self._answer(shard)
            if isinstance(answer, Text) and answer.request in left:
                if answer.episode.version != shard.version:
                    raise WorkerLostError(f"wrote with weights {answer.episode.version}, not {shard.version}")
                left.remove(answer.request)
                take(answer)
            elif isinstance(answer, Done) and not left:
                return answer
            else:
                raise _odd(answer)

    def _take_leg(self, shard: Shard, leg: Leg, take: Callable[[Text], None]) -> Done:
        """All together, for whoever writes it again may end other texts of it, by rounding."""
        ended: list[Text] = []
        while isinstance(answer := self._answer(shard), Text):
            ended.append(answer)
        if not leg.allows(shard.jobs, [text.request for text in ended], [*answer.rest, *answer.changed]):
            raise _odd(answer)
        for text in ended:
            take(text)
        return answer

    def _answer(self, shard: Shard) -> Text | Done:
        while True:
            answer = self._heard(self.patience)
            if isinstance(answer, Failed):
                raise error_of(answer)
            if isinstance(answer, Text | Done) and answer.number == shard.number:
                return answer
            if not isinstance(answer, Alive):
                raise _odd(answer)

    def end(self) -> str:
        """Kill it, if it lives, and say how it ended."""
        how = self.link.how_it_ended()
        self.kill()
        return how

    def kill(self) -> None:
        """End it at once; once more does no harm."""
        self.is_ready = False
        self.link.kill()

    def _send(self, message: bytes | memoryview) -> None:
        assert self._connection is not None
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise WorkerLostError(f"could not be asked: {error}") from error

    def _heard(self, patience: float) -> Answer:
        assert self._connection is not None
        deadline = time.monotonic() + patience
        try:
            while not self._connection.poll(max(0.0, min(1.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise WorkerLostError(f"was not heard of for {patience:g} seconds")
            answer: Answer = pickle.loads(self._connection.recv_bytes())
        except WorkerLostError:
            raise
        except (EOFError, OSError) as error:
            raise WorkerLostError("has died") from error
        except Exception as error:
            raise WorkerLostError(f"said what cannot be read ({type(error).__name__}: {error})") from error
        return answer


def _odd(answer: Answer) -> WorkerLostError:
    return WorkerLostError(f"said what nobody had asked for: {str(answer)[:200]}")


def error_of(failed: Failed) -> Exception:
    """What a process raised, to be raised here."""
    error: Exception | None = None
    if failed.pickled is not None:
        with contextlib.suppress(Exception):  # what it is made of may not be here, if it comes from another machine
            loaded = pickle.loads(failed.pickled)
            error = loaded if isinstance(loaded, Exception) else None
    if error is None:
        error = WorkerError(f"a process that writes texts raised {failed.error}")
    error.add_note(f"In a process that writes texts:\n{failed.trace}")
    return error
