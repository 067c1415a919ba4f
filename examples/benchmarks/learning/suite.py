"""Which jobs there are, in which order, and what is reported of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_shared import about, say

from learning.algorithms import Algorithm
from learning.jobs import Job, OtherSettingsError, Start
from learning.picture import draw
from learning.pool import Workers
from learning.regimes import Regime
from learning.report import column, plain, summarize, table
from learning.statistics import area
from llm_env.files import replace_file


class Suite:
    """The regimes and algorithms of one call, and what there is of them.

    Args:
        regimes: to learn in.
        algorithms: that learn.
        seeds: of the runs that count.
        tuning_seed: of the runs that a learning rate is chosen by.
        out: the folder of all results.
        redo: do runs again that are there with other settings.
    """

    def __init__(
        self,
        regimes: Sequence[Regime],
        algorithms: Sequence[Algorithm],
        seeds: Sequence[int],
        tuning_seed: int,
        out: Path,
        redo: bool = False,
    ) -> None:
        self.regimes, self.algorithms, self.seeds, self.out = regimes, algorithms, seeds, out
        self.tuning_seed, self.redo = tuning_seed, redo
        self.pairs = [(regime, each) for regime in regimes for each in algorithms if each.can_run(regime)]

    def sweep(self, regime: Regime, algorithm: Algorithm) -> list[Job]:
        """The runs by which its learning rate is chosen; none where there is nothing to choose."""
        rates = algorithm.rates if len(algorithm.rates) > 1 else ()
        return [Job(regime, algorithm, self.tuning_seed, rate) for rate in rates]

    def best_rate(self, regime: Regime, algorithm: Algorithm) -> float | None:
        """That with the highest mean of its sampled score over all tokens; None without one to choose from."""
        if len(algorithm.rates) < 2:
            return algorithm.rates[0] if algorithm.rates else None
        areas = {}
        for job in self.sweep(regime, algorithm):
            if self.is_done(job):
                run = job.result(self.out)
                areas[job.rate] = area(column(run, "tokens"), column(run, "sampled"), regime.tokens)
        return max(areas, key=lambda rate: areas[rate]) if areas else None

    def runs(self, regime: Regime, algorithm: Algorithm) -> list[Job]:
        """Those that count; none before there is a learning rate."""
        rate = self.best_rate(regime, algorithm)
        if rate is None and algorithm.rates:
            return []
        return [Job(regime, algorithm, seed, rate) for seed in self.seeds]

    def is_done(self, job: Start | Job) -> bool:
        """Whether its result is there. One of other settings raises, or with `redo` is deleted."""
        try:
            return job.is_done(self.out)
        except OtherSettingsError:
            if not self.redo:
                raise
            job.path(self.out).unlink()
            return False

    def missing(self, jobs: Sequence[Start | Job]) -> list[Start | Job]:
        """Those not done."""
        return [job for job in jobs if not self.is_done(job)]

    def work(self, workers: Workers) -> dict[str, str]:
        """Do all that is missing; gives what went wrong, by the names of jobs."""
        failed: dict[str, str] = {}
        for what in ("warm starts", "learning rates", "runs"):
            jobs = self.jobs_of(what)
            missing = [job for job in self.missing(jobs) if job.name not in failed]
            if what == "warm starts":  # only those that a run still needs
                wanted = self.missing(self.jobs_of("learning rates") + self.jobs_of("runs"))
                needed = {(job.regime.name, job.seed) for job in wanted} | self.seeds_to_come()
                missing = [start for start in missing if (start.regime.name, start.seed) in needed]
            say(f"{what}: {len(missing)} of {len(jobs)} to do")
            if missing:
                failed |= workers.do_all(missing)
        return failed

    def jobs_of(self, what: str) -> list[Any]:
        """All of one kind, done or not. With the learning rates come the runs that need none chosen."""
        if what == "warm starts":
            seeds = {(r.name, seed): Start(r, seed) for r, a in self.pairs for seed in self.seeds}
            tuned = {(r.name, self.tuning_seed): Start(r, self.tuning_seed) for r, a in self.pairs if self.sweep(r, a)}
            return list((seeds | tuned).values())
        if what == "learning rates":
            return [job for pair in self.pairs for job in self.sweep(*pair) or self.runs(*pair)]
        return [job for pair in self.pairs for job in self.runs(*pair)]

    def seeds_to_come(self) -> set[tuple[str, int]]:
        """What runs will begin with whose learning rate is not known yet."""
        unknown = [regime.name for regime, algorithm in self.pairs if not self.runs(regime, algorithm)]
        return {(name, seed) for name in unknown for seed in self.seeds}

    def report(self) -> dict[str, Any]:
        """Write suite.json and suite.png of the runs that are there."""
        runs: dict[str, dict[str, list[Any]]] = {}
        for regime, algorithm in self.pairs:
            done = [job.result(self.out) for job in self.runs(regime, algorithm) if self.is_done(job)]
            runs.setdefault(regime.name, {})[algorithm.name] = done
        everything = [run for of in runs.values() for done in of.values() for run in done]
        made = {what: sorted({str(run[what]) for run in everything}) for what in ("commit", "processes", "threads")}
        for what, found in made.items():
            if len(found) > 1:
                say(f"note: {what} is not the same for all of these runs, but {', '.join(found)}")
        figures = summarize(self.regimes, runs)
        result = {"runs": made, "machine": about(), "tuning_seed": self.tuning_seed, "regimes": plain(figures)}
        with replace_file(self.out / "suite.json") as new:
            new.write_text(json.dumps(result, indent=1))
        draw(self.regimes, runs, self.out / "suite.png")
        return {"json": result, "table": table(figures)}
