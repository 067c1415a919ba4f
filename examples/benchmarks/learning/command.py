"""How fast algorithms learn, in several regimes. README.md beside this file says what is measured, and how.

    python examples/benchmarks/learning/run.py                   # all of it, for hours; may be killed and run again
    python examples/benchmarks/learning/run.py --regimes reverse dense --algorithms ppo grpo --seeds 0 1
    python examples/benchmarks/learning/run.py --report-only     # of the runs that are there
    python examples/benchmarks/learning/run.py --quick           # seconds, to see that everything works

A run that is there is not done again. Progress goes to stderr, the table (or, with --json, one JSON object) to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ppo_shared import say
from trl_side import trl_python

from learning.algorithms import ALGORITHMS
from learning.jobs import OtherSettingsError
from learning.pool import Workers
from learning.regimes import REGIMES, quick, scaled
from learning.suite import Suite

QUICK = {"regimes": ["reverse", "dense"], "algorithms": ["ppo", "grpo"], "seeds": [0, 1]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of all results, by default runs/learning")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, help="by default all")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the runs that count, by default 0 to 4")
    parser.add_argument("--tuning-seed", type=int, default=100, help="of the runs that learning rates are chosen by")
    parser.add_argument("--tokens-scale", type=float, default=1.0, help="multiplies the tokens of every run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs side by side, a thread each")
    parser.add_argument("--rates", type=float, nargs="+", help="each algorithm with each of these learning rates")
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
    if options.quick:
        algorithms = [dataclasses.replace(algorithm, rates=algorithm.rates[:2]) for algorithm in algorithms]
    if options.no_trl:
        algorithms = [algorithm for algorithm in algorithms if algorithm.trl is None]
    if options.rates:
        algorithms = [
            dataclasses.replace(each, name=f"{each.name}-{rate:g}", rates=(rate,))
            for each in algorithms
            for rate in options.rates
        ]
        ALGORITHMS.update({each.name: each for each in algorithms})
    out = options.out or Path("runs/learning-quick" if options.quick else "runs/learning")
    seeds = list(default["seeds"]) if options.seeds is None else options.seeds
    suite = Suite(regimes, algorithms, seeds, options.tuning_seed, out, options.redo)
    failed: dict[str, str] = {}
    try:
        if not options.report_only:
            if any(algorithm.trl for _, algorithm in suite.pairs):
                trl_python()  # makes its environment, which several processes must not do at once
            with Workers(out, options.processes) as workers:
                failed = suite.work(workers)
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
        say(f"{len(failed)} jobs failed, and are done again by the same command:")
        for name, error in failed.items():
            say(f"  {name}: {error}")
    return 1 if failed else 0
