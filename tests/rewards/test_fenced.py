"""Processes behind fences: the small one that begins them, what ends them, and those that wait for a program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import Limits, SandboxUnavailable, fenced, full_seats
from rewards.fenced import Fenced, FenceMaker
from rewards.full_seats import FullSeats, Process

pytest.importorskip("sandlock")
try:
    FullSeats()
except SandboxUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


class TestMaker:
    """The small process that begins the others."""

    def pids(self, maker: FenceMaker) -> tuple[int, Fenced]:
        begun = maker.begin(full_seats._COMMAND, Limits())
        code = b"import os\nprint(os.getpid(), os.getppid(), flush=True)\nos.read(0, 1)\nos._exit(7)"
        begun.stdin.write(len(code).to_bytes(8, "big") + code)
        _, parent = begun.stdout.readline().split()
        return int(parent), begun

    @pytest.fixture
    def maker(self) -> Iterator[FenceMaker]:
        maker = FenceMaker()
        yield maker
        maker.close()

    def test_exit_codes(self, maker: FenceMaker) -> None:
        _, begun = self.pids(maker)
        assert begun.poll() is None
        begun.stdin.write(b"x")
        assert begun.wait() == 7
        assert (begun.poll(), begun.wait()) == (7, 7)
        with pytest.raises(OSError, match="Bad file descriptor"):
            begun.kill()

    def test_killing_one_leaves_the_others(self, maker: FenceMaker) -> None:
        (parent, first), (same, second) = self.pids(maker), self.pids(maker)
        assert parent == same != os.getpid()
        first.kill()
        assert first.wait() != 0
        assert second.poll() is None
        second.stdin.write(b"x")
        assert second.wait() == 7

    def test_if_it_is_killed_another_takes_its_place(self, maker: FenceMaker) -> None:
        parent, begun = self.pids(maker)
        os.kill(parent, signal.SIGKILL)
        assert begun.stdout.read() == b""  # it went with it
        assert begun.wait() == -1
        other, begun = self.pids(maker)
        assert other != parent
        begun.stdin.write(b"x")
        assert begun.wait() == 7

    def test_why_one_cannot_begin_is_said(self, maker: FenceMaker, monkeypatch: pytest.MonkeyPatch) -> None:
        parent, _ = self.pids(maker)
        with monkeypatch.context() as patched:
            patched.setattr(fenced, "_allowed", lambda _: {"fence": "none"})
            with pytest.raises(RuntimeError, match=r"^TypeError: .*'fence'"):
                maker.begin(full_seats._COMMAND, Limits())
        assert self.pids(maker)[0] == parent

    def test_all_end_with_the_program(self, tmp_path: Path) -> None:
        script = """
            import os, signal, sys
            from rewards import Limits, full_seats
            from rewards.fenced import FenceMaker
            maker = FenceMaker()
            fenced = maker.begin(full_seats._COMMAND, Limits())
            code = b"import os, time\\nprint(os.getppid(), os.getpid(), flush=True)\\ntime.sleep(60)"
            fenced.stdin.write(len(code).to_bytes(8, "big") + code)
            print(fenced.stdout.readline().decode(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        pids = [int(pid) for pid in ran.stdout.split()]
        assert len(pids) == 2, ran.stderr
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline, "something has stayed behind"
            time.sleep(0.05)


class TestSpares:
    """Processes that wait for a program."""

    @pytest.fixture
    def seats(self) -> Iterator[FullSeats]:
        seats = FullSeats(spares=2)
        yield seats
        seats.close()

    def printed(self, seats: FullSeats, code: str, limits: Limits) -> bytes:
        with seats.process(code, limits) as process:
            return bytes(process.stdout.read(1000))

    def waiting(self, seats: FullSeats) -> list[Process]:
        return [first.result(20) for begun in seats._begun.values() for first in begun]

    def test_each_runs_one_program(self, seats: FullSeats) -> None:
        code = "import os\nprint(os.getpid(), 'x' in globals())\nx = 1"
        seen = []
        for _ in range(4):
            seen.append(self.printed(seats, code, Limits()).split())
        assert len({pid for pid, _ in seen}) == 4
        assert {known for _, known in seen} == {b"False"}

    def test_its_time_begins_with_its_program(self, seats: FullSeats) -> None:
        limits = Limits(seconds=1)
        self.printed(seats, "", limits)
        self.waiting(seats)
        time.sleep(1.5)
        assert self.printed(seats, "print(1)", limits) == b"1\n"

    def test_other_limits_have_others(self, seats: FullSeats) -> None:
        self.printed(seats, "", Limits(memory=64))
        self.waiting(seats)
        assert self.printed(seats, "print(len(bytearray(10**8)))", Limits(memory=512)) == b"100000000\n"
        assert self.printed(seats, "print(len(bytearray(10**8)))", Limits(memory=64)) == b""

    def test_closing_ends_them(self, seats: FullSeats) -> None:
        self.printed(seats, "", Limits())
        spares = self.waiting(seats)
        seats.close()
        assert [spare.waits() for spare in spares] == [False] * len(spares)
        assert len(spares) == 2
        assert not seats._begun

    def test_one_that_has_ended_is_passed_over(self, seats: FullSeats) -> None:
        self.printed(seats, "", Limits())
        for spare in self.waiting(seats):
            spare._process.kill()
            spare._process.wait()
        assert self.printed(seats, "print(1)", Limits()) == b"1\n"

    def test_where_none_can_stay_alive(self, monkeypatch: pytest.MonkeyPatch, seats: FullSeats) -> None:
        monkeypatch.setattr(full_seats, "_COMMAND", ["/bin/false"])
        assert self.printed(seats, "print(1)", Limits()) == b""

    def test_a_program_that_is_no_text_of_utf_8(self, seats: FullSeats) -> None:
        assert self.printed(seats, "print('\ud800é' == '?é')", Limits()) == b"True\n"
