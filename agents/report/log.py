"""What a run writes down: metrics and sample texts as JSON lines; TensorBoard and Weights & Biases by flag."""

from __future__ import annotations

import importlib
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from agents.config import LogConfig
from llm_env.files import replace_file

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TOKENS = "tokens.jsonl"
WARNINGS = "warnings.jsonl"
MACHINE = "machine.json"
WANDB_ID = "wandb_id.txt"

Sample = Mapping[str, Any]
"""A text that the policy wrote: `prompt`, `transcript`, `reward`, and whatever else is worth keeping."""


class RunLog:
    """The log of a run in its folder, one line an iteration.

    Every line is strict JSON: numbers that are not finite become null, as JSON has no word for them. Lines reach the
    operating system before `write` returns, so a killed process loses none but the one it was writing. Write an
    iteration's line before its checkpoint: a resumed run removes what the checkpoint does not know, and then goes on
    as if never stopped.

    Args:
        out: the run's folder.
        config: where else to log to.
        resume_from: the last iteration that is kept; lines of later ones, and a torn last line, are removed. None
            begins a new log: one that is there already is renamed to `metrics.jsonl.old`.
        run_name: what Weights & Biases calls the run; by default the folder's name.
        settings: the run's configuration as plain values, for Weights & Biases.
        machine: what computes it, and the versions of what it is made of.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with RunLog(folder, LogConfig()) as log:
        ...     log.write({"iteration": 1, "reward/mean": 0.25, "value/explained_variance": float("nan")})
        >>> (folder / "metrics.jsonl").read_text()
        '{"iteration": 1, "reward/mean": 0.25, "value/explained_variance": null}\\n'
        >>> read_metrics(folder)
        [{'iteration': 1.0, 'reward/mean': 0.25, 'value/explained_variance': nan}]
    """

    def __init__(
        self,
        out: Path,
        config: LogConfig,
        resume_from: int | None = None,
        run_name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        machine: Mapping[str, str] | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._writers: list[_Writer] = []
        # First those that may be missing: an error must not cost the lines of the run before.
        if config.tensorboard:
            self._writers.append(_TensorBoard(out, resume_from))
        if config.wandb:
            self._writers.append(_WandB(out, config.wandb_project, resume_from, run_name or out.name, settings or {}))
        for name in (METRICS, SAMPLES, TOKENS, WARNINGS):
            _begin(out / name, resume_from)
        if machine:
            with replace_file(out / MACHINE) as new:
                new.write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")
        self._out = out

    def write(
        self,
        metrics: Mapping[str, float],
        samples: Sequence[Sample] | None = None,
        tokens: Sequence[Sample] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Add one iteration. `metrics` names its `iteration`; lines of samples, texts and warnings get that, too."""
        if "iteration" not in metrics:
            raise KeyError(f"metrics must have an 'iteration', got only {sorted(metrics)}")
        iteration = int(metrics["iteration"])
        # Samples first: whoever sees the line of an iteration can count on its samples.
        _append(self._out / SAMPLES, [{"iteration": iteration, **sample} for sample in samples or ()])
        if tokens:
            _append(self._out / TOKENS, [{"iteration": iteration, **row} for row in tokens])
        if warnings:
            _append(self._out / WARNINGS, [{"iteration": iteration, "warning": said} for said in warnings])
        _append(self._out / METRICS, [{name: _number(value) for name, value in metrics.items()}])
        for writer in self._writers:
            writer.write(iteration, metrics, samples or ())

    def close(self) -> None:
        """Close what TensorBoard and W&B have open. Doing it twice is harmless."""
        while self._writers:
            self._writers.pop().close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The metrics of a run so far, one dict an iteration; null reads as NaN, a torn last line is left out."""
    path = out / METRICS
    if not path.exists():
        return []
    return [
        {name: math.nan if value is None else float(value) for name, value in row.items()} for _, row in _rows(path)
    ]


def read_lines(out: Path, name: str) -> list[dict[str, Any]]:
    """What else a run has written down so far: SAMPLES, TOKENS or WARNINGS."""
    path = out / name
    return [row for _, row in _rows(path)] if path.exists() else []


def read_machine(out: Path) -> dict[str, str]:
    """What the run was computed with, if it is known."""
    path = out / MACHINE
    return {str(name): str(value) for name, value in json.loads(path.read_text()).items()} if path.exists() else {}


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a JSONL file, with what they say; what a kill or a power cut has torn is passed over."""
    # In bytes, as str.splitlines would also break at characters that may occur within a text.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "iteration" in row:
            yield line, row


def _begin(path: Path, resume_from: int | None) -> None:
    if not path.exists():
        return
    if resume_from is None:
        if path.stat().st_size:
            path.replace(path.with_name(path.name + ".old"))
        return
    kept = b"".join(line + b"\n" for line, row in _rows(path) if row["iteration"] <= resume_from)
    with replace_file(path) as new:
        new.write_bytes(kept)


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "ab") as file:
        file.write(b"".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate has no UTF-8; "backslashreplace" writes it as JSON's own escape.
    text = json.dumps(_strict(row), ensure_ascii=False, allow_nan=False, default=str)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _number(value: float) -> float | int:
    return value if isinstance(value, int) else float(value)


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return value


class _Writer(Protocol):
    def write(self, iteration: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Add one iteration."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    def __init__(self, out: Path, resume_from: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "log.tensorboard needs TensorBoard: pip install tensorboard (or leave --log.tensorboard out)"
            ) from error
        # From this step on, TensorBoard hides what earlier processes wrote into the folder.
        first = 0 if resume_from is None else resume_from + 1
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first)

    def write(self, iteration: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), iteration)
        if samples:
            # Indented by four: Markdown shows it as it is.
            text = "\n\n".join(
                "\n".join(f"    {line}" for line in json.dumps(dict(sample), indent=1, default=str).split("\n"))
                for sample in samples
            )
            self._writer.add_text("samples", text, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A resumed run goes on in the same W&B run. W&B keeps what it has of a step: it is not written twice."""

    def __init__(
        self, out: Path, project: str, resume_from: int | None, run_name: str, settings: Mapping[str, Any]
    ) -> None:
        try:
            self._wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                "log.wandb needs Weights & Biases: pip install wandb (or leave --log.wandb out)"
            ) from error
        kept = out / WANDB_ID
        if resume_from is None or not kept.exists():
            with replace_file(kept) as new:
                new.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run = self._wandb.init(
            project=project,
            name=run_name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(out),
            config=dict(settings),
        )

    def write(self, iteration: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        row: dict[str, Any] = dict(metrics)
        if samples:
            columns = list(dict.fromkeys(name for sample in samples for name in sample))
            # As text: a W&B table wants one type a column.
            data = [[str(sample.get(name, "")) for name in columns] for sample in samples]
            row["samples"] = self._wandb.Table(columns=columns, data=data)
        self._run.log(row, step=iteration)

    def close(self) -> None:
        self._run.finish()
