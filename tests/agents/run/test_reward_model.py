"""Reward models from the command line to a run that is rewarded by them."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agents import TrainConfig, build, train
from agents.cli import main
from rewards import Reward, Rollout, Score, make_reward, register_reward
from rewards.reward_model import Member, RewardModel
from tests.agents.runs import save_small_model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with more of the letter a are preferred."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        worse, better = sorted(
            ("".join(rng.choice(list("abc"), 4)) for _ in range(2)), key=lambda text: text.count("a")
        )
        if worse.count("a") < better.count("a"):
            rows.append({"prompt": f"{number}: ", "chosen": better, "rejected": worse})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(pairs: Path, out: Path, *more: str) -> list[str]:
    rest = ["--epochs", "4", "--batch-size", "8", "--learning-rate", "1e-3", "--max-length", "32", *more]
    return ["reward-model", "--pairs", str(pairs), "--out", str(out), *rest]


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "rm"
    assert main(command(pairs, out, "--members", "2")) == 0
    return out


def texts(*given: str) -> list[Rollout]:
    return [Rollout.of(text, prompt="7: ") for text in given]


def test_each_member_is_a_folder_that_transformers_loads(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["member-1", "member-2", "settings.json"]
    for member in ("member-1", "member-2"):
        found = json.loads((trained / member / "reward-model.json").read_text())
        assert found["accuracy"] > 0.8
        model = AutoModelForSequenceClassification.from_pretrained(trained / member)
        tokenizer = AutoTokenizer.from_pretrained(trained / member)
        values = [
            float(model(**tokenizer(f"7: {text}", return_tensors="pt")).logits.detach()) for text in ("aaaa", "bcbc")
        ]
        ours = [score.value for score in RewardModel(str(trained / member))(texts("aaaa", "bcbc"))]
        mean, deviation = model.config.reward_mean, model.config.reward_deviation
        assert ours == pytest.approx([(value - mean) / deviation for value in values], rel=1e-4)
        assert ours[0] > 0 > ours[1]


def test_members_have_learned_from_pairs_of_their_own(trained: Path) -> None:
    found = [json.loads((trained / name / "reward-model.json").read_text()) for name in ("member-1", "member-2")]
    assert found[0]["held_out"] == found[1]["held_out"]
    assert abs(found[0]["pairs"] - found[1]["pairs"]) <= 1
    weights = [load_file(trained / name / "model.safetensors") for name in ("member-1", "member-2")]
    assert not torch.equal(*(each["score.weight"] for each in weights))


@pytest.mark.parametrize(("how", "k"), [("mean", 0.0), ("min", 0.0), ("mean-std", 1.5)])
def test_an_ensemble_is_what_its_members_make_of_it(trained: Path, how: Any, k: float) -> None:
    given = texts("aaaa", "abab", "cccc")
    members = np.array([
        [score.value for score in RewardModel(str(trained / name))(given)] for name in ("member-1", "member-2")
    ])  # fmt: skip
    expected = {
        "mean": members.mean(0), "min": members.min(0), "mean-std": members.mean(0) - k * members.std(0),
    }[how]  # fmt: skip
    scores = make_reward("reward_model", {"path": str(trained), "how": how, "k": k})(given)
    assert [score.value for score in scores] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [score.parts["disagreement"] for score in scores] == pytest.approx(members.std(0), rel=1e-3, abs=1e-5)


def test_models_that_are_kept_elsewhere_come_to_score(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = texts("ab", "cdcd")
    kept = pickle.loads(pickle.dumps(RewardModel(str(trained), device="meta", offload=True)))
    assert kept.device == "meta"
    assert {weight.device.type for member in kept.members for weight in member.model.parameters()} == {"cpu"}
    seen = []
    monkeypatch.setattr(Member, "values", lambda self, *_: seen.append(self.model.device.type) or np.zeros(2))
    kept(given)
    assert set(seen) == {"meta"}
    monkeypatch.undo()
    there = RewardModel(str(trained), device="cpu", offload=True)(given)
    assert there == RewardModel(str(trained), device="cpu")(given)


def test_one_model_of_the_means_of_their_weights(trained: Path) -> None:
    """Weights by hand; the members themselves stay as they are on disk."""
    members = [load_file(trained / f"member-{number}" / "model.safetensors") for number in (1, 2)]
    averaged = RewardModel(str(trained), how="weights")
    (one,) = averaged.members
    for name, weight in one.model.named_parameters():
        mean = torch.stack([member[name] for member in members]).mean(0)
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-5, atol=1e-6)
    assert one.deviation == pytest.approx(np.mean([each.deviation for each in RewardModel(str(trained)).members]))
    assert "disagreement" not in averaged([Rollout.of("a", "?")])[0].parts
    assert len(RewardModel(str(trained), how="weights", held_out=True).members) == 2


def test_members_begin_with_models_of_their_own(pairs: Path, tmp_path: Path) -> None:
    models = [str(save_small_model(tmp_path / name, seed=seed)) for name, seed in (("one", 1), ("other", 2))]
    out = tmp_path / "rm"
    arguments = command(pairs, out, "--members", "3", "--models", *models, "--learning-rate", "1e-9", "--epochs", "1")
    assert main(arguments) == 0
    name = "model.embed_tokens.weight"
    one, other, again = (load_file(out / f"member-{number}" / "model.safetensors")[name] for number in (1, 2, 3))
    for member, model in ((one, models[0]), (other, models[1]), (again, models[0])):
        torch.testing.assert_close(member, load_file(f"{model}/model.safetensors")[name], rtol=0, atol=1e-6)
    given = texts("aaaa", "cccc")
    assert RewardModel(str(out), how="mean")(given)[0].parts["disagreement"] > 0
    with pytest.raises(ValueError, match="have not begun with the same ones: use how='mean'"):
        RewardModel(str(out), how="weights")(given)


@pytest.mark.parametrize("how", ["--lora-rank 4", "--head-only"])
def test_members_that_are_alike_are_in_memory_once(pairs: Path, tmp_path: Path, how: str) -> None:
    """And say what each says by itself, on disk as it was."""
    line = (
        f"reward-model --pairs {pairs} --members 3 --batch-size 12 --learning-rate 3e-3 {how} --out {tmp_path / 'rm'}"
    )
    assert main(line.split()) == 0
    folders = [tmp_path / "rm" / f"member-{number}" for number in (1, 2, 3)]
    given = texts("aaaa", "abab", "cccc", "b")
    alone = [RewardModel(str(folder)) for folder in folders]
    expected = np.array([[score.value for score in reward(given)] for reward in alone])
    assert np.abs(expected[0] - expected[1]).max() > 1e-3

    def held(members: list[Any]) -> int:
        weights = [weight for member in members for weight in member.model.parameters()]
        return sum({weight.data_ptr(): weight.numel() for weight in weights}.values())

    ensemble = RewardModel([str(folder) for folder in folders], how="mean")
    scores = ensemble(given)
    assert [score.value for score in scores] == pytest.approx(expected.mean(0), rel=1e-3, abs=1e-4)
    assert [score.parts["disagreement"] for score in scores] == pytest.approx(expected.std(0), rel=1e-2, abs=1e-4)
    assert [score.value for score in ensemble(given)] == [score.value for score in scores]  # whichever was used last
    one = held(alone[0].members)
    assert held([member for reward in alone for member in reward.members]) == 3 * one
    assert held(ensemble.members) < 1.3 * one

    half = RewardModel([str(folder) for folder in folders], how="mean", dtype="bfloat16")(given)
    assert [score.value for score in half] == pytest.approx(expected.mean(0), abs=0.2)
    mixed = RewardModel([str(folders[0]), str(folders[2]), str(folders[1])], how="mean", held_out=True)(given)
    assert [score.parts["held_out"] for score in mixed] == pytest.approx(expected[1], rel=1e-3, abs=1e-4)


def test_adapters_over_other_weights_are_loaded_apart(pairs: Path, tmp_path: Path) -> None:
    folders = []
    for seed in ("0", "1"):  # the last layers begin with other weights
        folders.append(tmp_path / seed / "member-1")
        line = f"reward-model --pairs {pairs} --lora-rank 2 --batch-size 12 --seed {seed} --out {tmp_path / seed}"
        assert main(line.split()) == 0
    members = RewardModel([str(folder) for folder in folders]).members
    assert [member.adapter for member in members] == [None, None]


def test_steps_are_paid_what_they_add(trained: Path) -> None:
    """Each where it ends; the value of the text so far is what the model gives a text that is no longer."""
    whole, by_step = RewardModel(str(trained)), RewardModel(str(trained), steps="|")
    text = "ab|cd|e"
    values = [score.value for score in whole([Rollout.of(text[:end], "?") for end in (3, 6, 7)])]
    found, nothing = by_step([Rollout.of(text, "?"), Rollout.of("", "?")])
    assert found.per_token is not None
    assert found.per_token.nonzero()[0].tolist() == [2, 5, 6]
    assert found.per_token[[2, 5, 6]].tolist() == pytest.approx([values[0], *np.diff(values)], abs=1e-5)
    assert found.total == pytest.approx(values[-1], abs=1e-5)
    assert found.parts["steps"] == 3
    assert nothing.value == pytest.approx(whole([Rollout.of("", "?")])[0].value, abs=1e-5)
    with pytest.raises(ValueError, match="steps is empty"):
        RewardModel(str(trained), steps="")


def test_the_last_member_as_an_alarm(trained: Path) -> None:
    paths = [str(trained / "member-1"), str(trained / "member-2")]
    [score] = RewardModel(paths, held_out=True)(texts("abab"))
    assert score.value == pytest.approx(RewardModel(paths[0])(texts("abab"))[0].value)
    assert score.parts["held_out"] == pytest.approx(RewardModel(paths[1])(texts("abab"))[0].value)


def test_a_run_that_is_rewarded_by_them(trained: Path, tmp_path: Path) -> None:
    config = TrainConfig(iterations=8, out=tmp_path / "run").replace(
        task__name="Copy", task__args={"length": 3, "alphabet": "abc"}, task__reward="reward_model",
        task__reward_args={"path": str(trained)}, rollout__batch_size=32, actor__learning_rate=1e-3,
    )  # fmt: skip
    run = build(config)
    try:
        rewards = []
        for metrics in run.algorithm:
            run.update_engine()
            rewards.append(metrics["reward/mean"])
    finally:
        run.close()
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2


def test_killed_and_resumed(pairs: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = command(pairs, out, "--members", "2")
    process = subprocess.Popen([sys.executable, "-m", "agents.cli", *arguments], stdout=subprocess.DEVNULL)
    for _ in range(600):
        if list(out.glob("member-2-checkpoints/step-*")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "member-2" / "reward-model.json").exists()
    assert main([*arguments, "--resume"]) == 0
    for member in ("member-1", "member-2"):
        one, other = (load_file(folder / member / "model.safetensors") for folder in (trained, out))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert (trained / member / "reward-model.json").read_text() == (out / member / "reward-model.json").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--members", "200"], "too few for 200 reward models with pairs of their own"),
        (["--head-only", "--lora-rank", "4"], "leave one of them out"),
        (["--members", "2", "--models", "a", "b", "c"], "--models names 3 models, and --members is 2"),
        (["--resume"], "there is no run to resume in"),
        (["--validation", "1.5"], "--validation is 1.5, expected a number from 0 to below 1"),
    ],
)
def test_mistakes(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(pairs, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_one_that_is_no_better_than_guessing_is_called_so(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(pairs, tmp_path / "out")[:-8], "--epochs", "1", "--learning-rate", "1e-9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "held-out pairs that cannot be told from guessing (0.5)" in said


def test_a_folder_that_is_taken(pairs: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(pairs, trained, "--members", "2")) == 2
    assert "holds a run already: go on with it (--resume)" in " ".join(capsys.readouterr().err.split())
    assert main(command(pairs, trained, "--members", "2", "--seed", "3", "--resume")) == 2
    assert "was begun with another seed" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "none"}, "there is no reward model in none"),
        ({"path": ""}, "expected the folder of a reward model"),
        ({"path": "org/one", "held_out": True}, "is a single reward model"),
        ({"path": "org/one", "how": "max"}, "how is 'max'"),
        ({"path": "org/one", "batch_size": 0}, "batch_size and max_length must be at least 1"),
    ],
)
def test_no_reward_model(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        RewardModel(**arguments)


@register_reward("test_hacked")
class Hacked(Reward):
    """Rises from batch to batch, while a model that is held out sees the texts grow worse."""

    def __init__(self) -> None:
        self.batches = 0

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.batches += 1
        noise = 0.01 * np.arange(len(rollouts))
        return [Score(0.1 * self.batches + each, {"held_out": -0.1 * self.batches}) for each in noise]


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_that_is_hacked_ends(tmp_path: Path, stops: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(iterations=14, out=tmp_path / "run").replace(
        task__name="Copy", task__args={"length": 2, "num_test": 0}, task__reward="test_hacked", rollout__batch_size=8,
        guard__stop_on_hacking=stops,
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (rows[-1]["iteration"] < 14) == stops
    said = " ".join(capsys.readouterr().out.split())
    assert "the reward model that was held out sees the texts grow worse" in said
