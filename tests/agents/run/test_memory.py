"""Memory that a process frees and takes again is not cleared by the system each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agents.run.memory import keep_freed_memory

PROGRAM = """
import resource, sys
import numpy as np
from agents.run.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
for _ in range(3):
    np.ones(8_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(8_000_000)  # 64 million bytes
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60)
    if done.returncode == 3:
        pytest.skip("this C library has no such option")
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is about glibc")
def test_pages_are_taken_once() -> None:
    assert page_faults("keep") < 100 < page_faults("as it is")


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
