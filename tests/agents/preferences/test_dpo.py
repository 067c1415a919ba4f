"""DPO: its losses against their formulas, its log-probs against a plain forward pass, and what it teaches."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agents.cli import main
from agents.config import ModelConfig
from agents.config.preferences import DPOConfig
from agents.networks.network import Network
from agents.preferences.dpo import DPOTrainer, preference_loss
from agents.preferences.pairs import Pair
from agents.preferences.together import apart, together
from llm_env.models import load_model, load_tokenizer, load_vocabulary
from llm_env.tokens.vocabulary import Vocabulary

PAIRS = [Pair(f"say {n % 7}: ", "a" * (1 + n % 5), "b" * (1 + n % 3)) for n in range(40)]
CONFIG = DPOConfig(Path("none"), batch_size=8, micro_batch_size=3, learning_rate=3e-4)


def trainer(config: DPOConfig = CONFIG, vocabulary: Vocabulary | None = None) -> DPOTrainer:
    how = ModelConfig(critic="shared", hints=False, reference="penalty")
    vocabulary = vocabulary or load_vocabulary("tiny")
    network = Network(load_model("tiny"), how, vocabulary=vocabulary).eval()
    return DPOTrainer(config, network, vocabulary, PAIRS[:32], PAIRS[32:])


@pytest.mark.parametrize("grown", [-3.0, 0.0, 0.7])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_the_loss_of_dpo(grown: float, beta: float, smoothing: float) -> None:
    likely = 1 / (1 + math.exp(-beta * grown))
    expected = -(1 - smoothing) * math.log(likely) - smoothing * math.log(1 - likely)
    config = DPOConfig(Path("none"), beta=beta, smoothing=smoothing)
    assert preference_loss(torch.tensor([grown]), config).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("grown", "expected"), [(0.0, 25.0), (5.0, 0.0), (7.0, 4.0)])
def test_the_loss_of_ipo(grown: float, expected: float) -> None:
    config = DPOConfig(Path("none"), beta=0.1, loss="ipo")
    assert preference_loss(torch.tensor([grown]), config).item() == pytest.approx(expected, abs=1e-5)


def test_log_probs_are_those_of_one_text_at_a_time() -> None:
    one = trainer()
    model, vocabulary = load_model("tiny"), load_vocabulary("tiny")
    for index, pair in enumerate(PAIRS[:6]):
        for place, answer in enumerate((pair.chosen, pair.rejected)):
            prompt = vocabulary.encode(str(pair.prompt)).tolist()
            said = [*vocabulary.encode(answer, add_special_tokens=False).tolist(), vocabulary.eos_tokens[0]]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *said]])).logits[0].log_softmax(-1)
            each = [logits[len(prompt) - 1 + step, token] for step, token in enumerate(said)]
            assert float(one._before["train"][index, place]) == pytest.approx(float(sum(each)), rel=1e-4)


def test_both_ways_of_reading_give_one_gradient() -> None:
    """A pair as one row, and each text as a row of its own."""
    one, gradients = trainer(), []
    assert one._rows is together
    for kind in (together, apart):
        one.model.zero_grad()
        one._log_probs(one._train[:5], kind)[:, 0].sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in one.model.parameters() if w.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_conversation_goes_through_the_chat_template() -> None:
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    one = trainer(vocabulary=Vocabulary(tokenizer))
    said, _ = one._texts(Pair([{"role": "user", "content": "Hi"}], "a", "b"))
    assert tokenizer.decode(said.tokens[: said.prompt]) == "[user]Hi[assistant]"
    assert one._texts(Pair("Hi", "a", "b"))[0] == said


def test_of_a_long_text_the_beginning_is_left_out() -> None:
    one = trainer(DPOConfig(Path("none"), max_length=6))
    short, long = one._texts(Pair("0123456789", "ab", "b" * 50))
    assert one._vocabulary.decode(short.tokens[: short.prompt]) == "789"
    assert (long.prompt, len(long.answer)) == (1, 5)


def test_it_begins_where_nothing_is_preferred_and_learns() -> None:
    one = trainer()
    before = one.evaluate()
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert (before["accuracy"], before["chosen"]) == (0.5, 0.0)
    while one.steps < one.total:
        one.step()
    after = one.evaluate()
    assert after["accuracy"] == 1.0
    assert after["loss"] < before["loss"] - 0.1
    assert after["chosen"] > after["rejected"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{n}: ", "chosen": "a" * (1 + n % 4), "rejected": "b" * (1 + n % 3)} for n in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(pairs: Path, out: Path, *more: str) -> list[str]:
    rest = ["--batch-size", "4", "--learning-rate", "1e-4", "--max-length", "32", *more]
    return ["dpo", "--pairs", str(pairs), "--out", str(out), *rest]


def test_the_command_killed_and_resumed(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(pairs, whole)) == 0
    assert "accuracy on held-out pairs   1.000" in capsys.readouterr().out
    arguments = [sys.executable, "-m", "agents.cli", *command(pairs, killed)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if list(killed.glob("checkpoints/step-*")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*command(pairs, killed), "--resume"]) == 0
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "dpo.json").read_text() == (killed / "dpo.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(whole / "model").num_parameters() > 0


def test_lora(pairs: Path, tmp_path: Path) -> None:
    assert main(command(pairs, tmp_path / "lora", "--lora-rank", "4", "--learning-rate", "1e-3")) == 0
    changed = load_file(tmp_path / "lora" / "model" / "model.safetensors")
    before = load_model("tiny").state_dict()
    assert set(changed) <= set(before)
    assert any(not torch.equal(changed[name], before[name]) for name in changed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "ipo", "--smoothing", "0.1"], "which the loss ipo has no use for"),
        (["--beta", "0"], "--beta is 0.0, expected"),
        (["--validation", "0.001"], "use more pairs, or another --validation"),
        (["--model", "none"], "none"),
    ],
)
def test_mistakes(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(pairs, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
