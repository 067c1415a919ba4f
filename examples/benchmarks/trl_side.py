"""TRL's PPO trainer for the benchmarks, in a virtual environment and a process of its own.

    with TRLWorker() as trl:
        trl.setup(model=str(folder), prompts=ids, response_length=16, batch_size=64, epochs=1)
        print(trl.iterate()["seconds"])

TRL took its PPO out in 1.13, and what 1.12 needs shall not meet what we need: hence its own environment. It gets the
very torch and transformers that run here, so that a comparison is one of trainers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("trl_worker.py")
TRL = "trl==1.12.*"


def trl_python(folder: Path | None = None) -> Path:
    """The Python of an environment with TRL, which is made if need be (a minute or two).

    Args:
        folder: of the environment; by default `trl-1.12` in our cache, which LLM_ENV_CACHE may move.
    """
    cache = Path(os.environ.get("LLM_ENV_CACHE") or "~/.cache/llm_env").expanduser()
    folder = folder or cache / "trl-1.12"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = [f"torch=={version('torch')}", f"transformers=={version('transformers')}", TRL]
    if python.exists() and stamp.exists() and stamp.read_text().split() == wanted:
        return python
    print(f"making an environment for TRL in {folder} ...", file=sys.stderr)
    torch, transformers, trl = wanted
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], "make a virtual environment")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    try:
        _run([*pip, torch], f"install {torch}")
    except RuntimeError:
        if "+" not in torch:
            raise
        torch = torch.partition("+")[0]  # a build such as 2.13.0+cpu is not on every index
        _run([*pip, torch], f"install {torch}")
    _run([*pip, torch, transformers, trl], f"install {trl}")
    stamp.write_text("\n".join(wanted))
    return python


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(
            f"could not {what} for TRL's side of the benchmark.\n{_tail(done.stdout)}\n"
            f"The command was: {' '.join(command)}\nIt needs the network or a package index; "
            "without them, run the benchmark without TRL"
        )


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


class TRLWorker:
    """A process that runs `trl_worker.py`, which lists what it can be asked. Start it before an engine binds threads.

    Args:
        python: that of an environment with TRL; by default `trl_python()`.
    """

    def __init__(self, python: Path | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
        environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [str(python or trl_python()), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.ready = self._reply("start")

    def setup(self, **settings: Any) -> None:
        """Begin a run; see `Setup` in trl_worker.py for what it takes."""
        self.ask("setup", **settings)

    def iterate(self) -> dict[str, Any]:
        """One PPO iteration: seconds (and those of rollout, score, update), tokens generated so far, reward_mean."""
        return self.ask("iterate")

    def evaluate(self, prompts: list[list[int]], answers: list[list[int]], *, greedy: bool, seed: int = 0) -> float:
        """The share of prompts after which the policy writes the answer and ends."""
        accuracy: float = self.ask("evaluate", prompts=prompts, answers=answers, greedy=greedy, seed=seed)["accuracy"]
        return accuracy

    def memory(self) -> dict[str, float]:
        """Resident memory in MB: peak_rss_mb, and start_rss_mb after imports, before any model."""
        return self.ask("memory")

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        try:
            self._send(cmd, **arguments)
        except (BrokenPipeError, ValueError):
            self._fail(cmd)
        return self._reply(cmd)

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            try:
                self._send("quit")
                self._process.wait(timeout=5)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):  # of words that a dead process did not take
                stream and stream.close()

    def __enter__(self) -> TRLWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, cmd: str, **arguments: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"cmd": cmd, **arguments}) + "\n")
        self._process.stdin.flush()

    def _reply(self, to: str) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._fail(to)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self, doing: str) -> None:
        if self._errors.closed:
            raise RuntimeError(f"TRL's process was asked to {doing} after it was closed: start another")
        code = self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(
            f"TRL's process ended (exit code {code}) when asked to {doing}. It last said:\n{_tail(self._errors.read())}"
        )
