"""What runs log and what the table describes are the same: no number without a meaning, no entry without a number."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import agents
from agents.config import TrainConfig
from agents.metrics.built_in import BUILT_IN
from agents.report.log import read_metrics
from agents.run.training import train
from llm_env.tasks import register_task
from rewards import Rollout, Score
from tests.agents.runs import VowelShare, save_small_model, small_config

NAMES = {entry.name for entry in BUILT_IN}
ALWAYS = {entry.name for entry in BUILT_IN if entry.needs is None} | {"reward/score"}  # the task's own part
CRITIC = {name for name in NAMES if name.startswith("value/")} - {"value/clip_fraction"}
TRUST = {"kl/moved", "policy/step_kept"}


@register_task
class VowelParts(VowelShare):
    """The same, with a score that tells its parts, and with replies."""

    max_reply_tokens = 1

    def reply(self, rollout: Rollout) -> None:
        return None

    def score(self, rollout: Rollout) -> Score:
        total = super().score(rollout)
        return Score(total, {"vowels": 2 * total, "many words": 0.0})


RUNS: dict[str, tuple[dict[str, object], set[str]]] = {
    "everything": (
        {
            "task__name": "VowelParts",
            "task__args": {},
            "kl__beta": 0.1,
            "kl__where": "loss",
            "kl__estimator": "k3",
            "loss__entropy": 0.01,
            "loss__value_clip": 0.2,
            "rollout__engine_dtype": "float32",
            "workers": 1,
        },
        NAMES | {"reward/score", "reward/vowels", "reward/many words"},
    ),
    "without a critic or a reference": (
        {"algo": "grpo", "rollout__completions_per_prompt": 4},
        ALWAYS | TRUST | {"policy/clip_fraction", "reward/exact"},
    ),
    "a2c": (
        {"algo": "a2c", "actor__epochs": 1, "actor__minibatches": 1},
        ALWAYS | CRITIC | TRUST | {"kl/mismatch", "reward/exact"},
    ),
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each run has logged in its iterations."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_small_model(folder / "model", spread=0.2)
    found = {}
    for number, (kind, (changes, _)) in enumerate(RUNS.items()):
        config: TrainConfig = small_config(folder / str(number), model, iterations=2, **changes)
        train(config)
        rows = read_metrics(config.out)
        assert len(rows) == 3  # the first is the evaluation before the run
        found[kind] = {name for row in rows for name in row}
    return found


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_logs_what_the_table_says(logged: dict[str, set[str]], kind: str) -> None:
    evaluated = {name for name in NAMES if name.startswith("eval/")} | {"time/eval"}
    assert logged[kind] == RUNS[kind][1] | evaluated


def test_no_entry_is_dead(logged: dict[str, set[str]]) -> None:
    assert set.union(*logged.values()) >= NAMES


def test_the_code_reads_only_metrics_that_there_are() -> None:
    """A rule that watches a metric by a name that nobody logs would be silent for ever."""
    groups = {entry.group for entry in BUILT_IN}
    named: dict[str, set[str]] = {}
    for path in Path(agents.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = re.fullmatch(r"([a-z]+)/[a-z_0-9]+", node.value)
                if match and match[1] in groups:
                    named.setdefault(path.name, set()).add(node.value)
    assert {"reward/mean", "kl/old", "guard/skipped"} <= named["warnings.py"]
    for file, names in named.items():
        # The losses' second moment of the ratio is never logged: of micro-batches, it makes the ratio/ess of the whole.
        # What a held-out reward model says is a part of a score, and parts are logged as they are called.
        assert names - {"ratio/square", "reward/held_out"} <= NAMES, file
