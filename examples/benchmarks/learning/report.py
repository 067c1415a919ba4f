"""From runs to figures, and from figures to a table. Every figure that is quoted about learning comes from here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from learning.algorithms import ALGORITHMS
from learning.regimes import Regime
from learning.statistics import bootstrap, iqm, ratio_of_iqms, reached_at, summary_of

Run = dict[str, Any]
Figures = dict[str, Any]
Runs = Mapping[str, Mapping[str, Sequence[Run]]]
"""By regime and algorithm, one for each seed."""


def column(run: Run, name: str) -> list[float]:
    """One of the things measured, at all points of a run."""
    return [point[name] for point in run["points"]]


def cost(run: Run, threshold: float, what: str) -> float:
    """The tokens or seconds that a run took to its threshold; infinity if it never got there."""
    return reached_at(column(run, what), column(run, "sampled"), threshold)


def summarize(regimes: Sequence[Regime], runs: Runs) -> Figures:
    """All figures, by regime."""
    figures: Figures = {}
    for regime in regimes:
        of_regime = {name: done for name, done in runs.get(regime.name, {}).items() if done}
        figures[regime.name] = {
            "what": regime.what,
            "tokens": regime.tokens,
            "threshold": regime.threshold,
            "start": summary_of([column(run, "sampled")[0] for run in _one_each(of_regime)]) if of_regime else None,
            "algorithms": {name: figures_of(name, done, regime) for name, done in of_regime.items()},
            "ratios": ratios(of_regime, regime.threshold),
        }
    return figures


def figures_of(name: str, runs: Sequence[Run], regime: Regime) -> Figures:
    """Of one algorithm in one regime."""
    algorithm = ALGORITHMS[name]
    rate = runs[0]["learning_rate"]
    explained = [known for run in runs if (known := _known(run))]
    tokens = [cost(run, regime.threshold, "tokens") for run in runs]
    return {
        "learning_rate": rate,
        "tuned": len(algorithm.rates) > 1,
        "rate_at_the_edge": len(algorithm.rates) > 1 and rate in (min(algorithm.rates), max(algorithm.rates)),
        "seeds": [run["seed"] for run in runs],
        "reached": sum(map(math.isfinite, tokens)),
        "tokens": summary_of(tokens),
        "seconds": summary_of([cost(run, regime.threshold, "seconds") for run in runs]),
        "final_sampled": summary_of([column(run, "sampled")[-1] for run in runs]),
        "final_greedy": summary_of([column(run, "greedy")[-1] for run in runs]),
        "explained_variance": summary_of([float(np.mean(known)) for known in explained]) if explained else None,
    }


def ratios(runs: Mapping[str, Sequence[Run]], threshold: float) -> Figures:
    """What ppo needs to the threshold over what others need: below 1, it needs less."""
    found: Figures = {}
    if "ppo" not in runs:
        return found
    free = {name: _costs(done, threshold, "tokens") for name, done in runs.items() if not ALGORITHMS[name].critic}
    if free:
        best = min(free, key=lambda name: float(iqm(free[name])))
        found["best_critic_free"] = best if math.isfinite(iqm(free[best])) else None
        found["tokens_over_best_critic_free"] = _ratio(_costs(runs["ppo"], threshold, "tokens"), free[best])
    if "trl" in runs:
        for what in ("tokens", "seconds"):
            ours, theirs = (_costs(runs[name], threshold, what) for name in ("ppo", "trl"))
            found[f"{what}_over_trl"] = _ratio(ours, theirs)
    return found


LEGEND = """\
Tokens and seconds to the threshold, and the score in the end: interquartile means of the seeds; [95% intervals].
untuned: at the default learning rate, which the trust region lowers; tuned: at the best of several; edge: that was the
lowest or the highest of them.
EV: the explained variance of the critic, mean of the run."""


def table(figures: Figures) -> str:
    """All of it as text."""
    return "\n\n".join([*(_regime_lines(name, of_regime) for name, of_regime in figures.items()), LEGEND])


def plain(value: Any) -> Any:
    """The same for JSON, which knows neither infinity nor NaN: None stands for both."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _costs(runs: Sequence[Run], threshold: float, what: str) -> list[float]:
    return [cost(run, threshold, what) for run in runs]


def _ratio(ours: list[float], theirs: list[float]) -> Figures:
    low, high = bootstrap(ratio_of_iqms, ours, theirs)
    return {"ratio": float(ratio_of_iqms(ours, theirs)), "low": low, "high": high}


def _known(run: Run) -> list[float]:
    return [value for value in column(run, "explained_variance") if value is not None]


def _one_each(runs: Mapping[str, Sequence[Run]]) -> list[Run]:
    """One run of each seed: all algorithms begin with the same model. Ours, where there is one of ours."""
    found = {run["seed"]: run for name, done in sorted(runs.items(), key=lambda item: item[0] != "trl") for run in done}
    ours = {run["seed"]: run for name, done in runs.items() if name != "trl" for run in done}
    return list((found | ours).values())


HEADER = (
    "algorithm",
    "learning rate",
    "tokens to it",
    "95% interval",
    "seconds",
    "reached",
    "sampled in the end",
    "EV",
)


def _regime_lines(name: str, figures: Figures) -> str:
    title = f"{name}: {figures['what']}\n  {figures['tokens']:,} tokens a run; threshold {figures['threshold']:g}"
    if not figures["algorithms"]:
        return f"{title}\n  no runs yet"
    rows = [HEADER, *(_row(each, of) for each, of in figures["algorithms"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    title += f"; sampled at the start {_interval(figures['start'], '.3f')}"
    return "\n".join([title, *(line.rstrip() for line in lines), *_ratio_lines(figures["ratios"])])


def _row(name: str, of: Figures) -> tuple[str, ...]:
    rate = f"{of['learning_rate']:g} " + ("untuned" if not of["tuned"] else "(edge)" if of["rate_at_the_edge"] else "")
    explained = of["explained_variance"]
    return (
        name,
        rate.strip(),
        _number(of["tokens"]["iqm"], ",.0f"),
        f"{_number(of['tokens']['low'], ',.0f')} to {_number(of['tokens']['high'], ',.0f')}",
        _number(of["seconds"]["iqm"], ",.0f"),
        f"{of['reached']} of {len(of['seeds'])}",
        _interval(of["final_sampled"], ".3f"),
        f"{explained['iqm']:.2f}" if explained else "",
    )


def _ratio_lines(found: Figures) -> list[str]:
    lines = []
    if "tokens_over_best_critic_free" in found:
        against = f"the best without a critic, {found['best_critic_free']}"
        if found["best_critic_free"] is None:
            against = "the best without a critic (none got there)"
        lines.append(f"  tokens of ppo over those of {against}: {_of_ratio(found['tokens_over_best_critic_free'])}")
    for what in ("tokens", "seconds"):
        if f"{what}_over_trl" in found:
            lines.append(f"  {what} of ppo over those of TRL: {_of_ratio(found[f'{what}_over_trl'])}")
    return lines


def _of_ratio(found: Figures) -> str:
    ratio = found["ratio"]
    if math.isnan(ratio):
        return "unknown, as neither got there"
    if math.isinf(ratio):
        return "ppo did not get there"
    if ratio == 0:
        return "only ppo got there"
    if math.isnan(found["low"]):
        return f"{ratio:.2f} (no interval: in some of the resampled runs neither gets there)"
    return f"{ratio:.2f} [{_number(found['low'], '.2f')}, {_number(found['high'], '.2f')}]"


def _interval(of: Figures, form: str) -> str:
    return f"{of['iqm']:{form}} [{of['low']:{form}}, {of['high']:{form}}]"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "never"
