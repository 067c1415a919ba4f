"""Checkpoints: they give back what was saved, and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agents.state.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from llm_env.models import load_model
from tests.agents.state.test_saved import assert_same


def small(step: int, value: float = 0.5) -> Checkpoint:
    tensors = {"model": {"w": torch.full((3, 2), value), "b": torch.arange(4)}, "critic": {"w": torch.tensor(value)}}
    return Checkpoint(step, tensors, {"kl": {"beta": 0.1}, "order": [1, 2], "best": None})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_survive_exactly(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    tensors = {
        "embedding": shared,
        "head": shared,  # tied
        "transposed": shared.T,  # the same memory, seen otherwise
        "row": shared[1],
        "rows": shared[:2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "bool": torch.tensor([True, False]),
        "integer": torch.tensor(2**62 + 1),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "nothing": torch.empty(0, 3),
        "nothing.too": torch.empty(0, 3),
    }
    path = save_checkpoint(tmp_path, Checkpoint(7, {"model": tensors, "empty": {}}, {}), keep=1)
    assert path == tmp_path / "step-00000007"
    assert names(path) == ["empty.safetensors", "manifest.json", "model.safetensors", "state.json"]
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.folder, loaded.state, set(loaded.tensors)) == (7, path, {}, {"model", "empty"})
    assert_same(tensors, loaded.tensors["model"])
    assert loaded.tensors["empty"] == {}
    assert loaded.tensors["model"]["head"] is loaded.tensors["model"]["embedding"]  # stored once
    assert (path / "model.safetensors").stat().st_size < 3000


def test_a_tied_language_model_survives(tmp_path: Path) -> None:
    model = load_model("tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, Checkpoint(0, {"model": model.state_dict()}), keep=1)
    for parameter in model.parameters():
        parameter.data.zero_()
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None
    model.load_state_dict(found.tensors["model"])
    assert_same(before, model.state_dict())


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save_checkpoint(tmp_path, small(1), keep=0)
    with pytest.raises(ValueError, match="step must lie in"):
        save_checkpoint(tmp_path, small(-1), keep=1)
    with pytest.raises(ValueError, match="the name 'a/b' of tensors becomes a file's"):
        save_checkpoint(tmp_path, Checkpoint(1, {"a/b": {}}), keep=1)
    assert names(tmp_path) == [], "a save that failed leaves nothing"


def test_older_ones_are_deleted(tmp_path: Path) -> None:
    for step in (1, 5, 10, 100):
        save_checkpoint(tmp_path, small(step, value=step), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    found, refused = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, float(found.tensors["critic"]["w"]), refused) == (100, 100.0, [])
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])


def test_a_step_that_exists_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small(3, 1.0), keep=2)
    save_checkpoint(tmp_path, small(3, 2.0), keep=2)
    assert names(tmp_path) == ["step-00000003"]
    assert float(load_checkpoint(tmp_path / "step-00000003").tensors["critic"]["w"]) == 2.0


def test_later_torn_ones_do_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    """A run that goes on from step 1, because 2 to 4 are torn."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, small(step), keep=9)
    for step in (2, 3, 4):
        (tmp_path / f"step-0000000{step}" / "state.json").unlink()
    save_checkpoint(tmp_path, small(2, 7.0), keep=1)
    found, refused = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, float(found.tensors["critic"]["w"]), len(refused)) == (2, 7.0, 2)


def test_left_overs_of_dead_runs_are_cleaned_up(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small(1), keep=2)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".saving-step-00000009-0")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".deleted-step-00000009-0")
    (tmp_path / "notes.txt").write_text("mine")
    found, refused = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, refused) == (1, []), "they are never read"
    save_checkpoint(tmp_path, small(2), keep=2)
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-00000002"]


def test_killed_while_replacing(tmp_path: Path) -> None:
    """Between the two renames only the old one is there, under its hidden name: it is used, and put back."""
    save_checkpoint(tmp_path, small(3, 1.0), keep=2)
    (tmp_path / "step-00000003").rename(tmp_path / ".replaced-step-00000003")
    found, refused = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, refused) == (3, [])
    save_checkpoint(tmp_path, small(4), keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = ["manifest.json", "state.json", "model.safetensors", "critic.safetensors"]


@pytest.mark.parametrize("harm", [truncate, flip_a_byte, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_torn_ones_are_refused_and_the_previous_one_is_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    save_checkpoint(tmp_path, small(1), keep=2)
    newest = save_checkpoint(tmp_path, small(2), keep=2)
    assert names(newest) == sorted(FILES)
    harm(newest / name)
    kind = "foreign" if (name, harm) == ("manifest.json", Path.unlink) else "torn"
    with pytest.raises(CheckpointError, match=f"step-00000002 is {kind}.*{name}"):
        load_checkpoint(newest)
    found, refused = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(refused) == 1
    assert f"step-00000002 is {kind}" in refused[0]


def test_no_byte_of_a_manifest_can_change(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, small(1), keep=1) / "manifest.json"
    whole = path.read_bytes()
    expected = json.loads(whole)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            load_checkpoint(path.parent)
        except CheckpointError:
            continue
        assert json.loads(path.read_bytes()) == expected, "only white space may differ"


def test_foreign_ones_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small(1), keep=9)
    other = tmp_path / "step-00000002"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"foreign: it has no manifest\.json"):
        load_checkpoint(other)
    for text in ('{"format": "pickled"}', "[]"):
        (other / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"foreign: its manifest\.json does not say"):
            load_checkpoint(other)
    (tmp_path / "step-00000003").write_text("a file")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000004")
    with pytest.raises(CheckpointError, match="foreign: it holds step 1; was it renamed"):
        load_checkpoint(tmp_path / "step-00000004")
    found, refused = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [text.split(" is ")[0][-1] for text in refused] == ["4", "3", "2"]
    assert all("foreign" in text for text in refused)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "keep-this-one")
    assert load_checkpoint(tmp_path / "keep-this-one").step == 1, "under a name of your own"


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, small(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(CheckpointError, match="has format version 2, this llm-env reads 1"):
        load_checkpoint(path)


EVERY_KILL = """
import itertools, os, shutil, sys, torch
from pathlib import Path
from agents.state.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
countdown = None

def die(event, _):
    # Before whatever changes a folder, or opens a file.
    global countdown
    if countdown is not None and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        countdown -= 1
        if countdown < 0:
            os._exit(9)

def checkpoint(step, value):
    return Checkpoint(step, {"model": {"w": torch.full((9,), float(value))}}, {"value": value})

sys.addaudithook(die)
root = Path(sys.argv[1])
for before, step, keep in (([], 1, 1), ([1, 2, 3], 4, 2), ([1], 1, 1)):
    for place in itertools.count():
        folder = root / f"{before}-{step}-{keep}-{place}"
        for old in before:
            save_checkpoint(folder, checkpoint(old, old), keep=9)
        child = os.fork()
        if not child:
            countdown = place
            save_checkpoint(folder, checkpoint(step, 10), keep)
            os._exit(0)
        done = os.waitpid(child, 0)[1] == 0
        found, refused = latest_checkpoint(folder)
        seen = None if found is None else (found.step, found.state["value"], float(found.tensors["model"]["w"][8]))
        old = (before[-1],) * 3 if before else None
        assert refused == [] and seen in (old, (step, 10, 10.0)), (folder, refused, seen)
        for path in folder.glob("step-*"):
            load_checkpoint(path)  # none in sight is torn, the older ones included
        save_checkpoint(folder, checkpoint(9, 9), keep=1)
        assert os.listdir(folder) == ["step-00000009"], (folder, os.listdir(folder))
        if done:
            assert seen == (step, 10, 10.0)
            break
    print(place, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_before_every_change_of_the_disk(tmp_path: Path) -> None:
    """Saving a first one, a further one with older ones to delete, and one that is there already."""
    command = [sys.executable, "-W", "ignore", "-c", EVERY_KILL, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    places = [int(line) for line in process.stdout.split()]
    assert len(places) == 3
    assert min(places) > 10, "so many kills were there in each case"


SAVER = """
import sys, torch
from pathlib import Path
from agents.state.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
torch.set_num_threads(1)
found, _ = latest_checkpoint(folder)
step = found.step if found else 0
print("ready", flush=True)
while True:
    step += 1
    for again in range(2):  # the second one replaces the first
        tensors = {name: {"w": torch.full((200_000,), float(step))} for name in ("model", "critic", "optimizer")}
        save_checkpoint(folder, Checkpoint(step, tensors, {"step": step}), keep=1)
    print(step, flush=True)
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    before = 0
    interrupted = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        saved = [before, *map(int, process.stdout.read().split())]
        process.wait()
        interrupted += any(name.startswith(".") for name in names(tmp_path))
        found, refused = latest_checkpoint(tmp_path)
        assert refused == []
        if found is None:
            assert saved == [0]
            continue
        assert found.step in (saved[-1], saved[-1] + 1), "the last one that was saved, or the one being saved"
        assert found.state == {"step": found.step}
        for tensors in found.tensors.values():
            assert torch.equal(tensors["w"], torch.full((200_000,), float(found.step)))
        before = found.step
    assert before > 0
    assert interrupted > 0, "no kill came in the middle of saving: this test shows nothing"
