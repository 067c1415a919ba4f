"""The process that writes texts for a learner elsewhere.

On the learner's machine it is `python worker.py CONNECTION`, started from scratch, neither forked (the program has
threads) nor by `multiprocessing` (which would run the user's script again). The first message brings the program's
`sys.path` and what to make; until then it can import the standard library only. From another machine it comes by
itself, see `visit`.

    program -> worker    sys.path, room for the weights, a pickled function that makes a `Scribe`
    worker  -> program   Ready, or Failed
    program -> worker    WeightsFollow and the weights, if it has no part in the memory that they lie in
    program -> worker    a Shard, again and again
    worker  -> program   a Text for each of its jobs, Alive in between, then Done; or Failed

It ends when the connection is closed: when it reads next, or when it has something to say.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.rollouts.workers.shards import Answer, Failed, Shard
    from agents.rollouts.workers.shared_weights import SharedWeights
    from llm_env.engines import Engine, Job
    from llm_env.engines.writing import Part
    from llm_env.mdp.core import TokenMDP
    from llm_env.tasks import Task
    from llm_env.tokens.episode import Episode
    from llm_env.tokens.prompts import TokenizedPrompts

PULSE_SECONDS = 1.0


@dataclass(frozen=True)
class Scribe:
    """What a process needs to write texts.

    Attributes:
        engine: writes.
        task: bound to the tokens of the engine's model.
        mdp: of a task that keeps sessions, which must be scored where they are; else None.
    """

    engine: Engine
    task: Task
    mdp: TokenMDP | None = None


def serve(connection: Connection, *, is_here: bool) -> None:
    """Write what is asked for until the connection is closed.

    Args:
        connection: to the program.
        is_here: this process is on the program's machine, and finds modules where that does. Elsewhere it finds them
            where it does, and then there.
    """
    with contextlib.suppress(EOFError, ConnectionError, _NobodyListensError):
        _Worker(connection).run(is_here)


class _NobodyListensError(Exception):
    """The program has gone."""


class _Worker:
    """Answers until the connection is closed."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sending = threading.Lock()

    def run(self, is_here: bool) -> None:
        start = pickle.loads(self.connection.recv_bytes())
        sys.path[:] = start["path"] if is_here else dict.fromkeys([*sys.path, *start["path"]])
        from agents.rollouts.workers.shards import Ready, WeightsFollow

        try:
            weights = pickle.loads(start["weights"])()
            scribe = pickle.loads(start["make"])()
        except BaseException as error:
            self.say(_failed(error))
            return
        self.say(Ready())
        self.watch(scribe.engine)
        while True:
            message = pickle.loads(self.connection.recv_bytes())
            if isinstance(message, WeightsFollow):
                weights.receive(self.connection)
                continue
            try:
                self.write(message, scribe, weights)
            except _NobodyListensError:
                return
            except BaseException as error:
                self.say(_failed(error))

    def write(self, shard: Shard, scribe: Scribe, weights: SharedWeights) -> None:
        from agents.rollouts.workers.legs import written_on
        from agents.rollouts.workers.shards import Done, Text

        engine: Any = scribe.engine
        if engine.version != shard.version:
            engine.load_weights(weights.view(shard.copy), version=shard.version)
        before = _counts(scribe)
        rest: list[Part] = []
        changed: list[Part] = []
        if shard.leg is None:
            for job, episode in _written(shard, scribe):
                self.say(Text(shard.number, job.request, episode))
        else:
            for part, episode in written_on(shard, shard.leg, engine, scribe.task, _prompts(shard), rest, changed):
                self.say(Text(shard.number, part.job.request, episode, part))
        self.say(
            Done(shard.number, {name: count - before[name] for name, count in _counts(scribe).items()}, rest, changed)
        )

    def say(self, answer: Answer) -> None:
        import cloudpickle  # type: ignore[import-untyped]  # metadata may hold what the main script defines

        said = cloudpickle.dumps(answer)
        try:
            with self.sending:
                self.connection.send_bytes(said)
        except OSError as error:
            raise _NobodyListensError from error

    def watch(self, engine: Any) -> None:
        """Say now and then that the model goes on; of a process that hangs nothing is heard."""
        from agents.rollouts.workers.shards import Alive

        steps, advance = [0], engine.advance

        def counted(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            return advance(*args, **kwargs)

        engine.advance = counted

        def look() -> None:
            said = 0
            while True:
                time.sleep(PULSE_SECONDS)
                if steps[0] != said:
                    said = steps[0]
                    try:
                        self.say(Alive())
                    except _NobodyListensError:
                        return

        threading.Thread(target=look, daemon=True).start()


def _prompts(shard: Shard) -> TokenizedPrompts:
    from llm_env.tokens.prompts import TokenizedPrompts

    return TokenizedPrompts([prompt for prompt, _ in shard.prompts], [tokens for _, tokens in shard.prompts])


def _written(shard: Shard, scribe: Scribe) -> Iterator[tuple[Job, Episode]]:
    written = scribe.engine.write(
        scribe.task,
        _prompts(shard),
        shard.jobs,
        shard.sampling,
        context=shard.context,
        max_new_tokens=shard.max_new_tokens,
    )
    if scribe.mdp is None:
        yield from written
        return
    job_of = {job.request: job for job in shard.jobs}
    scored = scribe.mdp.score_written((job.request, episode) for job, episode in written)
    for request, episode in zip(sorted(job_of), scored, strict=True):
        episode.rollout.session = None
        yield job_of[request], episode


def _counts(scribe: Scribe) -> dict[str, int]:
    replies = scribe.task.replies
    return {"calls": replies.num_calls, "failures": replies.num_failures, "left_out": replies.num_left_out}


def _failed(error: BaseException) -> Failed:
    from agents.rollouts.workers.shards import Failed

    trace = traceback.format_exc()
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        pickled = None
    return Failed(f"{type(error).__name__}: {error}", trace, pickled)


if __name__ == "__main__":
    # As a module of its name, so that what is pickled here is found there.
    sys.modules["agents.rollouts.workers.worker"] = sys.modules["__main__"]
    serve(Connection(int(sys.argv[1])), is_here=True)
