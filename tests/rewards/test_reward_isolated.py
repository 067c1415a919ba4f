"""Isolated scoring: whose answer it is, what is left running, and what the worker process draws at random."""

import ctypes
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time

import cloudpickle
import numpy as np
import pytest

from rewards import Guard, Rollout, Score, as_reward
from rewards.isolated import Isolated, IsolationError
from tests.rewards.test_reward_guard import gone, guarded, rollouts, run_script, values

__all__ = ["guarded"]  # a fixture

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the worker's process group is killed")


class TestWhoseAnswerItIs:
    """Each text gets its own score, whatever processes a reward makes."""

    @pytest.mark.parametrize("seconds", [0.0, 0.05])
    def test_a_forked_child_that_comes_back_does_not_answer(self, guarded, caplog, seconds):
        def forking(rollout):
            if os.fork() == 0:
                time.sleep(seconds)  # at 0.05 it comes back in the middle of the next text
                return -1.0
            time.sleep(0.1 - seconds)
            return int(rollout.text)

        guard = guarded(forking, timeout=10)
        assert values(guard(rollouts(*"12345"))) == [1, 2, 3, 4, 5]
        time.sleep(0.2)
        guard.close()
        assert guard.num_failures == 0
        messages = [record.getMessage() for record in caplog.records]
        assert "reward 'forking': a process that it had forked came back from scoring" in messages[0]
        assert [message.split("(")[1].split(" ")[0] for message in messages][-1] in ("4", "5")

    def test_a_forked_child_that_raises_does_not_answer(self, guarded, caplog):
        def forking(rollout):
            if os.fork() == 0:
                raise ValueError("the child's")
            os.wait()
            return int(rollout.text)

        guard = guarded(forking, timeout=10)
        assert values(guard(rollouts(*"123"))) == [1, 2, 3]
        assert guard.num_failures == 0
        assert "came back from scoring" in caplog.text

    def test_a_fork_that_python_does_not_see(self, guarded):
        def forking(rollout):
            if ctypes.CDLL(None).fork() == 0:
                return -1.0
            os.wait()
            return int(rollout.text)

        assert values(guarded(forking, timeout=10)(rollouts(*"123"))) == [1, 2, 3]

    def test_multiprocessing(self, guarded, caplog):
        def pooled(rollout):
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return sum(pool.map(abs, [-1, -2, -len(rollout.text)]))

        assert values(guarded(pooled, timeout=20)(rollouts("a", "ab"))) == [4, 5]
        assert not caplog.records

    def test_an_answer_to_another_request_is_dropped(self, guarded, caplog):
        def meddling(rollout):
            from rewards import worker

            with socket.socket(fileno=os.dup(int(sys.argv[1]))) as connection:
                worker.send(connection, pickle.dumps((0, "score", Score(99.0))))
            return int(rollout.text)

        guard = guarded(meddling, timeout=10)
        assert values(guard(rollouts(*"123"))) == [1, 2, 3]
        assert "reward 'meddling'" in caplog.text
        assert "was dropped" in caplog.text

    def test_programs_that_a_reward_starts_have_no_part_in_the_connection(self, guarded):
        def starting(rollout):
            listing = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
            return listing.stdout.count("socket:")

        assert values(guarded(starting, timeout=10)(rollouts("a"))) == [0]


def daemon(file, seconds=60):
    """Start a process as daemons do: of a session of its own, and of a parent that has ended."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            file.write_text(str(os.getpid()))
            os.execvp("sleep", ["sleep", str(seconds)])
        os._exit(0)
    os.waitpid(child, 0)
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)


@linux
class TestWhatIsLeftRunning:
    """A reward's processes end with its worker, those of their own session, too."""

    def escaping(self, tmp_path, then):
        session, orphan = tmp_path / "session", tmp_path / "orphan"

        def escape(rollout):
            child = subprocess.Popen(["sleep", "60"], start_new_session=True)
            session.write_text(str(child.pid))
            daemon(orphan)
            return then(rollout)

        return escape, lambda: [int(file.read_text()) for file in (session, orphan)]

    def test_after_a_timeout(self, guarded, tmp_path):
        escape, pids = self.escaping(tmp_path, lambda rollout: time.sleep(60))
        guard = guarded(escape, timeout=0.7)
        assert values(guard(rollouts("a"))) == [0.0]
        assert "TimeoutError" in guard.failures[0].error
        assert all(map(gone, pids()))

    def test_after_closing(self, guarded, tmp_path):
        escape, pids = self.escaping(tmp_path, lambda rollout: 1.0)
        guard = guarded(escape, timeout=10)
        assert values(guard(rollouts("a"))) == [1.0]
        assert not any(map(is_zombie_or_gone, pids()))
        guard.close()
        assert all(map(gone, pids()))

    @pytest.mark.parametrize("end", ["exit", "kill"])
    def test_after_the_worker_has_ended_by_itself(self, guarded, tmp_path, end):
        def ending(rollout):
            os._exit(3) if end == "exit" else os.killpg(0, signal.SIGKILL)

        escape, pids = self.escaping(tmp_path, ending)
        guard = guarded(escape, timeout=30)
        start = time.monotonic()
        assert values(guard(rollouts("a"))) == [0.0]
        assert time.monotonic() - start < 15
        assert ("exit code 3" if end == "exit" else "SIGKILL") in guard.failures[0].error
        assert all(map(gone, pids()))

    def test_after_the_program_was_killed(self, tmp_path):
        script = run_script(
            tmp_path,
            """
            import os, subprocess, time
            from rewards import Guard, Rollout
            def hanging(rollout):
                child = subprocess.Popen(["sleep", "60"], start_new_session=True)
                with open("new", "w") as file:
                    file.write(f"{os.getpid()} {child.pid}")
                os.rename("new", "pids")
                time.sleep(60)
            Guard(hanging, timeout=60)([Rollout.of("a")])
            """,
            cwd=tmp_path,
        )
        deadline = time.monotonic() + 20
        while not (tmp_path / "pids").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        script.kill()
        script.communicate()
        assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())

    def test_a_killed_supervisor_takes_its_worker_along(self, guarded):
        guard = guarded(lambda rollout: os.getpid(), timeout=10)
        (worker,) = values(guard(rollouts("a")))
        supervisor = guard._isolated._process.popen.pid
        os.kill(supervisor, signal.SIGKILL)
        assert gone(int(worker))
        assert values(guard(rollouts("a"))) != [worker]
        assert guard.num_failures == 0

    def test_processes_that_end_are_not_kept_as_zombies(self, guarded, tmp_path):
        def leaving(rollout):
            daemon(tmp_path / rollout.text, seconds=0)
            return os.getppid()

        (supervisor,) = values(guarded(leaving, timeout=10)(rollouts("a")))
        deadline = time.monotonic() + 2
        while len(children(int(supervisor))) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(children(int(supervisor))) == 1, "the worker"

    def test_no_process_of_ours_is_left(self, guarded):
        before = children()
        guard = guarded(lambda rollout: os.getpid(), timeout=10)
        (worker,) = values(guard(rollouts("a")))
        assert len(children() - before) == 1
        guard.close()
        assert children() == before
        assert gone(int(worker))


def is_zombie_or_gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def children(parent=None):
    """The processes that one (by default this one) has started or adopted, and not waited for."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                if int(stat.read().rsplit(")", 1)[1].split()[1]) == (parent or os.getpid()):
                    found.add(int(name))
        except OSError:
            continue
    return found


def drawing(rollout):
    draws = [random.random(), float(np.random.random())]  # noqa: NPY002
    if "torch" in sys.modules:
        draws.append(float(sys.modules["torch"].rand(())))
    return Score(0.0, {str(place): draw for place, draw in enumerate(draws)})


def drawn(guard, count=3):
    """What a guard's reward draws for the same text, again and again."""
    return [[score.parts[name] for name in score.parts if name.isdigit()] for score in guard(rollouts(*"a" * count))]


class TestWhatItDraws:
    """Two runs with one seed agree."""

    def test_a_seed_decides_it(self, guarded):
        first = drawn(guarded(drawing, timeout=10, seed=3))
        assert first == drawn(guarded(drawing, timeout=10, seed=3))
        assert first != drawn(guarded(drawing, timeout=10, seed=4))
        assert len({value for draws in first for value in draws}) == 6, "each text has numbers of its own"

    @pytest.mark.slow
    def test_torch_too(self, guarded):
        torch = pytest.importorskip("torch")

        def with_torch(rollout):
            return float(torch.rand(()))

        guard = guarded(with_torch, timeout=60, seed=3)
        first = values(guard(rollouts("a", "a")))
        guard.reseed(3)
        assert values(guard(rollouts("a", "a"))) == first
        assert first[0] != first[1]

    def test_without_a_seed_the_programs_own_generator_decides(self, guarded):
        """So it does for a reward that is not isolated; and a checkpoint that holds its state needs nothing more."""
        guard = guarded(drawing, timeout=10)
        random.seed(7)
        first = drawn(guard)
        state = random.getstate()
        second = drawn(guard)
        assert first != second
        random.seed(7)
        assert drawn(guard) == first
        random.setstate(state)
        assert drawn(guarded(drawing, timeout=10)) == second

    def test_a_worker_that_was_replaced_goes_on_with_the_same_numbers(self, guarded):
        def dying(rollout):
            if rollout.text == "die":
                os._exit(1)
            return random.random()

        def whole(rollout):
            return random.random()

        hurt = values(guarded(dying, timeout=10, seed=1)(rollouts("a", "die", "a")))
        fine = values(guarded(whole, timeout=10, seed=1)(rollouts("a", "a", "a")))
        assert (hurt[0], hurt[2]) == (fine[0], fine[2])

    def test_a_copy_goes_on_from_where_the_guard_was(self, guarded):
        guard = guarded(drawing, timeout=10, seed=5)
        drawn(guard)
        copy = cloudpickle.loads(cloudpickle.dumps(guard))
        assert drawn(copy) == drawn(guard)
        copy.close()

    def test_a_seed_that_would_do_nothing_is_refused(self):
        with pytest.raises(ValueError, match="seed is 3, but without a timeout"):
            Guard(drawing, seed=3)
        with pytest.raises(ValueError, match="seed is -1"):
            Guard(drawing, timeout=1, seed=-1)


def test_the_exit_code_is_the_workers_own():
    reward = Isolated(as_reward(lambda rollout: os.kill(os.getpid(), signal.SIGTERM)), timeout=10)
    with pytest.raises(IsolationError, match=r"ended while scoring \(killed by SIGTERM\)"):
        reward.score(Rollout.of("a"))
