"""Programs per second in the sandbox, beside a bare Python; and how hostile programs fare.

    python examples/benchmarks/sandbox.py --json

The fast tier, the full tier, and `python -I -S` without any fence run the same small program, in turns; the median of
several rounds counts. Then hostile programs, made from templates, are run and checked: how many got out, or passed
tests that they do not do, and how much this process has grown.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rewards import Limits, Sandbox

FULL = "import heapq\n"
PROGRAM = "def double(x):\n    return 2 * x\nprint(double(21))\n"
HOSTILE = [
    "import os\nos._exit({n})",
    "import sys\nsys.exit({n})",
    "raise SystemExit({n})",
    "def double(x):\n    import os\n    os._exit({n})",
    "def double(x):\n    raise SystemExit({n})",
    "print('passed ' * {n})\ndef double(x): return 'passed'",
    "class Same:\n    def __eq__(self, other): return True\ndef double(x): return Same()",
    "class Same(int):\n    def __eq__(self, other): return True\ndef double(x): return Same({n})",
    "import builtins\nbuiltins.AssertionError = KeyError\ndef double(x): return {n}",
    "def double(x): return [0] * 10**{d}",
    "def double(x): return 'x' * 10**{d}",
    "def double(x): return 10 ** (10 ** {d})",
    "def double(x): return double(x + {n})",
    "x = {n}\nwhile True: x += 1",
    "def double(x):\n    while True: pass",
    "while True: print('x' * {n})",
    "import os\nopen({marker!r}, 'w').write('out')\ndef double(x): return {n}",
    "import os\nos.system('touch ' + {marker!r})\ndef double(x): return {n}",
    "import subprocess\nsubprocess.run(['touch', {marker!r}])\ndef double(x): return {n}",
    "import os\nos.fork()\ndef double(x): return {n}",
    "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\ndef double(x): return {n}",
    "import os, signal\nos.kill(-1, signal.SIGTERM)\ndef double(x): return {n}",
    "import socket\nsocket.create_connection(('127.0.0.1', {n}), 1)\ndef double(x): return {n}",
    "import ctypes\nctypes.string_at({n})\ndef double(x): return {n}",
    "import gc, sys\nfor o in gc.get_objects():\n    if isinstance(o, dict): o.clear()\ndef double(x): return {n}",
    "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{{\"value\": {n}}}\\n')\n    except OSError: pass\n"
    "def double(x): return {n}",
    "import inspect\nfor frame in inspect.stack(): print(frame[0].f_locals)\ndef double(x): return {n}",
    "import sys\nsys.settrace(lambda *a: None)\nsys.setrecursionlimit(10**6)\ndef double(x): return double(x)",
    "import threading\nfor _ in range({n}): threading.Thread(target=lambda: 1).start()\ndef double(x): return {n}",
    "def double(x):\n    a = []\n    for _ in range(10**{d}): a = [a]\n    return a",
]  # fmt: skip


def rate(run: Callable[[], None], times: int) -> float:
    """How often a second."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return times / (time.perf_counter() - began)


def bare() -> None:
    """The same without fences."""
    subprocess.run([sys.executable, "-I", "-S", "-c", FULL + PROGRAM], check=True, capture_output=True)


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the three, in turns")
    parser.add_argument("--hostile", type=int, default=300, help="how many hostile programs")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()

    sandbox = Sandbox()
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "fast": (lambda: sandbox.run(PROGRAM), 200),
        "full": (lambda: sandbox.run(FULL + PROGRAM), 20),
        "bare": (bare, 20),
    }
    for run, _ in ways.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (run, times) in ways.items():
            rates[name].append(rate(run, times))
    sandbox.close()

    found: dict[str, float] = {f"{name}_programs_per_second": statistics.median(each) for name, each in rates.items()}
    found["full_over_bare"] = found["full_programs_per_second"] / found["bare_programs_per_second"]

    sandbox = Sandbox(Limits(seconds=0.5))
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "escaped"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong = escapes = 0
        for number in range(options.hostile):
            template = HOSTILE[number % len(HOSTILE)]
            turn = number // len(HOSTILE)
            program = template.format(n=turn * 37, d=4 + turn % 5, marker=str(marker))
            program = FULL * (turn % 2) + program
            wrong += sandbox.check(program, "assert candidate(2) == 4\nassert candidate(3) == 6", "double").passed
            wrong += sandbox.run(program).stdout == "42\n"
            if marker.exists():
                escapes += 1
                marker.unlink()
            if sys.stderr.isatty():
                print(f"\rhostile programs: {number + 1} of {options.hostile}", end="", file=sys.stderr)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sandbox.close()
    found |= {"hostile": options.hostile, "escapes": escapes, "wrong_verdicts": wrong, "grown_mb": grown}

    if options.json:
        print(json.dumps(found))
        return
    print()
    for name, value in found.items():
        print(f"{name:28} {value:10.2f}")


if __name__ == "__main__":
    main()
