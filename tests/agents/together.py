"""Runs in several processes: `torchrun --nproc-per-node 2 together.py PICKLE`, a list of configurations to train."""

from __future__ import annotations

import faulthandler
import importlib
import pickle
import sys
from pathlib import Path

PATIENCE = 100
"""Seconds after which a process that waits for another one says where, and ends."""

if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    import torch

    from agents.run.training import train

    importlib.import_module("tests.agents.runs")  # registers tasks
    torch.set_num_threads(1)
    for config, resume in pickle.loads(Path(sys.argv[1]).read_bytes()):
        train(config, resume=resume)
