"""Guard: rewards that raise, hang, die, print and misbehave otherwise."""

import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest

from rewards import AlwaysFailsError, ExactMatch, Guard, Reward, RewardError, Rollout, Score, as_reward, isolated
from rewards.isolated import Isolated, StartupError


def rollouts(*texts):
    return [Rollout.of(text, prompt=f"prompt of {text}") for text in texts]


def values(scores):
    return [score.value for score in scores]


def gone(pid):
    """Whether a process ends within two seconds."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True  # dead, and waiting for whoever adopted it
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def guarded():
    """Make guards and end their processes after the test."""
    made = []

    def make(*args, **kwargs):
        made.append(Guard(*args, **kwargs))
        return made[-1]

    yield make
    for guard in made:
        guard.close()


def divide(rollout):
    return 1 / len(rollout.text)


class TestWithoutTimeout:
    def test_a_failure_costs_one_rollout(self, caplog):
        guard = Guard(divide, on_error=-1.0)
        scores = guard(rollouts("ab", "", "abcd"))
        assert scores == [
            Score(0.5, {"divide": 0.5, "reward_failed": 0.0}),
            Score(-1.0, {"divide": -1.0, "reward_failed": 1.0}),
            Score(0.25, {"divide": 0.25, "reward_failed": 0.0}),
        ]
        assert (guard.num_failures, guard.num_rollouts) == (1, 3)
        (failure,) = guard.failures
        assert failure.rollout.prompt == "prompt of "
        assert failure.error == "ZeroDivisionError: division by zero"
        (record,) = caplog.records
        assert record.name == "rewards"
        for expected in (
            "reward 'divide' failed",
            "'prompt of '",
            "transcript: ''",
            "ZeroDivisionError",
            "in divide",
        ):
            assert expected in record.getMessage()

    def test_per_token_and_parts_are_passed_on(self):
        guard = Guard(lambda r: Score(1.0, {"detail": 2.0}, np.ones(r.num_actions)))
        (score,) = guard(rollouts("ab"))
        assert score == Score(1.0, {"detail": 2.0, "lambda": 1.0, "reward_failed": 0.0}, np.ones(2))

    def test_a_batch_that_raises_is_scored_one_at_a_time(self):
        sizes = []

        class Batched(Reward):
            def score_batch(self, rollouts):
                sizes.append(len(rollouts))
                return [divide(rollout) for rollout in rollouts]

        guard = Guard(Batched())
        assert values(guard(rollouts("a", "ab"))) == [1.0, 0.5]
        assert values(guard(rollouts("a", "", "ab"))) == [1.0, 0.0, 0.5]
        assert sizes == [2, 3, 1, 1, 1]
        assert guard.num_failures == 1

    def test_a_batch_that_fails_for_no_rollout_is_reported(self, caplog):
        class Single(Reward):
            def score_batch(self, rollouts):
                (_,) = rollouts
                return [1.0]

        guard = Guard(Single())
        for _ in range(3):
            assert values(guard(rollouts("a", "b"))) == [1.0, 1.0]
        assert guard.num_failures == 0
        messages = [record.getMessage() for record in caplog.records]
        assert [re.findall(r"so far \d", message) for message in messages] == [["so far 1"], ["so far 2"]]
        assert "on a batch of 2 rollouts" in messages[0]
        assert "too many values to unpack" in messages[0]

    def test_later_failures_are_summed_up(self, caplog):
        guard = Guard(divide, give_up_after=None)
        for _ in range(150):
            guard(rollouts(""))
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 3 + 6  # three in full, then at 4, 8, 16, 32, 64, 128
        assert all("Traceback" in message for message in messages[:3])
        assert messages[-1] == (
            "reward 'divide' failed on 128 of 128 rollouts; the latest: ZeroDivisionError: division by zero"
        )
        assert (guard.num_failures, len(guard.failures)) == (150, 100)

    def test_nan_is_a_bug_and_passes_through(self):
        with pytest.raises(RewardError, match="'lambda' returned nan"):
            Guard(lambda rollout: float("nan"))(rollouts("a", "b"))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_what_is_no_error_passes_through(self, error):
        def raising(rollout):
            raise error

        with pytest.raises(error):
            Guard(raising)(rollouts("a"))

    def test_a_text_that_cannot_be_decoded(self, caplog):
        def decode(tokens):
            raise UnicodeError("no such token")

        broken = Rollout(np.zeros(1, np.int64), np.zeros(1, np.int64), {"answer": "a"}, decode=decode)
        assert values(Guard(ExactMatch(), on_error=-1.0)([broken])) == [-1.0]
        assert "cannot be shown: UnicodeError('no such token')" in caplog.text

    def test_a_guard_in_a_guard_keeps_its_failures(self):
        outer = Guard(Guard(divide) + ExactMatch("missing") * 0)
        inner = Guard(Guard(divide) + as_reward(lambda rollout: 1.0))
        assert values(outer(rollouts(""))) == [0.0]
        assert inner(rollouts(""))[0].parts["reward_failed"] == 1.0

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="on_error is nan"):
            Guard(divide, on_error=float("nan"))
        for timeout in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"timeout is {timeout}; expected"):
                Guard(divide, timeout=timeout)


class TestNeverWorking:
    """A reward that fails on its first twenty rollouts by the same error."""

    def test_is_an_error_with_its_cause(self, caplog):
        guard = Guard(divide)
        assert values(guard(rollouts(*[""] * 12))) == [0.0] * 12
        with pytest.raises(AlwaysFailsError, match="'divide' has not worked once, and has failed on 20") as caught:
            guard(rollouts(*[""] * 12))
        assert "same error: ZeroDivisionError: division by zero. " in str(caught.value)
        assert "give_up_after=None" in str(caught.value)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert caught.traceback[-1].name == "failed"
        assert "in divide" in "".join(traceback.format_exception(caught.value))
        assert guard.num_failures == 20

    def test_one_success_ends_the_watch(self, caplog):
        alone, batched = Guard(divide), Guard(divide)
        alone(rollouts(*[""] * 19, "a"))
        batched(rollouts("ab", "cd"))
        for guard in (alone, batched):
            guard(rollouts(*[""] * 30))
            assert guard.num_failures >= 30

    def test_another_error_begins_the_count_anew(self, caplog):
        errors = iter([*["one"] * 19, "two", *["one"] * 19, *["two"] * 20])

        def failing(rollout):
            raise ValueError(next(errors))

        guard = Guard(failing)
        for _ in range(19 + 1 + 19 + 19):
            guard(rollouts("a"))
        with pytest.raises(AlwaysFailsError, match="on 20 rollouts in a row by the same error: ValueError: two"):
            guard(rollouts("a"))

    def test_the_number_may_be_another_or_none(self, caplog):
        with pytest.raises(AlwaysFailsError, match="on 2 rollouts"):
            Guard(divide, give_up_after=2)(rollouts("", ""))
        assert values(Guard(divide, give_up_after=None)(rollouts(*[""] * 50))) == [0.0] * 50
        assert values(Guard(Guard(divide, give_up_after=None))(rollouts(*[""] * 50))) == [0.0] * 50
        with pytest.raises(AlwaysFailsError):
            Guard(Guard(divide))(rollouts(*[""] * 50))
        with pytest.raises(ValueError, match="give_up_after is 0; expected a number of failures >= 1"):
            Guard(divide, give_up_after=0)

    def test_a_missing_key_is_found_whatever_the_texts_are(self, caplog):
        with pytest.raises(AlwaysFailsError, match="looks for 'answer' in the rollout's metadata"):
            Guard(ExactMatch())([Rollout.of(str(number)) for number in range(20)])

    def test_in_a_worker_process(self, guarded, caplog):
        guard = guarded(divide, timeout=10)
        with pytest.raises(AlwaysFailsError, match="ZeroDivisionError: division by zero") as caught:
            guard(rollouts(*[""] * 20))
        assert "in divide" in "".join(traceback.format_exception(caught.value))

    def test_time_outs_count_too(self, guarded, caplog):
        guard = guarded(lambda rollout: time.sleep(60), timeout=0.05, give_up_after=2)
        with pytest.raises(AlwaysFailsError, match=r"on 2 rollouts in a row .* TimeoutError: no score after 0\.05 s"):
            guard(rollouts("a", "b"))

    def test_counting_goes_on_from_a_state(self, caplog):
        old, new, fresh = Guard(divide), Guard(divide), Guard(divide)
        old(rollouts("a", ""))
        new.load_state_dict(json.loads(json.dumps(old.state_dict())))
        new(rollouts(*[""] * 20))
        assert (new.num_failures, new.num_rollouts) == (21, 22)
        fresh.load_state_dict(Guard(divide).state_dict())
        with pytest.raises(AlwaysFailsError):
            fresh(rollouts(*[""] * 20))


class TestWithTimeout:
    def test_a_hang_is_killed_and_the_next_rollout_scored(self, guarded):
        def hanging(rollout):
            while rollout.text == "hang":
                pass
            return os.getpid()

        guard = guarded(hanging, on_error=-1.0, timeout=0.3)
        (first,) = values(guard(rollouts("fine")))
        start = time.monotonic()
        assert values(guard(rollouts("hang"))) == [-1.0]
        assert time.monotonic() - start < 2.0
        assert gone(int(first))
        (last,) = values(guard(rollouts("fine")))
        assert last != first != os.getpid()
        assert guard.num_failures == 1
        assert guard.failures[0].error == "TimeoutError: no score after 0.3 s; the worker process was killed"

    def test_the_processes_a_reward_started_are_killed_too(self, guarded, tmp_path):
        file = tmp_path / "pid"

        def waiting(rollout):
            child = subprocess.Popen(["sleep", "60"])
            file.write_text(str(child.pid))
            child.wait()

        guarded(waiting, timeout=0.5)(rollouts("a"))
        assert gone(int(file.read_text()))

    def test_a_worker_that_dies_is_a_failure_and_no_hang(self, guarded, caplog):
        def dying(rollout):
            if rollout.text == "exit":
                os._exit(3)
            if rollout.text == "segfault":
                ctypes.string_at(0)
            if rollout.text == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return 1.0

        guard = guarded(dying, timeout=30.0)
        start = time.monotonic()
        assert values(guard(rollouts("a", "exit", "b", "segfault", "kill", "c"))) == [1, 0, 1, 0, 0, 1]
        assert time.monotonic() - start < 15.0
        assert [failure.error for failure in guard.failures] == [
            "the worker process ended while scoring (exit code 3)",
            "the worker process ended while scoring (killed by SIGSEGV)",
            "the worker process ended while scoring (killed by SIGKILL, perhaps because memory ran out)",
        ]

    def test_printing_and_reading_do_no_harm(self, guarded, capfd):
        def chatty(rollout):
            print("printed " * 10_000, flush=True)
            os.write(1, b"written")
            subprocess.run(["echo", "echoed"], check=True)
            return float(sys.stdin.read() == "")

        assert values(guarded(chatty, timeout=10)(rollouts("a", "b"))) == [1.0, 1.0]
        out, err = capfd.readouterr()
        assert out == ""
        assert all(word in err for word in ("printed", "written", "echoed"))

    def test_closures_and_local_classes_travel(self, guarded):
        offset = 40.0

        class Local(Reward):
            def score(self, rollout):
                return Score(offset, {"detail": 1.0}, np.arange(rollout.num_actions))

        (score,) = guarded(Local() + (lambda rollout: 2.0), timeout=10)(rollouts("ab"))
        assert score.value == 42.0
        assert score.parts["detail"] == 1.0
        np.testing.assert_array_equal(score.per_token, [0.0, 1.0])

    def test_exceptions_bring_their_traceback(self, guarded, caplog):
        guard = guarded(divide, timeout=10)
        assert values(guard(rollouts("", "ab"))) == [0.0, 0.5]
        assert guard.failures[0].error == "ZeroDivisionError: division by zero"
        assert "in divide" in guard.failures[0].trace
        assert "in divide" in caplog.text

    def test_exceptions_that_cannot_be_pickled(self, guarded):
        def raising(rollout):
            error = ValueError("odd")
            error.lock = threading.Lock()
            raise error

        guard = guarded(raising, timeout=10)
        assert values(guard(rollouts("a"))) == [0.0]
        assert guard.failures[0].error == "ValueError: odd"

    def test_nan_passes_through(self, guarded):
        guard = guarded(lambda rollout: float("nan"), timeout=10)
        with pytest.raises(RewardError, match="'lambda' returned nan for the rollout with text 'a'"):
            guard(rollouts("a"))

    def test_large_rollouts(self, guarded):
        guard = guarded(lambda rollout: len(rollout.text), timeout=20)
        assert values(guard(rollouts("a" * 1_000_000))) == [1e6]

    def test_a_rollout_that_cannot_be_pickled(self, guarded):
        guard = guarded(divide, timeout=10)
        odd = Rollout.of("a", metadata={"lock": threading.Lock()})
        assert values(guard([odd, *rollouts("ab")])) == [0.0, 0.5]
        assert "cannot pickle" in guard.failures[0].error

    def test_a_reward_that_cannot_be_pickled(self):
        lock = threading.Lock()
        with pytest.raises(TypeError, match="cannot be sent to the worker process"):
            Guard(lambda rollout: lock is None, timeout=1)

    def test_a_reward_that_cannot_be_loaded_passes_through(self, guarded):
        class Unloadable(Reward):
            def __reduce__(self):
                return int, ("not a number",)

        guard = guarded(Unloadable(), timeout=10)
        with pytest.raises(StartupError, match=r"could not load the reward.*not a number"):
            guard(rollouts("a"))

    def test_starting_takes_none_of_the_time(self, guarded):
        class Slow(Reward):
            def __reduce__(self):
                return _slow, ()

        def _slow():
            time.sleep(0.6)
            return as_reward(lambda rollout: 1.0)

        assert values(guarded(Slow(), timeout=0.5)(rollouts("a"))) == [1.0]

    def test_many_threads(self, guarded):
        guard = guarded(lambda rollout: int(rollout.text), timeout=10)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda i: guard(rollouts(str(i)))[0].value, range(100)))
        assert results == list(range(100))

    def test_an_interrupt_does_not_mix_up_the_answers(self, guarded, monkeypatch):
        guard = guarded(lambda rollout: int(rollout.text), timeout=10)
        assert values(guard(rollouts("1"))) == [1.0]

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(isolated.worker, "receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                guard(rollouts("2"))
        assert values(guard(rollouts("3"))) == [3.0]

    def test_close_ends_the_worker_and_it_may_be_used_again(self, guarded):
        guard = guarded(lambda rollout: os.getpid(), timeout=10)
        guard.close()
        (first,) = values(guard(rollouts("a")))
        guard.close()
        assert gone(int(first))
        assert values(guard(rollouts("a"))) != [first]

    def test_a_worker_that_died_between_rollouts_costs_none(self, guarded):
        guard = guarded(lambda rollout: os.getpid(), timeout=10)
        (first,) = values(guard(rollouts("a")))
        os.kill(int(first), signal.SIGKILL)
        assert gone(int(first))
        assert values(guard(rollouts("b"))) != [first]
        assert guard.num_failures == 0

    def test_a_forgotten_guard_ends_its_worker(self):
        guard = Guard(lambda rollout: os.getpid(), timeout=10)
        (pid,) = values(guard(rollouts("a")))
        del guard
        assert gone(int(pid))

    def test_a_copy_has_a_worker_of_its_own(self, guarded):
        guard = guarded(lambda rollout: os.getpid(), timeout=10)
        first = values(guard(rollouts("a")))
        copy = cloudpickle.loads(cloudpickle.dumps(guard))
        assert values(copy(rollouts("a"))) != first
        copy.close()
        assert values(guard(rollouts("a"))) == first

    def test_after_a_fork_the_child_has_a_worker_of_its_own(self):
        reward = Isolated(as_reward(lambda rollout: os.getpid()), timeout=10)
        first = reward.score(Rollout.of("a")).value
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(write, f"{reward.score(Rollout.of('a')).value}".encode())
                reward.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert float(os.read(read, 100)) != first
        os.close(read)
        os.close(write)
        assert reward.score(Rollout.of("a")).value == first
        reward.close()


def run_script(tmp_path, body, **options):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment, **options
    )


def test_rewards_of_the_main_script_and_the_modules_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("def bonus(rollout): return 40.0\n")
    script = run_script(
        tmp_path,
        """
        print("main runs")
        from rewards import Guard, Reward, Rollout
        import beside

        class Fact:
            worth = 2.0

        class Mine(Reward):
            def score(self, rollout):
                return rollout.metadata["fact"].worth + beside.bonus(rollout)

        guard = Guard(Mine(), timeout=10)
        print(guard([Rollout.of("a", metadata={"fact": Fact()})])[0].value, guard.num_failures)
        # and no close(): the end of the program ends the worker
        """,
    )
    out, _ = script.communicate(timeout=20)
    assert (out, script.returncode) == ("main runs\n42.0 0\n", 0)


def test_a_hanging_worker_ends_with_a_killed_program(tmp_path):
    script = run_script(
        tmp_path,
        """
        import os
        from rewards import Guard, Rollout
        def hanging(rollout):
            open("pid", "w").write(str(os.getpid()) + "\\n")
            while True:
                pass
        Guard(hanging, timeout=60)([Rollout.of("a")])
        """,
        cwd=tmp_path,
    )
    file = tmp_path / "pid"
    deadline = time.monotonic() + 10
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.kill()
    script.communicate()
    assert gone(int(file.read_text()))


def test_logging_level_is_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="rewards"):
        Guard(divide)(rollouts(""))
    assert caplog.records[0].levelname == "WARNING"
