"""Programs per second in the sandbox, beside a bare Python; and how hostile programs fare.

    python examples/benchmarks/sandbox.py --json

The fast tier, the full tier, and `python -I -S` without any fence run the same small program, in turns; the median of
several rounds counts. Then hostile programs, made from templates, are run and checked: how many got out, or passed
tests that they do not do, and how much this process has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rewards import Limits, Sandbox

SECRET = "quite-a-secret"
FULL = "import heapq\n"
PROGRAM = "def double(x):\n    return 2 * x\nprint(double(21))\n"
# Templates: {n} and {d} are numbers, {marker} is a path that must not come into being, {secret} a file not to be read.
HOSTILE = (Path(__file__).parent / "hostile_programs.txt").read_text().removesuffix("\n").split("\n----\n")


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

    os.environ["LLM_ENV_BENCHMARK_SECRET"] = SECRET  # what a program must not see of ours
    sandbox = Sandbox(Limits(seconds=0.5))
    with tempfile.TemporaryDirectory() as folder:
        marker, secret = Path(folder) / "escaped", Path(folder) / "secret"
        secret.write_text(SECRET)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong = escapes = 0
        for number in range(options.hostile):
            template = HOSTILE[number % len(HOSTILE)]
            turn = number // len(HOSTILE)
            program = template.format(n=turn * 37, d=4 + turn % 5, marker=str(marker), secret=str(secret))
            program = FULL * (turn % 2) + program
            wrong += sandbox.check(program, "assert candidate(2) == 4\nassert candidate(3) == 6", "double").passed
            said = sandbox.run(program).stdout
            wrong += said == "42\n"
            if os.path.lexists(marker) or SECRET in said or secret.read_text() != SECRET:
                escapes += 1
                print(f"\nescaped: {program}", file=sys.stderr)
                shutil.rmtree(marker, ignore_errors=True) if marker.is_dir() else marker.unlink(missing_ok=True)
                secret.write_text(SECRET)
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
