"""Who writes which part of the texts, and what happens if one is lost."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from agents.rollouts.workers.link import NobodyCameError, WorkerLostError
from agents.rollouts.workers.process import WorkerProcess
from agents.rollouts.workers.shards import Shard

logger = logging.getLogger("agents")

MOST_TRIES = 5
"""How many processes may be lost over the same texts, or in turn before one could begin."""

BETWEEN_TRIES_SECONDS = 1.0


class Asked:
    """A shard, where the answers go, and how many processes were lost over it."""

    def __init__(self, shard: Shard, answers: queue.SimpleQueue[Any]) -> None:
        self.shard = shard
        self.answers = answers
        self.lost = 0


class Crew:
    """Processes, each seen to by a thread. Whoever is free takes the next part.

    A part whose process is lost goes back to the others, and another process is begun in the place of the lost one. So
    as long as anybody writes, everything is written.

    Args:
        begin: begins the process of a place.
        count: how many places there are.

    Attributes:
        lost: how many processes had to be replaced.
        processes: in each place.
    """

    def __init__(self, begin: Callable[[int], WorkerProcess], count: int) -> None:
        self.lost = 0
        self._begin = begin
        self._asked: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open: dict[int, Shard] = {}
        self._closing = False
        self.processes: list[WorkerProcess | None] = [begin(place) for place in range(count)]
        self._threads = [threading.Thread(target=self._serve, args=(place,), daemon=True) for place in range(count)]
        for thread in self._threads:
            thread.start()

    def ask(self, shard: Shard, answers: queue.SimpleQueue[Any]) -> None:
        """Have a shard written; each `Text`, and then `Done` or an exception, is put into `answers`."""
        with self._changed:
            self._open[shard.number] = shard
        self._asked.put(Asked(shard, answers))

    def copies_in_use(self) -> set[int]:
        """Copies of the weights that parts not yet written need."""
        return {shard.copy for shard in list(self._open.values())}

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that changes when a part is written."""
        with self._changed:
            self._changed.wait_for(holds)

    def close(self) -> None:
        """End the processes."""
        with self._changed:
            self._closing = True
        for _ in self._threads:
            self._asked.put(None)
        for process in self.processes:
            if process is not None:
                process.kill()
        for thread in self._threads:
            thread.join()

    def _serve(self, place: int) -> None:
        """Have what is asked for written in this place, by one process after the other if need be."""
        in_turn = 0
        while not self._closing:
            try:
                process = self._process(place)
                process.wait_until_ready()
            except NobodyCameError as error:
                if not self._somebody_writes():
                    self._answer_the_next(error, block=False)
                continue
            except WorkerLostError as error:
                in_turn += 1
                reason = self._replace(place, str(error), "another one is begun")
                if in_turn == MOST_TRIES:
                    self._answer_the_next(_too_many("before they could begin", reason))
                    in_turn = 0
                continue
            except Exception as error:  # what it raised
                in_turn += 1
                if in_turn < MOST_TRIES and self._somebody_writes():
                    self._replace(place, f"could not begin: {error}", "another one is begun")
                    time.sleep(BETWEEN_TRIES_SECONDS)
                    continue
                self._end(place)
                self._answer_the_next(error)
                in_turn = 0
                continue
            in_turn = 0
            asked = self._asked.get()
            if asked is None:
                return
            self._write(asked, process, place)

    def _process(self, place: int) -> WorkerProcess:
        with self._changed:
            if self._closing:
                raise WorkerLostError("is not needed any more")
            process = self.processes[place]
            if process is None:
                process = self.processes[place] = self._begin(place)
            return process

    def _somebody_writes(self) -> bool:
        return any(process is not None and process.is_ready for process in self.processes)

    def _write(self, asked: Asked, process: WorkerProcess, place: int) -> None:
        try:
            done: object = process.write(asked.shard, asked.answers.put)
        except WorkerLostError as error:
            if self._closing:
                self._settle(asked, error)
                return
            reason = self._replace(place, str(error), "its texts are written again")
            asked.lost += 1
            if asked.lost < MOST_TRIES:
                self._asked.put(asked)
            else:
                self._settle(asked, _too_many("over the same texts", reason))
        except Exception as error:  # what the task or the engine raised there
            self._settle(asked, error)
        else:
            self._settle(asked, done)

    def _settle(self, asked: Asked, answer: object) -> None:
        with self._changed:
            del self._open[asked.shard.number]
            self._changed.notify_all()
        asked.answers.put(answer)

    def _answer_the_next(self, error: Exception, *, block: bool = True) -> None:
        """Let whoever asks for texts know why there are none."""
        try:
            asked = self._asked.get(block)
        except queue.Empty:
            return
        if asked is None:
            self._asked.put(None)  # for a thread that waits for it
        else:
            self._settle(asked, error)

    def _replace(self, place: int, what: str, then: str) -> str:
        how = self._end(place)
        if not self._closing:
            self.lost += 1
            logger.warning("process %d, which writes texts, %s (%s): %s", place, what, how, then)
        return f"{what} ({how})"

    def _end(self, place: int) -> str:
        process, self.processes[place] = self.processes[place], None
        if process is None:
            return "it could not be started"
        try:
            return process.end()
        except Exception as error:  # whatever it is, the texts must be written
            return f"how it ended cannot be found out ({type(error).__name__}: {error})"


def _too_many(where: str, reason: str) -> WorkerLostError:
    return WorkerLostError(
        f"{MOST_TRIES} processes were lost in turn {where}; the last one {reason}. Is there memory for --workers? With "
        "--workers 0 texts are written in this process"
    )
