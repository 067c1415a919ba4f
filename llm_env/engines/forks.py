"""What a forked process can do with torch: compute, in one thread.

A fork copies one thread of a process. If torch has computed in several before, the child has their pool, but not the
threads, and its next computation waits for them for ever. Gymnasium's `AsyncVectorEnv` forks its workers unless told
otherwise. With one thread torch asks no pool, which is also how its own `DataLoader` lets its workers live.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings

import torch


def _is_forked_worker() -> bool:
    """Whether this process was forked by `multiprocessing`, perhaps before this module was imported."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return multiprocessing.parent_process() is not None and method == "fork"


# The process whose torch can be trusted with threads: the one that imports this, unless it was forked before.
_trusted = 0 if _is_forked_worker() else os.getpid()


def use_one_thread_if_forked() -> None:
    """Let torch compute in one thread from now on, if this process was forked; called before engines compute."""
    global _trusted
    if _trusted == os.getpid():
        return
    _trusted = os.getpid()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "an engine is used in a forked process, where torch would wait for ever for the threads of its parent: it "
            "computes in one thread here. To have more, begin the workers anew instead of forking them: "
            "AsyncVectorEnv(..., context='spawn') or 'forkserver'",
            RuntimeWarning,
            stacklevel=2,
        )
