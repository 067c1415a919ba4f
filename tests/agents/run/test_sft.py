"""The warm start: the loss is on the answer alone, and it learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from agents.config import LoraConfig, ModelConfig, SFTConfig
from agents.networks.network import Network
from agents.run.sft import SFT
from llm_env.engines import Sampling
from llm_env.engines.transformers import TransformersEngine
from llm_env.mdp.core import TokenMDP
from llm_env.models import load_tokenizer
from llm_env.tasks import Maze, Task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout
from tests.agents.runs import character_model

MAP = {"a": "no", "bb": "yes", "ccc": "why", "d": "x"}
EOS = 2


class Answers(Task):
    """Prompts and answers of different lengths."""

    max_new_tokens = 4
    max_prompt_tokens = 4

    def __init__(self, answers: dict[str, Any] = MAP, key: str = "answer") -> None:
        super().__init__()
        self.answers, self.key = answers, key

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(prompt, {self.key: answer}) for prompt, answer in self.answers.items()]}

    def score(self, rollout: Rollout) -> float:
        return float(rollout.text == rollout.metadata[self.key])


def network(seed: int = 0, spread: float = 0.2, **config: Any) -> Network:
    return Network(character_model(seed=seed, spread=spread), ModelConfig(**config))


def loss_of_answer(model: Any, prompt: str, answer: str) -> list[torch.Tensor]:
    """The negative log-likelihood of each token of the answer and of its end, from the whole model's logits."""
    tokenizer = load_tokenizer("tiny")
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(answer), EOS]
    logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return [-logits[len(before) + place - 1, token] for place, token in enumerate(after)]


def test_the_loss_is_on_the_answer_and_its_end_only() -> None:
    sft = SFT(SFTConfig(steps=1, batch_size=4, learning_rate=0.0), network(), TokenMDP(Answers()))
    with torch.no_grad():
        each = [loss_of_answer(sft.network.model, *pair) for pair in MAP.items()]
    expected = [float(loss) for text in each for loss in text]  # the mean is over tokens, not over texts
    assert len(expected) == 3 + 4 + 4 + 2
    assert sft.step() == pytest.approx(float(np.mean(expected)), rel=1e-5)


class Asks(Answers):
    """Asks again after every answer that does not end with a full stop."""

    max_new_tokens = 8
    max_prompt_tokens = 12
    max_reply_tokens = 16
    stop = (".",)

    def reply(self, rollout: Rollout) -> str | None:
        return None if rollout.text.endswith(".") else "and?"


def test_on_several_turns_the_loss_is_on_the_agents_tokens_only() -> None:
    turns: dict[str, Any] = {"a": ["no", "ok."], "bb": ["yes"], "c": "x."}
    net = network()
    sft = SFT(SFTConfig(steps=1, batch_size=3, learning_rate=0.0), net, TokenMDP(Asks(turns)))
    encode = load_tokenizer("tiny").encode
    # By hand: the text, and which of it the agent writes. A stop sequence is an end of its own.
    hand = [
        ([*encode("a"), *encode("no"), EOS, *encode("and?"), *encode("ok.")], "-+++----+++"),
        ([*encode("bb"), *encode("yes"), EOS, *encode("and?")], "--++++----"),
        ([*encode("c"), *encode("x.")], "-++"),
    ]
    losses = []
    for (tokens, marks), text in zip(hand, sft.answers, strict=True):
        assert [*text.prompt_tokens, *text.tokens] == tokens
        with torch.no_grad():
            log_probs = net.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        losses += [-float(log_probs[place - 1, tokens[place]]) for place, mark in enumerate(marks) if mark == "+"]
    assert len(losses) == 6 + 4 + 2
    assert sft.step() == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_a_turn_of_one_token_is_its_own_end() -> None:
    """A letter that is a stop sequence has no end-of-sequence token after it, between the turns or at the end."""
    walls = ["b3c3", "a2a3", "b2c2", "b1b2"]
    mdp = TokenMDP(Maze(3, walls=walls, num_test=0))
    sft = SFT(SFTConfig(steps=1, batch_size=2), network(), mdp)
    texts = {text.prompt: text for text in sft.answers}
    assert len(texts) == 9 * 8
    assert texts["a3>c3 "].transcript == "eb3 sb2 wa2 sa1 eb1 ec1 nc2 n"
    assert EOS not in texts["a3>c3 "].tokens
    assert texts["a3>c3 "].text == "\n".join("eswseenn")
    assert np.isfinite(sft.step())


def test_turns_that_no_agent_could_write() -> None:
    for answer, which in (
        (["a.", "b"], "answer 2 of 2"),  # over after the first
        (["a.b"], "answer 1 of 1"),  # over in the middle of it
        (["abcdefg", "h"], "answer 2 of 2"),  # the budget is used up
    ):
        with pytest.raises(ValueError, match=rf"{which} to a prompt of Asks, .* cannot be written as one turn"):
            SFT(SFTConfig(), network(), TokenMDP(Asks({"a": answer})))
    with pytest.raises(ValueError, match="has 2 answers under 'answer', but the task does not reply between them"):
        SFT(SFTConfig(), network(), TokenMDP(Answers({"a": ["x", "y"]})))


def test_numbers_are_answers_too() -> None:
    (text,) = SFT(SFTConfig(), network(), TokenMDP(Answers({"a": 42}))).answers
    assert text.tokens.tolist() == [*load_tokenizer("tiny").encode("42"), EOS]


def test_its_gradient_is_that_of_the_answers() -> None:
    """Prompts are read, and not learned; nor does padding leave a trace."""
    sft = SFT(SFTConfig(steps=1, batch_size=4, learning_rate=0.0), network(), TokenMDP(Answers()))
    model = sft.network.model
    losses = [loss for pair in MAP.items() for loss in loss_of_answer(model, *pair)]
    torch.stack(losses).mean().backward()
    slow = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    norm = torch.stack([(gradient**2).sum() for gradient in slow.values()]).sum().sqrt()
    assert norm > 1  # so it is shortened to 1
    sft.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, slow[name] / norm, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [0, 8])
def test_it_learns_a_map_and_where_to_end(lora: int) -> None:
    net = network(lora=LoraConfig(rank=lora, alpha=16))
    mdp = TokenMDP(Answers(), shuffle=False)
    losses: list[tuple[int, float]] = []
    steps = 200 if lora else 60
    sft = SFT(SFTConfig(steps=steps, batch_size=8, learning_rate=1e-2), net, mdp)
    last = sft.run(lambda step, loss: losses.append((step, loss)) is not None)
    assert [step for step, _ in losses] == list(range(1, steps + 1))
    # With LoRA the embeddings, and so the largest of logits, stay as they are: the loss cannot vanish.
    assert losses[-1][1] == last < (0.4 if lora else 0.1) < 4 < losses[0][1]
    assert not net.training
    engine = TransformersEngine(net.engine_model(), load_tokenizer("tiny"), num_slots=4, context=mdp.context)
    written = engine.generate(mdp.prompts.tokens, Sampling(temperature=0, max_new_tokens=4))
    assert [mdp.vocabulary.decode(done.tokens) for done in written] == list(MAP.values())
    assert {done.end for done in written} == {"eos"}


def test_one_seed_one_warm_start() -> None:
    found = []
    for seed in (0, 0, 1):
        sft = SFT(SFTConfig(steps=5, batch_size=2), network(), TokenMDP(Answers()), seed)
        sft.run()
        found.append(sft.network.weights())
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name])
    assert any(not torch.equal(weight, found[2][name]) for name, weight in found[0].items())


def test_the_temperature_of_rollouts_changes_nothing() -> None:
    """What is learned is how likely the model itself is to answer so: a hot policy would need sharper weights."""
    found = []
    for temperature in (1.0, 0.5, 2.0):
        net = Network(character_model(spread=0.2), temperature=temperature)
        sft = SFT(SFTConfig(steps=3, batch_size=4), net, TokenMDP(Answers()))
        found.append((sft.step(), sft.run(), net.weights()))
    for first, last, weights in found[1:]:
        assert (first, last) == found[0][:2]
        for name, weight in found[0][2].items():
            assert torch.equal(weight, weights[name])


def test_the_value_head_is_left_alone() -> None:
    sft = SFT(SFTConfig(steps=3, batch_size=4), network(), TokenMDP(Answers()))
    sft.run()
    assert all(not weight.any() for weight in sft.network.value_head.parameters())


def test_no_steps_no_change() -> None:
    sft = SFT(SFTConfig(steps=0), network(), TokenMDP(Answers()))
    assert math.isnan(sft.run())


def test_errors_say_what_is_missing() -> None:
    for task, config in [
        (Answers(key="solution"), SFTConfig()),
        (Answers({"a": "no", "b": True}), SFTConfig()),
        (Answers({"a": "no", "b": []}), SFTConfig()),
        (Answers({"a": ["no", None]}), SFTConfig()),
        (Answers(), SFTConfig(answer="solution")),
    ]:
        with pytest.raises(ValueError, match=rf"learns from the prompts' '{config.answer}'.*set --sft.answer"):
            SFT(config, network(), TokenMDP(task))
    assert SFT(SFTConfig(answer="solution"), network(), TokenMDP(Answers(key="solution"))).answers


def test_an_answer_must_fit_with_its_end() -> None:
    SFT(SFTConfig(), network(), TokenMDP(Answers({"a": "abc"})))
    with pytest.raises(ValueError, match=r"'abcd' has 4 tokens and an end.*only 4: raise --task.max-new-tokens"):
        SFT(SFTConfig(), network(), TokenMDP(Answers({"a": "abcd"})))
    SFT(SFTConfig(), network(), TokenMDP(Answers({"a": "abcd"}), max_new_tokens=5))


def test_a_loss_that_is_not_finite_ends_it() -> None:
    net = network()
    with torch.no_grad():
        net.head.weight[5, 0] = math.nan
    with pytest.raises(ValueError, match=r"loss of SFT step 1 is nan: try a lower --sft.learning-rate \(now 0.001\)"):
        SFT(SFTConfig(steps=3, batch_size=4), net, TokenMDP(Answers())).run()
