"""How fast algorithms learn, in several regimes. README.md beside this file says what is measured, and how.

    python examples/benchmarks/learning/run.py                   # all of it, for hours; may be killed and run again
    python examples/benchmarks/learning/run.py --regimes reverse dense --algorithms ppo grpo --seeds 0 1
    python examples/benchmarks/learning/run.py --report-only     # of the runs that are there
    python examples/benchmarks/learning/run.py --quick           # seconds, to see that everything works

A run that is there is not done again. Progress goes to stderr, the table (or, with --json, one JSON object) to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In place of this folder the one above it: it has the package `learning` and what the benchmarks share, while the
# modules in here would take the place of others of the same name, such as Python's own `statistics`.
sys.path[0] = str(Path(__file__).parents[1])

from ppo_shared import about, say  # noqa: E402
from trl_side import trl_python  # noqa: E402

from learning.algorithms import ALGORITHMS, Algorithm  # noqa: E402
from learning.jobs import Job, OtherSettingsError, Start, commit  # noqa: E402
from learning.picture import draw  # noqa: E402
from learning.pool import do_all  # noqa: E402
from learning.regimes import REGIMES, Regime, quick, scaled  # noqa: E402
from learning.report import column, plain, summarize, table  # noqa: E402
from learning.statistics import area  # noqa: E402
from llm_env.files import replace_file  # noqa: E402

QUICK = {"regimes": ["reverse", "dense"], "algorithms": ["ppo", "grpo"], "seeds": [0, 1]}


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
            if job.is_done(self.out):
                run = job.result(self.out)
                areas[job.rate] = area(column(run, "tokens"), column(run, "sampled"), regime.tokens)
        return max(areas, key=lambda rate: areas[rate]) if areas else None

    def runs(self, regime: Regime, algorithm: Algorithm) -> list[Job]:
        """Those that count; none before there is a learning rate."""
        rate = self.best_rate(regime, algorithm)
        if rate is None and algorithm.rates:
            return []
        return [Job(regime, algorithm, seed, rate) for seed in self.seeds]

    def missing(self, jobs: Sequence[Start | Job]) -> list[Start | Job]:
        """Those not done; raises if a result is there that was got with other settings."""
        missing, others = [], []
        for job in jobs:
            try:
                if not job.is_done(self.out):
                    missing.append(job)
            except OtherSettingsError as error:
                missing.append(job)
                others.append(str(error))
                if self.redo:
                    job.path(self.out).unlink()
        if others and not self.redo:
            raise OtherSettingsError(
                f"{len(others)} results in {self.out} were got with other settings than those asked for:\n  "
                + "\n  ".join(others[:3])
                + "\nUse another --out, go back to those settings, or do these runs again with --redo."
            )
        return missing

    def work(self, processes: int) -> list[str]:
        """Do all that is missing; gives what went wrong."""
        failed: list[str] = []
        for what in ("warm starts", "learning rates", "runs"):
            jobs = self.jobs_of(what)
            missing = self.missing(jobs)
            if what == "warm starts":  # only those that a run still needs
                wanted = self.missing(self.jobs_of("learning rates") + self.jobs_of("runs"))
                needed = {(job.regime.name, job.seed) for job in wanted} | self.seeds_to_come()
                missing = [start for start in missing if (start.regime.name, start.seed) in needed]
            say(f"{what}: {len(missing)} of {len(jobs)} to do")
            if missing:
                failed += do_all(missing, self.out, processes)
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
            jobs = self.runs(regime, algorithm)
            missing = self.missing(jobs)
            done = [job.result(self.out) for job in jobs if job not in missing]
            runs.setdefault(regime.name, {})[algorithm.name] = done
        everything = [run for of in runs.values() for done in of.values() for run in done]
        for what in ("commit", "processes"):
            found = sorted({str(run[what]) for run in everything})
            if len(found) > 1:
                say(f"note: these runs have more than one {what}: {', '.join(found)}")
        figures = summarize(self.regimes, runs)
        machine = {"commit": commit(), "processes": sorted({run["processes"] for run in everything}), **about()}
        result = {"machine": machine, "tuning_seed": self.tuning_seed, "regimes": plain(figures)}
        with replace_file(self.out / "suite.json") as new:
            new.write_text(json.dumps(result, indent=1))
        draw(self.regimes, runs, self.out / "suite.png")
        return {"json": result, "table": table(figures)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of all results, by default runs/learning")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, help="by default all")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the runs that count, by default 0 to 4")
    parser.add_argument("--tuning-seed", type=int, default=100, help="of the runs that learning rates are chosen by")
    parser.add_argument("--tokens-scale", type=float, default=1.0, help="multiplies the tokens of every run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs side by side, a thread each")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--quick", action="store_true", help="two tiny regimes, in seconds, to see that all works")
    parser.add_argument("--report-only", action="store_true", help="do no run, report those that are there")
    parser.add_argument("--redo", action="store_true", help="do runs again that are there with other settings")
    parser.add_argument("--json", action="store_true", help="print suite.json instead of the table")
    options = parser.parse_args(arguments)
    if options.tokens_scale <= 0 or options.processes < 1:
        parser.error("--tokens-scale must be more than 0, and --processes at least 1")

    default = QUICK if options.quick else {"regimes": list(REGIMES), "algorithms": list(ALGORITHMS), "seeds": range(5)}
    regimes = [REGIMES[name] for name in options.regimes or default["regimes"]]
    regimes = [scaled(quick(each) if options.quick else each, options.tokens_scale) for each in regimes]
    algorithms = [ALGORITHMS[name] for name in options.algorithms or default["algorithms"]]
    if options.no_trl:
        algorithms = [algorithm for algorithm in algorithms if algorithm.trl is None]
    out = options.out or Path("runs/learning-quick" if options.quick else "runs/learning")
    seeds = list(default["seeds"]) if options.seeds is None else options.seeds
    suite = Suite(regimes, algorithms, seeds, options.tuning_seed, out, options.redo)
    failed: list[str] = []
    try:
        if not options.report_only:
            if any(algorithm.trl for _, algorithm in suite.pairs):
                trl_python()  # makes its environment, which several processes must not do at once
            failed = suite.work(options.processes)
        report = suite.report()
    except OtherSettingsError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on with what is in {out}")
        return 130
    print(json.dumps(report["json"]) if options.json else report["table"])
    say(f"figures and curves: {out / 'suite.json'}, {out / 'suite.png'}")
    if failed:
        say(f"{len(failed)} jobs failed, and are done again by the same command:\n  " + "\n  ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
