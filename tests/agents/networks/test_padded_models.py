"""Models with logits for more ids than their tokenizer has tokens: nobody samples those, nobody learns from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from torch import nn
from transformers import PreTrainedTokenizerFast

from agents.algorithms.base import Algorithm
from agents.config import SFTConfig
from agents.networks import distribution
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.run.sft import SFT
from llm_env.models import load_tokenizer
from llm_env.tokens.vocabulary import Vocabulary
from tests.agents.runs import character_model, running, small_config

SURPLUS = 28


def with_holes() -> PreTrainedTokenizerFast:
    """Small letters, each with an unused id behind it; the end-of-sequence token is far behind them."""
    letters = {chr(97 + place): 2 * place for place in range(26)}
    tokenizer = Tokenizer(kinds.WordLevel({**letters, ":": 53, " ": 55, "<unk>": 57, "<eos>": 99}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {"tiny": lambda: load_tokenizer("tiny"), "holes": with_holes}


def usable_ids(vocabulary: Vocabulary) -> torch.Tensor:
    return torch.tensor([token for token in range(vocabulary.size) if token not in vocabulary.unused])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chunked", [False, True])
def test_the_distribution_is_that_of_a_model_without_the_other_rows(
    bias: bool, name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = Vocabulary(TOKENIZERS[name]())
    rows = vocabulary.size + SURPLUS
    if chunked:
        monkeypatch.setattr(distribution, "LOGITS_BYTES", 4 * rows * 2)
    torch.manual_seed(0)
    head, hidden = nn.Linear(5, rows, bias=bias), torch.randn(7, 5, requires_grad=True)
    ids = usable_ids(vocabulary)
    others = torch.ones(rows, dtype=torch.bool).index_fill(0, ids, False)
    with torch.no_grad():
        head.weight[others] *= 30  # loud
    tokens = ids[torch.randint(len(ids), (7,))]
    ours = TokenDistribution(hidden, head, temperature=0.7, vocabulary=vocabulary)
    plain = ((head(hidden) / 0.7)[:, ids]).log_softmax(-1)
    expected = (
        plain.gather(1, (ids == tokens[:, None]).long().argmax(1, keepdim=True))[:, 0],
        -(plain.exp() * plain).sum(1),
    )
    found = (ours.log_prob(tokens), ours.entropy())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    leaves = [hidden, *head.parameters()]
    for weights in ((1.0, 0.0), (0.3, -0.7)):
        one, other = (
            torch.autograd.grad((weights[0] * pair[0] + weights[1] * pair[1]).sum(), leaves, retain_graph=True)
            for pair in (found, expected)
        )
        for gradient, reference in zip(one, other, strict=True):
            torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)
        assert not one[1][others].any()
    assert ours.logits.shape == (7, vocabulary.size)
    assert set(ours.sample(torch.Size([200])).flatten().tolist()) <= set(ids.tolist())
    assert set(ours.mode.tolist()) <= set(ids.tolist())


def padded_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model that finds what stands for no token likelier than all else."""
    model = character_model(width=16, spread=0.3, surplus=SURPLUS)
    vocabulary = Vocabulary(tokenizer)
    others = torch.ones(vocabulary.size + SURPLUS, dtype=torch.bool).index_fill(0, usable_ids(vocabulary), False)
    with torch.no_grad():
        model.lm_head.weight[others] *= 8
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_trainer_reference_and_engine_agree(name: str, tmp_path: Path) -> None:
    """Texts, log-probs of both sides, the reference, an update, and the warm start's loss."""
    tokenizer = TOKENIZERS[name]()
    changes = {"kl__beta": 0.1, "actor__micro_batch_size": 3, "loss__importance_cap": 2.0}
    config = small_config(tmp_path / "run", padded_folder(tmp_path / "model", tokenizer), **changes)
    with running(config) as run:
        network, vocabulary = run.network, run.mdp.vocabulary
        assert run.engine.vocab_size == network.num_tokens == vocabulary.size
        assert len(network.head.weight) == vocabulary.size + SURPLUS
        usable = set(usable_ids(vocabulary).tolist())
        for _ in range(2):
            algorithm = run.algorithm
            algorithm.trusted = False  # let it compute its own
            data = algorithm.score(batch := algorithm.collector.collect())
            mask = data["mask"]
            assert set(data["action"][mask].tolist()) <= usable
            assert all(isinstance(episode.text, str) for episode in batch.episodes)
            torch.testing.assert_close(data["trainer_log_prob"], data["behaviour_log_prob"], atol=1e-5, rtol=1e-4)
            if algorithm.iteration == 0:
                torch.testing.assert_close(data["ref_log_prob"], data["trainer_log_prob"], atol=1e-5, rtol=1e-4)
            algorithm.learn(data)
            algorithm.iteration += 1
        assert {"actor.lm_head.weight", "actor.model.embed_tokens.weight"} & set(network.weights())
        assert network.engine_weights()["model.embed_tokens.weight"].shape[0] == vocabulary.size + SURPLUS

        sft = SFT(SFTConfig(steps=2, batch_size=4, learning_rate=1e-9), network, run.mdp)
        indices, _ = sft.sampler.deal(4)
        texts = [[*run.mdp.prompts.tokens[index], *sft.answers[index].tokens] for index in indices]
        scores = run.engine.log_probs(texts)
        own = [score[-len(sft.answers[index].tokens) :] for score, index in zip(scores, indices, strict=True)]
        again = SFT(SFTConfig(steps=2, batch_size=4, learning_rate=1e-9), network, run.mdp)
        assert again.step() == pytest.approx(-torch.cat([torch.tensor(part) for part in own]).mean().item(), rel=1e-4)


def test_a_network_that_does_not_know_the_tokens_is_an_error(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", padded_folder(tmp_path / "model", load_tokenizer("tiny")))
    with running(config) as run:
        network = Network(run.network.model)
        with pytest.raises(ValueError, match=r"chooses among 128 tokens, but the texts are made of 100.*vocabulary="):
            Algorithm(config, network, run.algorithm.collector)
        other = Network(run.network.model, vocabulary=run.mdp.vocabulary)
        with pytest.raises(ValueError, match=r"of the kind 'fitted', but model.critic is 'shared'.*config.model"):
            Algorithm(config, other, run.algorithm.collector)
    with pytest.raises(ValueError, match="do not belong together"):
        TokenDistribution(torch.zeros(1, 2), nn.Linear(2, 99), vocabulary=Vocabulary(load_tokenizer("tiny"))).mode
