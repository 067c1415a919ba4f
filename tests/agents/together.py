"""Runs in several processes: `torchrun --nproc-per-node 2 together.py PICKLE`, a list of configurations to train."""

from __future__ import annotations

import faulthandler
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

PATIENCE = 100
"""Seconds after which a process that waits for another one says where, and ends."""

if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    import torch

    from agents.networks.ranks import launched
    from agents.run import parts
    from agents.run.training import train

    load_model = parts.load_model

    def without_weights(*args: Any, device: str, **options: Any) -> Any:
        assert device == "meta"
        return load_model(*args, device=device, **options)

    if not launched().leads:  # whoever follows never has a whole model
        parts.load_model = without_weights
    importlib.import_module("tests.agents.runs")  # registers tasks
    torch.set_num_threads(1)
    for config, resume in pickle.loads(Path(sys.argv[1]).read_bytes()):
        train(config, resume=resume)
