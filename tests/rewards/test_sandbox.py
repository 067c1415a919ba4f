"""Programs in the sandbox: right ones pass in both tiers, wrong and hostile ones fail, and nothing gets out."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards import CodeTests, Limits, Outcome, Rollout, Sandbox, SandboxUnavailable, full_seats, program_in
from rewards.fenced import FenceMaker
from rewards.full_seats import FullSeats

pytest.importorskip("pydantic_monty")
pytest.importorskip("sandlock")
try:
    FullSeats()
except SandboxUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

TESTS = """
def check(candidate):
    assert candidate([3, 1, 2]) == [1, 2, 3]
    assert candidate([]) == []
    assert candidate([2.5, -1]) == [-1, 2.5]
check(candidate)
"""
FULL = "import heapq  # the fast tier has no such module\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    sandbox = Sandbox(Limits(seconds=2, memory=128, output=2000))
    yield sandbox
    sandbox.close()


def check(sandbox: Sandbox, program: str, tests: str = TESTS) -> Outcome:
    return sandbox.check(program, tests, "ordered")


@pytest.mark.parametrize("tier", ["fast", "full"])
class TestBothTiers:
    def program(self, body: str, tier: str) -> str:
        return (FULL if tier == "full" else "") + body

    def test_what_is_right(self, sandbox: Sandbox, tier: str) -> None:
        right = self.program("def ordered(xs):\n    print('working')\n    return sorted(xs)", tier)
        assert check(sandbox, right) == Outcome(True, "", "", tier)

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            ("def ordered(xs): return xs", "AssertionError"),
            ("def ordered(xs): return xs[0]", ""),
            ("def ordered(xs): raise ValueError('no')", "ValueError: no"),
            ("def ordered(xs):\n    while True: pass", "TimeoutError"),
            ("while True: pass", "TimeoutError"),
            ("def ordered(xs): return ordered(xs)", "RecursionError"),
            ("def ordered(xs): return bytearray(10**9)", ""),
            ("def ordered(xs: return 1", "SyntaxError"),
            ("def other(xs): return sorted(xs)", "NameError"),
        ],
    )
    def test_what_is_wrong(self, sandbox: Sandbox, tier: str, body: str, why: str) -> None:
        outcome = check(sandbox, self.program(body, tier))
        assert not outcome.passed
        if not body.startswith("def other"):  # a name that is not there is looked up, by another error's name
            assert why in outcome.why

    @pytest.mark.parametrize(
        "body",
        [
            "class Same(list):\n    def __eq__(self, other): return True\ndef ordered(xs): return Same()",
            "class Same:\n    def __eq__(self, other): return True\ndef ordered(xs): return Same()",
            "def ordered(xs):\n    raise SystemExit(0)",
            "import sys\ndef ordered(xs): sys.exit(0)",
            "import os\ndef ordered(xs): os._exit(0)",
            "import os\nos._exit(0)",
            "exit()",
            "print('{\"value\": [\"list\", []]}')\ndef ordered(xs): print('passed'); return 'passed'",
            "import builtins\nbuiltins.AssertionError = ValueError\ndef ordered(xs): return xs",
            "def check(candidate): pass\ndef ordered(xs): return None",
            "candidate = sorted\ndef ordered(xs): return None",
            "def ordered(xs):\n    import gc\n    return [o for o in gc.get_objects() if callable(o)]",
            "def ordered(xs):\n    a = []\n    a.append(a)\n    return a",
            "def ordered(xs): return [float('nan')] * 3",
            "def ordered(xs):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
            "def ordered(xs): return 'x' * 10**8",
            'import json, os\nfor fd in range(3, 40):\n    try: os.write(fd, b\'{"value": ["list", []]}\\n\' * 9)\n'
            "    except OSError: pass\ndef ordered(xs): return None",
            "import sys\nframe = sys._getframe()\nwhile frame:\n    for name, value in list(frame.f_locals.items()):\n"
            "        if name == 'answer': value(frame.f_locals.get('token'), value=['list', []])\n"
            "    frame = frame.f_back\n"
            "def ordered(xs): return None",
            "import signal, os\ndef ordered(xs):\n    os.kill(os.getppid(), signal.SIGKILL)",
            "import os\ndef ordered(xs):\n    while True: os.fork()",
            "import threading\ndef ordered(xs):\n    for _ in range(10**4): threading.Thread(target=lambda: 1).start()",
        ],
    )
    def test_what_cheats(self, sandbox: Sandbox, tier: str, body: str) -> None:
        assert not check(sandbox, self.program(body, tier)).passed

    def test_a_generator_is_a_list_to_the_fast_tier_alone(self, sandbox: Sandbox, tier: str) -> None:
        lazy = self.program("def ordered(xs): return (x for x in sorted(xs))", tier)
        assert check(sandbox, lazy).passed == (tier == "fast")  # a difference between the two that is known

    def test_printing(self, sandbox: Sandbox, tier: str) -> None:
        program = self.program("a, b = map(int, input().split())\nprint(a + b)\nprint(input())", tier)
        assert sandbox.run(program, "1 2\nend\n") == Outcome(True, "3\nend\n", "", tier)

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            ("while True: print('x' * 1000)", "OutputError"),
            ("print(1)\nwhile True: pass", "TimeoutError"),
            ("print(input())", ""),
            ("while True:\n    try: input('x' * 1000)\n    except Exception: pass", "E"),
            ("for _ in range(9):\n    try: input('x' * 1000)\n    except Exception: pass", ""),
            ("print(1)\n1 / 0", "e"),
        ],
    )
    def test_printing_that_fails(self, sandbox: Sandbox, tier: str, body: str, why: str) -> None:
        outcome = sandbox.run(self.program(body, tier))
        assert not outcome.passed
        assert why in outcome.why


class TestFences:
    def run(self, sandbox: Sandbox, body: str) -> str:
        """What a program prints that tries each line, and says which of them went well."""
        lines = "\n".join(
            f"try:\n    {line}\n    print('did', {number})\nexcept BaseException as e: pass"
            for number, line in enumerate(body.strip().splitlines())
        )
        outcome = sandbox.run(f"import os, socket, subprocess, ctypes, sys\n{lines}\nprint('end')")
        assert outcome.tier == "full"
        return outcome.stdout

    def test_files_network_and_processes_are_out_of_reach(self, sandbox: Sandbox, tmp_path: Path) -> None:
        secret, target = tmp_path / "secret", tmp_path / "written"
        secret.write_text("secret")
        said = self.run(
            sandbox,
            f"""
            open({str(secret)!r}).read()
            open({str(target)!r}, "w")
            os.mkdir({str(target)!r})
            os.symlink({str(secret)!r}, "/tmp/link-of-a-test")
            os.remove({str(secret)!r})
            os.chmod({str(secret)!r}, 0)
            open("/etc/passwd").read()
            open("/etc/shadow").read()
            os.listdir("/")
            os.listdir("/proc")
            open(f"/proc/{{os.getppid()}}/environ").read()
            open(f"/proc/{{os.getppid()}}/mem", "rb").read(1)
            os.kill(os.getppid(), 0)
            os.kill({os.getpid()}, 0)
            socket.create_connection(("127.0.0.1", 80), 1)
            socket.socket(socket.AF_INET).bind(("127.0.0.1", 0))
            socket.socket(socket.AF_UNIX).connect("/run/docker.sock")
            os.utime({str(secret)!r}, (1, 1))
            os.setxattr({str(secret)!r}, "user.a", b"1")
            os.chown({str(secret)!r}, 1, 1)
            os.rename({str(secret)!r}, {str(target)!r})
            os.truncate({str(secret)!r}, 0)
            os.setuid(12345)
            ctypes.CDLL(None, use_errno=True).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 or 1 / 0
            ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), 0, 0) == 0 or 1 / 0
            ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0 or 1 / 0
            os.environ["PATH"]
            """.replace("            ", ""),
        )
        assert said == "end\n"
        assert secret.read_text() == "secret"
        assert not target.exists()

    def test_nothing_stays_behind(self, sandbox: Sandbox) -> None:
        body = """
            os.fork()
            subprocess.run(["/bin/true"])
            ctypes.CDLL(None).fork() != -1 or 1 / 0
            ctypes.CDLL(None).vfork() != -1 or 1 / 0
            ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) != -1 or 1 / 0
            """
        assert self.run(sandbox, body.replace("            ", "")) == "end\n"
        threads = "import threading, heapq\nt = threading.Thread(target=print, args=('thread',))\nt.start()\nt.join()"
        assert sandbox.run(threads).stdout == "thread\n"

    @pytest.mark.parametrize(
        ("program", "printed"),
        [
            ("class A:\n    def __del__(self): print('gone')\na = A()\nprint('end')", "end\ngone\n"),
            ("class A:\n    def __del__(self): print('gone')\na = A()\na.itself = a\nprint('end')", "end\ngone\n"),
            ("import atexit\natexit.register(print, 'gone')\nprint('end')", "end\ngone\n"),
            (
                "import threading, time\ndef late(): time.sleep(0.2); print('gone')\n"
                "threading.Thread(target=late).start()\nprint('end')",
                "end\ngone\n",
            ),
            (
                "def numbers():\n    try: yield 1\n    finally: print('gone')\nn = numbers()\nnext(n)\nprint('end')",
                "end\ngone\n",
            ),
            ("_run = os = sys = exec = names = 1\nprint('end', '_program' in globals())", "end False\n"),
            ("import sys\nsys.stdout.write('no newline')", "no newline"),
            (
                "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__, __name__)",
                "A __main__\n",
            ),
        ],
    )
    def test_the_end_is_as_python_has_it(self, sandbox: Sandbox, program: str, printed: str) -> None:
        assert sandbox.run(FULL + program) == Outcome(True, printed, "", "full")
        bare = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
        assert bare.stdout == printed

    @pytest.mark.parametrize(
        ("program", "code"), [("raise SystemExit(3)", 3), ("import sys\nsys.exit('no')", 1), ("1 / 0", 1)]
    )
    def test_exit_codes(self, sandbox: Sandbox, program: str, code: int) -> None:
        assert sandbox.run(FULL + program).why == f"it ended with exit code {code}"

    def test_memory(self, sandbox: Sandbox) -> None:
        assert not sandbox.run(FULL + "x = bytearray(400 << 20)\nprint(len(x))").passed
        assert sandbox.run(FULL + "x = bytearray(40 << 20)\nprint(len(x))").passed

    def test_without_fences_nothing_runs_unless_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: object) -> None:
            raise OSError("no Landlock")

        monkeypatch.setattr(FenceMaker, "begin", none)
        with pytest.raises(SandboxUnavailable, match=r"cannot be fenced in here \(OSError: no Landlock\)"):
            Sandbox().run(FULL + "print(1)")
        assert Sandbox().run("print(1)").passed  # the fast tier needs no kernel
        assert Sandbox(unsafe=True).run(FULL + "print(1)").stdout == "1\n"

    def test_fences_that_let_through_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FenceMaker, "begin", lambda _maker, _command, limits: full_seats._bare(limits))
        with pytest.raises(SandboxUnavailable, match="a program could read a file that it must not"):
            FullSeats()


class TestSandbox:
    def test_tests_that_need_the_full_tier_get_it(self, sandbox: Sandbox) -> None:
        tests = "import heapq\nassert candidate(heapq.nsmallest(2, [3, 1, 2])) == [1, 2]\nassert ordered([]) == []"
        assert check(sandbox, "def ordered(xs): return sorted(xs)", tests) == Outcome(True, "", "", "fast")
        assert check(sandbox, FULL + "def ordered(xs): return sorted(xs)", tests).tier == "full"
        assert "AssertionError" in check(sandbox, "def ordered(xs): return [0]", tests).why

    def test_tests_may_expect_an_error(self, sandbox: Sandbox) -> None:
        tests = "try:\n    candidate(None)\nexcept ValueError:\n    pass\nelse:\n    assert False"
        for program in ("def ordered(xs): raise ValueError(1)", FULL + "def ordered(xs): raise ValueError(1)"):
            assert check(sandbox, program, tests).passed
        assert not check(sandbox, "def ordered(xs): return 1", tests).passed

    def test_no_test_passes_over_an_end(self, sandbox: Sandbox) -> None:
        tests = "try:\n    candidate([])\nexcept BaseException:\n    pass"
        assert "TimeoutError" in check(sandbox, "def ordered(xs):\n    while True: pass", tests).why
        assert not check(sandbox, FULL + "import os\ndef ordered(xs): os._exit(0)", tests).passed

    def test_the_clock_runs_over_all_calls(self, sandbox: Sandbox) -> None:
        began = time.monotonic()
        slow = "def ordered(xs):\n    n = 0\n    while n < 10**6: n += 1\n    return sorted(xs)"
        assert "TimeoutError" in check(sandbox, slow, "for i in range(10**4): candidate([])").why
        assert time.monotonic() - began < 20

    def test_plain_data_of_all_kinds(self, sandbox: Sandbox) -> None:
        tests = (
            "v = {'a': [(1, 2.5), {3}, None, b'x', True, -0.0, float('inf'), frozenset({4})]}\nassert candidate(v) == v"
        )
        for program in ("def ordered(v): return v", FULL + "def ordered(v): return v"):
            assert check(sandbox, program, tests).passed, program

    def test_from_many_threads(self, sandbox: Sandbox) -> None:
        found: list[bool] = []
        programs = ["def ordered(xs): return sorted(xs)", FULL + "def ordered(xs): return sorted(xs)"] * 3
        threads = [threading.Thread(target=lambda p=p: found.append(check(sandbox, p).passed)) for p in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 6

    def test_copies(self, sandbox: Sandbox) -> None:
        for other in (copy.deepcopy(sandbox), pickle.loads(pickle.dumps(sandbox))):
            assert other.limits == sandbox.limits
            assert other.run("print(1)").passed
            other.close()

    @pytest.mark.parametrize("field", ["seconds", "memory", "output"])
    def test_limits_are_above_zero(self, field: str) -> None:
        with pytest.raises(ValueError, match=f"got {field}=0"):
            Limits(**{field: 0})


class TestCodeTests:
    @pytest.fixture
    def reward(self) -> CodeTests:
        reward = CodeTests(seconds=2)
        yield reward
        reward.close()

    def test_by_functions(self, reward: CodeTests) -> None:
        facts = {
            "code": "def helper(x):\n    return x + 1\n\ndef twice(x):\n",
            "entry_point": "twice",
            "test": "def check(candidate):\n    assert candidate(2) == 4 == helper(3)\n",
        }
        texts = [
            "    return 2 * x",
            "    return helper(x) + 1",
            "    return 3",
            "It is:\n```python\ndef twice(x):\n    return x + x\n```\n",
            "",
        ]
        scores = reward([Rollout.of(text, metadata=facts) for text in texts])
        assert [score.value for score in scores] == [1.0, 1.0, 0.0, 1.0, 0.0]

    def test_by_printing(self) -> None:
        facts = {"tests": [{"stdin": "1", "stdout": "1 \n\n"}, {"stdin": "2", "stdout": "4"}]}
        texts = ["print(int(input()) ** 2)", "print(input())", "while True: pass"]
        partly = CodeTests(seconds=1, partly=True)
        scores = partly([Rollout.of(text, metadata=facts) for text in texts])
        assert [score.value for score in scores] == [1.0, 0.5, 0.0]
        assert [score.parts["out_of_time"] for score in scores] == [0.0, 0.0, 1.0]
        partly.close()

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({}, "CodeTests found no"),
            ({"tests": []}, "expected a list with one or more"),
            ({"tests": [{"stdin": "1"}]}, "expected a list with one or more"),
        ],
    )
    def test_metadata_without_tests(self, reward: CodeTests, facts: dict[str, object], message: str) -> None:
        with pytest.raises(Exception, match=message):
            reward.score(Rollout.of("print(1)", metadata=facts))

    def test_the_last_block_counts(self) -> None:
        assert program_in("```\nfirst\n```\nand\n```py\nsecond\n  third\n```") == "second\n  third"
        assert program_in("```python\nunfinished = 1") == "unfinished = 1"
