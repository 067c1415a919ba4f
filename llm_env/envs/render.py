"""An episode as text for a terminal."""

from __future__ import annotations

import os
import sys

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.state import IDLE
from rewards import End

_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def render_row(mdp: TokenMDP, row: int, *, color: bool | None = None) -> str:
    """The prompt, the text so far, and what it earned.

    Args:
        mdp: the episodes.
        row: which one.
        color: dim the prompt and embolden the text; by default if the terminal shows colors and NO_COLOR is not set.
    """
    if mdp.state.end[row] == IDLE:
        return "(no episode yet: call reset)"
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    dim, bold, reset = (_DIM, _BOLD, _RESET) if color else ("", "", "")
    rollout = mdp.rollout(row)
    actions = int(mdp.state.num_actions[row])
    progress = "running" if rollout.end is End.RUNNING else f"ended ({rollout.end})"
    budget = int(mdp.state.budget[row])
    return (
        f"{dim}{rollout.prompt}{reset}{bold}{rollout.transcript}{reset}\n"
        f"{dim}[{mdp.task.name}] token {actions}/{budget}, return {mdp.episode_return[row]:g}, {progress}{reset}"
    )
