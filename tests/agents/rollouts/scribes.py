"""What processes of tests write with. They import this, so it is light."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.rollouts.workers.worker import Scribe
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_tokenizer
from llm_env.tasks import Task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout
from tests.agents.small_models import character_model

CONTEXT = 18


class Short(Task):
    """Ten letters at most; some of them end a text. The process that writes does something odd on request.

    Args:
        folder: where a file of a name in `DEEDS` asks for that; with "once" in it, only once.
    """

    max_new_tokens = 10
    max_prompt_tokens = 8
    stop = ("e", "t")

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(letter * 3, {"index": index}) for index, letter in enumerate("abcdef")]}

    def score(self, rollout: Rollout) -> float:
        return float(len(rollout.text))

    def over(self, episodes: Any, rows: Any) -> Any:
        if self.folder is not None and episodes.state.num_actions[rows].max() > 3:
            for name, act in DEEDS.items():
                if (path := self.folder / name).exists() and asked(path):
                    act()
        return np.zeros(len(rows), dtype=bool)


def asked(path: Path) -> bool:
    """Whether it is this process's turn."""
    if path.read_text() != "once":
        return True
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def complain() -> None:
    raise ValueError("no more of this")


def lie() -> None:
    """Say what is no answer, on the handle that leads to the program."""
    Connection(int(sys.argv[1])).send_bytes(b"what is this?")
    time.sleep(60)


DEEDS = {"die": die, "hang": hang, "raise": complain, "lie": lie}


def make_scribe(folder: Path) -> Scribe:
    engine = TransformersEngine(character_model(spread=0.2), load_tokenizer("tiny"), num_slots=4, context=CONTEXT)
    return Scribe(engine, Short(folder).bind(engine.vocabulary))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(character_model(spread=0.2, seed=seed).named_parameters())
