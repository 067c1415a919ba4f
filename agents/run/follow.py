"""A run that goes on in another process, as it would look here."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agents.config.files import ConfigError, load_config
from agents.report.display import Display
from agents.report.log import METRICS, SAMPLES, read_lines, read_metrics
from agents.run.summary import run_title


def follow(folder: Path, pause: Callable[[], None] = lambda: time.sleep(1.0)) -> int:
    """Show a run until it has done its last iteration, or the reader has seen enough; the last iteration that was seen.

    Args:
        folder: of the run.
        pause: until the next look.
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"there is no run in {folder} (no config.yaml): expected the folder of llm-env train (--out)")
    config, seen = load_config(saved), -1
    with Display(config.iterations, run_title(config)) as display:
        display.phase("waiting for the first numbers")
        try:
            while True:
                samples = read_lines(folder, SAMPLES)
                for row in read_metrics(folder):
                    iteration = int(row["iteration"])
                    if iteration > seen:
                        seen = iteration
                        display.update(row, [sample for sample in samples if sample["iteration"] == iteration] or None)
                        display.phase(f"following {folder}")
                if seen >= config.iterations or _is_over(folder):
                    return seen
                pause()
        except KeyboardInterrupt:
            return seen


def _is_over(folder: Path) -> bool:
    """Whether the last model was written after the last number; that of an end before a resume is older."""
    model, numbers = folder / "model" / "config.json", folder / METRICS
    return model.exists() and numbers.exists() and model.stat().st_mtime >= numbers.stat().st_mtime
