"""What there is to do, as jobs that know where their results belong, and whether those are there already."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ppo_shared import about

from agents.config.checks import flatten
from agents.report.display import Display
from agents.run.parts import build_parts
from agents.run.warm_start import warm_start
from learning.algorithms import ALGORITHMS, Algorithm, configuration
from learning.learn import learn, open_side
from learning.regimes import Regime
from llm_env.files import replace_file, replace_folder

# Of the configuration, what decides no number of a run ...
IDLE = ("out", "iterations", "log.", "checkpoint.", "sft.checkpoint_every", "evaluation.every", "evaluation.stop_at")
# ... what a start depends on, and besides that how a run is judged.
OF_START = ("task.", "model.name", "model.dtype", "sft.", "seed", "module")
OF_JUDGING = ("evaluation.", "rollout.temperature")

Settings = dict[str, Any]


class OtherSettingsError(Exception):
    """A result that is there was got with other settings than those asked for."""


@dataclass(frozen=True)
class Start:
    """The warm start that all algorithms go on from, for a regime and a seed."""

    regime: Regime
    seed: int

    @property
    def name(self) -> str:
        return f"{self.regime.name}: warm start, seed {self.seed}"

    @property
    def weight(self) -> float:
        """How long it takes, roughly, in tokens of a run."""
        return self.regime.tokens / 10

    @property
    def settings(self) -> Settings:
        return _settings(configuration(self.regime, ALGORITHMS["ppo"], self.seed), only=OF_START)

    def path(self, out: Path) -> Path:
        """The folder of the model, whose name changes with all that the model depends on."""
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:10]
        return out / "starts" / f"{self.regime.name}-seed{self.seed}-{key}" / "model"

    def is_done(self, out: Path) -> bool:
        return self.path(out).exists()

    def run(self, out: Path, processes: int) -> str:
        """Make it; gives a remark on how it went."""
        config, folder = configuration(self.regime, ALGORITHMS["ppo"], self.seed), self.path(out)
        if config.sft.steps:
            scores = warm_start(config, folder, Display(config.sft.steps, "warm start", enabled=False)).after
            return f"sampled {scores.get('eval/sampled', float('nan')):.3f}"
        parts = build_parts(config)
        with replace_folder(folder) as new:
            parts.network.export(new, parts.tokenizer)
        parts.close()
        return "the model as it is"


@dataclass(frozen=True)
class Job:
    """One run: an algorithm in a regime, with a seed and a learning rate."""

    regime: Regime
    algorithm: Algorithm
    seed: int
    rate: float | None = None

    @property
    def learning_rate(self) -> float:
        """That asked for, or the configuration's own."""
        return configuration(self.regime, self.algorithm, self.seed, self.rate).actor.learning_rate

    @property
    def name(self) -> str:
        return f"{self.regime.name}: {self.algorithm.name}, learning rate {self.learning_rate:g}, seed {self.seed}"

    @property
    def tokens(self) -> int:
        """That it may write."""
        return self.regime.tokens * self.algorithm.patience

    @property
    def weight(self) -> float:
        return float(self.tokens)

    @property
    def settings(self) -> Settings:
        """All that decides its numbers."""
        config = configuration(self.regime, self.algorithm, self.seed, self.rate)
        of_run = {"suite.tokens": self.tokens, "suite.points": self.regime.points}
        if self.algorithm.trl is None:
            return of_run | _settings(config)
        trl = {f"trl.{name}": value for name, value in self.algorithm.trl.items()}
        return of_run | _settings(config, only=(*OF_START, *OF_JUDGING)) | trl | {"trl.learning_rate": self.rate}

    def path(self, out: Path) -> Path:
        return out / self.regime.name / self.algorithm.name / f"lr{self.learning_rate:g}-seed{self.seed}.json"

    def is_done(self, out: Path) -> bool:
        """Whether its result is there; raises if there is one of other settings."""
        path = self.path(out)
        if not path.exists():
            return False
        found, wanted = json.loads(path.read_text())["settings"], self.settings
        changed = [
            f"{name} is now {wanted.get(name, 'not there')}, was {found.get(name, 'not there')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name, "not there") != wanted.get(name, "not there")
        ]
        if changed:
            raise OtherSettingsError(
                f"{path} was got with other settings than those asked for:\n  "
                + "\n  ".join(changed)
                + "\nUse another --out, go back to those settings, or do such runs again with --redo."
            )
        return True

    def result(self, out: Path) -> dict[str, Any]:
        """What `run` has written."""
        found: dict[str, Any] = json.loads(self.path(out).read_text())
        return found

    def run(self, out: Path, processes: int) -> str:
        """Do it and write its result; gives a remark on how it went."""
        start = Start(self.regime, self.seed).path(out)
        if not start.exists():
            raise RuntimeError(f"there is no {start} to begin with, as its warm start has failed")
        config = configuration(self.regime, self.algorithm, self.seed, self.rate)
        trl = self.algorithm.trl and {**self.algorithm.trl, "learning_rate": self.rate}
        with open_side(config, start, trl=trl, critic=self.algorithm.critic) as side:
            points = learn(side, self.tokens, self.regime.points * self.algorithm.patience)
        result = {
            "regime": self.regime.name,
            "algorithm": self.algorithm.name,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "processes": processes,
            "threads": torch.get_num_threads(),
            "machine": about(),
            "commit": commit(),
            "settings": self.settings,
            "points": points,
        }
        with replace_file(self.path(out)) as new:
            new.write_text(json.dumps(result, indent=1))
        first, last = points[0], points[-1]
        return f"sampled {first['sampled']:.3f} -> {last['sampled']:.3f}, {last['seconds']:.0f} s of iterations"


@functools.cache
def commit() -> str | None:
    """Which version of the code this is, if it lies in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _settings(config: Any, only: tuple[str, ...] | None = None) -> Settings:
    chosen = {
        name: value
        for name, value in flatten(config)
        if not name.startswith(IDLE) and (only is None or name.startswith(only))
    }
    return _as_json_reads_it(chosen)


def _as_json_reads_it(settings: Mapping[str, Any]) -> Settings:
    read: Settings = json.loads(json.dumps(settings, default=str))
    return read
