"""Making a vLLM engine without changing the process around it, in which a trainer lives too."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

STAYS = ("VLLM_", "TORCHINDUCTOR_", "TRITON_")  # variables that vLLM sets and may read later


@contextlib.contextmanager
def process_untouched() -> Iterator[None]:
    """Undo what making a vLLM engine does to the process.

    All global seeds become 0, `torch.set_num_threads` stops working, all objects there are, the trainer's included, are
    hidden from the garbage collector, and child processes inherit an LD_PRELOAD and more.
    """
    environment = dict(os.environ)
    frozen = gc.get_freeze_count()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            if not frozen:
                gc.unfreeze()
            for name in os.environ.keys() | environment.keys():
                if not name.startswith(STAYS):
                    _set_variable(name, environment.get(name))


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def stderr_kept() -> Iterator[None]:
    """Keep stderr back, that of C++ included, and show it only if something fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
