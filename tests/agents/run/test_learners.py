"""Several processes that learn one policy together, against one that learns it alone."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.config import TrainConfig
from agents.config.files import ConfigError, load_config
from agents.metrics import Average
from agents.networks.ranks import ALONE, Ranks, together
from agents.report.log import read_metrics
from agents.run.learners import check_shareable
from agents.run.loop import CHECKPOINTS
from agents.run.training import WARM, train
from agents.run.warm_start import SFT_CHECKPOINTS
from agents.state.checkpoint import latest_checkpoint
from tests.agents.killed import newest_step
from tests.agents.runs import Config

ROOT = Path(__file__).parents[3]
KINDS = {
    # Everything at once that lies in parts: adapters of two roles, a reference, masters in float32, a bounded step.
    "adapters": {"model__lora__rank": 2, "model__critic": "separate", "kl__beta": 0.05, "loss__target_kl": 0.01},
    "whole": {"model__critic": "shared", "kl__beta": 0.05, "model__refresh_reference": 2, "actor__micro_batch_size": 2},
    "fitted": {"model__critic": "fitted", "model__hints": True, "loss__target_kl": 1e-4},
}
COPY = {"task__name": "Copy", "task__args": {"length": 2, "alphabet": "abcd", "dense": True}}
# Five texts for two processes, one of which reads more.
KINDS["warm"] = {**COPY, "sft__steps": 4, "sft__batch_size": 5, "sft__learning_rate": 1e-3, "iterations": 1}


def start(runs: list[tuple[TrainConfig, bool]], folder: Path) -> subprocess.Popen[str]:
    """Two processes that do some runs, one after the other."""
    path = folder / "runs.pickle"
    path.write_bytes(pickle.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/agents/together.py")
    return subprocess.Popen(
        [*command, script, str(path)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def both(runs: list[tuple[TrainConfig, bool]], folder: Path) -> None:
    """The same, to their end."""
    process = start(runs, folder)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.terminate()  # torchrun then ends those that it has started
    assert process.returncode == 0, output


def saved(config: TrainConfig) -> dict[str, dict[str, Tensor]]:
    """The tensors of the last checkpoint."""
    checkpoint, _ = latest_checkpoint(config.out / CHECKPOINTS)
    assert checkpoint is not None
    return checkpoint.tensors


def agree(one: TrainConfig, other: TrainConfig) -> None:
    """Weights, optimizers and metrics of two runs are the same."""
    ours, theirs = saved(one), saved(other)
    if one.sft.steps:
        warm = [{WARM: load_file(each.out / WARM / "model.safetensors")} for each in (one, other)]
        ours, theirs = warm[0] | ours, warm[1] | theirs
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            near = 1e-6 * max(1.0, float(tensor.abs().max())) if tensor.numel() else 0.0  # some are sums of thousands
            torch.testing.assert_close(theirs[file][name], tensor, atol=near, rtol=0.0, msg=f"{file}: {name}")
    rows = read_metrics(one.out)
    assert len(rows) == one.iterations + 1
    for row, their in zip(rows, read_metrics(other.out), strict=True):
        assert row.keys() == their.keys()
        for name, value in row.items():
            if not name.startswith(("time", "speed")):
                assert their[name] == pytest.approx(value, abs=1e-5, rel=1e-3), name


def apart(config: TrainConfig, name: str, **changes: object) -> TrainConfig:
    """The same in a folder of its own."""
    return config.replace(out=config.out.with_name(name), **changes)


def test_two_learn_what_one_learns(config: Config, tmp_path: Path) -> None:
    """Runs of all kinds of weights; and a checkpoint of two processes is gone on with by one, and the other way.

    Whole weights are those of the runs that are killed, below.
    """
    kinds = {name: config(**changes) for name, changes in KINDS.items() if name != "whole"}
    measured = apart(config(iterations=1, model__autocast="auto"), "measured")
    short = config(iterations=2, **KINDS["adapters"])
    alone, together = apart(short, "begun-alone"), apart(short, "begun-together")
    train(alone)
    runs = [(apart(each, f"{name}-2"), False) for name, each in kinds.items()]
    both([*runs, (measured, False), (together, False), (alone.replace(iterations=3), True)], tmp_path)
    train(together.replace(iterations=3), resume=True)
    for name, each in kinds.items():
        one = apart(each, f"{name}-1")
        train(one)
        assert any(row["policy/gradient_norm"] > 0 for row in read_metrics(one.out)[1:])
        agree(one, apart(each, f"{name}-2"))
    whole = apart(kinds["adapters"], "adapters-1")
    agree(whole, alone.replace(iterations=3))
    agree(whole, together.replace(iterations=3))
    assert load_config(measured.out / "config.yaml").model.autocast in ("off", "on")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "folder"), [(0, CHECKPOINTS), (1, CHECKPOINTS), (1, SFT_CHECKPOINTS)])
def test_of_a_run_whose_process_was_killed_nothing_is_lost(
    config: Config, tmp_path: Path, victim: int, folder: str
) -> None:
    what = {**KINDS["whole"], "iterations": 12}
    if folder == SFT_CHECKPOINTS:
        what = {**KINDS["warm"], "sft__steps": 12, "sft__checkpoint_every": 1}
    undisturbed = apart(config(**what), "undisturbed")
    killed = apart(undisturbed, "killed")
    train(undisturbed)
    process = start([(killed, False)], tmp_path)
    while newest_step(killed.out / folder) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(sorted(map(int, children.stdout.split()))[victim], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert newest_step(killed.out / folder) < 12
    both([(killed, True)], tmp_path)
    agree(undisturbed, killed)


def test_work_that_cannot_be_shared_is_refused(config: Config) -> None:
    check_shareable(config(rollout__batch_size=16), 4)
    with pytest.raises(ConfigError, match=r"--rollout.batch-size is 16 and --actor.minibatches 2, .* multiple of 6"):
        check_shareable(config(rollout__batch_size=16), 3)
    with pytest.raises(ConfigError, match=r"--model.refresh-reference is 2"):
        check_shareable(config(model__refresh_reference=2, model__lora__rank=2, kl__beta=0.1), 2)
    with pytest.raises(ConfigError, match=r"--model.compile"):
        check_shareable(config(model__compile=True), 2)
    with pytest.raises(ConfigError, match=r"--sft.batch-size is 3, but there are 4 processes"):
        check_shareable(config(sft__steps=1, sft__batch_size=3), 4)
    check_shareable(config(rollout__batch_size=3, sft__steps=1, sft__batch_size=5), 4, supervised=True)
    check_shareable(config(rollout__engine="vllm", workers=1), 2)
    with pytest.raises(ConfigError, match=r"--rollout.engine is vllm .* --workers 1"):
        check_shareable(config(rollout__engine="vllm"), 2)
    with pytest.raises(ConfigError, match=r"--device is cuda:1"):
        check_shareable(config().replace(device="cuda:1"), 2)


def test_the_metrics_of_all_are_put_together() -> None:
    everything, first, second = Average(), Average(), Average()
    for average in (everything, first):
        average.add({"policy/entropy": 1.0, "ratio/max": 2.0, "ratio/min": 0.5}, tokens=1)
    for average in (everything, second):
        average.add({"policy/entropy": 4.0, "ratio/max": 1.0, "ratio/min": 0.25}, tokens=3)
    first.join(second)
    assert first.means() == everything.means() == {"policy/entropy": 3.25, "ratio/max": 2.0, "ratio/min": 0.25}


def test_what_is_asked_for_is_done_once_however_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process asks for the outer call only: what that calls in turn, the others call by themselves."""
    ranks, said = Ranks(), []
    ranks.size = 2
    monkeypatch.setattr(ranks, "say", said.append)

    class Adder:
        def __init__(self) -> None:
            self.ranks = ranks

        @together
        def outer(self, number: int, *, more: int = 0) -> int:
            return self.inner(number) + more

        @together
        def inner(self, number: int) -> int:
            if number < 0:
                raise ValueError("negative")
            return number + 1

    ranks.parts["adder"] = adder = Adder()
    assert adder.outer(1, more=5) == 7
    [asked] = said
    assert (asked.part, asked.method, asked.args, asked.options) == ("adder", "outer", (1,), {"more": 5})
    ranks.dismiss("the end")
    assert said[1:] == ["the end"]
    with pytest.raises(ValueError, match="negative"):
        adder.outer(-1)
    ranks.dismiss("nobody listens")
    assert len(said) == 3
    assert ALONE.gather(3) == [3]


def test_others_get_the_shapes_of_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers come in parts; what a step counts, and batches, come as they are."""
    ranks, said = Ranks(), []
    ranks.size = 2
    monkeypatch.setattr(ranks, "say", lambda message: said.append(pickle.dumps(message)))

    class Holder:
        def __init__(self) -> None:
            self.ranks = ranks

        @together
        def load(self, weights: dict[str, dict[str, Tensor]], batch: Tensor) -> None: ...

    ranks.parts["holder"] = holder = Holder()
    large = torch.ones(1000, 1000, dtype=torch.bfloat16)
    holder.load({"actor": {"large": large, "steps": torch.tensor(3.0)}}, torch.ones(2))
    assert len(said[0]) < 10_000
    weights, batch = pickle.loads(said[0]).args
    assert (weights["actor"]["large"].shape, weights["actor"]["large"].dtype) == (large.shape, large.dtype)
    assert weights["actor"]["steps"] == 3
    assert batch.tolist() == [1, 1]


def test_if_the_first_fails_in_what_all_do_it_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, said = Ranks(), []
    monkeypatch.setattr(ranks, "say", said.append)
    with pytest.raises(MemoryError), ranks.as_one():
        raise MemoryError
    ranks.dismiss()
    assert not said
    with ranks.as_one():
        pass
    ranks.dismiss("the end")
    assert said == ["the end"]
