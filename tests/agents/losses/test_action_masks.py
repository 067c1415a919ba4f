"""What a task forbids does not exist for learning: log-probs, entropy, losses, reference are those of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import MaskedCategorical

from agents.losses.ops import token_weights
from agents.networks import distribution
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.rollouts.masks import INDEX, TABLE, Allowed, MaskTable
from agents.rollouts.packing import pack, trim
from agents.rollouts.writers import PolicyWriter
from agents.run.parts import Run
from llm_env import TorchRLTokenEnv
from llm_env.engines import Sampling
from llm_env.models import load_tokenizer
from llm_env.tokens.episode import Episode
from rewards import Rollout, Score
from tests.agents.runs import character_model, running, save_small_model, small_config
from tests.agents.small import (
    VOCAB,
    clip_loss,
    gradients_of,
    loss_of,
    near_old_policy,
    small_batch,
    small_network,
)
from tests.masked import Alternating, allowed_ids

SIZE, WIDTH = 19, 5


def random_masks(*shape: int, size: int, seed: int = 0) -> torch.Tensor:
    """Some tokens of each state, one at least; a state in four may choose anything."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(*shape, size, generator=generator) < 0.4
    masks[torch.rand(*shape, generator=generator) < 0.25] = True
    masks[..., 4] = True
    return masks


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_distribution_is_torchrls_masked_categorical(
    temperature: float, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(distribution, "LOGITS_BYTES", 4 * SIZE * 2)
        monkeypatch.setattr(distribution, "BLOCK_BYTES", 4 * SIZE)
    torch.manual_seed(0)
    head, hidden = nn.Linear(WIDTH, SIZE), torch.randn(4, 3, WIDTH, requires_grad=True)
    masks = random_masks(4, 3, size=SIZE)
    ours = TokenDistribution(hidden, head, temperature=temperature, allowed=Allowed.of(masks))
    theirs = MaskedCategorical(logits=head(hidden) / temperature, mask=masks)
    # The gradient of its entropy is NaN where it is multiplied by more than 1.
    plain = Categorical(logits=(head(hidden) / temperature).masked_fill(~masks, -1e6))
    tokens = theirs.sample()
    leaves = [hidden, *head.parameters()]
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, -0.7)):
        pairs = [
            weights[0] * one.log_prob(tokens) + weights[1] * one.entropy() * torch.linspace(0.5, 2, 3)
            for one in (ours, theirs, plain)
        ]
        torch.testing.assert_close(pairs[0], pairs[1])
        one, other = (torch.autograd.grad(pairs[which].sum(), leaves, retain_graph=True) for which in (0, 2))
        for gradient, reference in zip(one, other, strict=True):
            torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.mode, theirs.mode)
    torch.testing.assert_close(ours.logits.softmax(-1), theirs.probs)
    drawn = ours.sample(torch.Size([300]))
    assert masks.expand(300, -1, -1, -1).gather(-1, drawn[..., None]).all()
    forbidden = (~masks).int().argmax(-1)
    with torch.no_grad():
        log_prob = ours.log_prob(forbidden)
    assert torch.equal(log_prob == -torch.inf, ~masks.gather(-1, forbidden[..., None])[..., 0])


def test_a_state_of_which_only_one_token_is_allowed_has_no_choice() -> None:
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    only = nn.functional.one_hot(torch.tensor([2, 0, 5]), SIZE).bool()
    forced = TokenDistribution(hidden, nn.Linear(WIDTH, SIZE), allowed=Allowed.of(only))
    log_prob, entropy = forced.log_prob(torch.tensor([2, 0, 5])), forced.entropy()
    assert not log_prob.any()
    assert not entropy.any()
    (gradient,) = torch.autograd.grad((1e3 * log_prob + 1e3 * entropy).sum(), hidden)
    assert not gradient.any()


# Losses.


def masked_batch(lengths: list[int]) -> TensorDict:
    """Each step has a mask that allows its action; what lies under padding is junk."""
    data = small_batch(lengths)
    rows, steps = data["mask"].shape
    masks = random_masks(rows, steps, size=VOCAB, seed=3)
    masks.scatter_(-1, data["action"][..., None], True)
    allowed = Allowed.of(masks)
    index = torch.where(data["mask"], allowed.index, 10**6)
    return data.set(INDEX, index).set_non_tensor(TABLE, MaskTable(allowed.bits))


def losses(network: Network, data: TensorDict) -> tuple[TensorDict, dict[str, torch.Tensor]]:
    out = clip_loss(network, entropy=0.1, kl=0.2)(data)
    loss_of(out).backward()
    return out.detach(), gradients_of(network)


def test_masks_change_the_loss_as_those_of_a_plain_masked_categorical_do() -> None:
    network, lengths = small_network(), [3, 1, 4]
    data = near_old_policy(network, masked_batch(lengths))
    found = network.actor.get_dist(data.clone(False))
    hidden = network.encode(data.clone(False))["hidden"]
    allowed = data.get_non_tensor(TABLE)
    for row, length in enumerate(lengths):
        for step in range(length):
            bits = allowed.bits[data[INDEX][row, step]].numpy()
            mask = torch.from_numpy(np.unpackbits(bits)[:VOCAB]).bool()
            plain = MaskedCategorical(logits=network.head(hidden[row, step]), mask=mask)
            torch.testing.assert_close(
                found.log_prob(data["action"])[row, step], plain.log_prob(data["action"][row, step])
            )
            torch.testing.assert_close(found.entropy()[row, step], plain.entropy())


def test_padding_order_and_micro_batches_cannot_matter_with_masks() -> None:
    network = small_network()
    data = near_old_policy(network, masked_batch([3, 1, 4, 2]))
    data["weight"] = token_weights(data["mask"], "token")
    out, gradients = losses(network, data)
    unmasked, _ = losses(network, data.exclude(INDEX, TABLE))
    assert (out["loss_entropy"] - unmasked["loss_entropy"]).abs() > 0.02
    for parts in ([[2, 0, 3, 1]], [[1], [3, 0], [2]]):
        pieces = [losses(network, data[torch.tensor(part)]) for part in parts]
        for name in ("loss_objective", "loss_entropy", "loss_kl"):
            torch.testing.assert_close(sum(piece[0][name] for piece in pieces), out[name])
        for name, gradient in gradients.items():
            summed = sum(piece[1][name] for piece in pieces)
            torch.testing.assert_close(summed, gradient, rtol=1e-3, atol=2e-5)


# Batches.


def text(tokens: list[int], masks: list[list[int]] | None) -> Episode:
    bits = None if masks is None else tuple(np.packbits(np.isin(np.arange(12), mask)).tobytes() for mask in masks)
    rollout = Rollout(prompt_tokens=np.array([7]), tokens=np.array(tokens))
    return Episode(rollout, Score(1.0), np.zeros(len(tokens), np.float32), None, False, 0, 0, action_masks=bits)


def test_packing_keeps_distinct_masks_once() -> None:
    first, second = [1, 2, 11], [3]
    data = pack([text([1, 2], [first, first]), text([3], [second]), text([2, 3, 2], [first, second, first])], 0)
    index, table = data[INDEX], data.get_non_tensor(TABLE)
    assert index.shape == (3, 3)
    assert len(table.bits) == 2
    forbidden = Allowed(table.bits, index).forbidden(index[data["mask"]], 12)
    expected = [first, first, second, first, second, first]
    assert [(~row).nonzero()[:, 0].tolist() for row in forbidden] == expected
    short = trim(data[:2])
    assert short[INDEX].tolist() == [[0, 0], [1, 0]]
    assert short.get_non_tensor(TABLE) is table
    mixed = pack([text([1], [first]), text([5], None)], 0)
    forbidden = Allowed(mixed.get_non_tensor(TABLE).bits, mixed[INDEX]).forbidden(mixed[INDEX][:, 0], 12)
    assert forbidden.sum(1).tolist() == [9, 0]


def test_texts_without_masks_cost_nothing() -> None:
    data = pack([text([1], None)], 0)
    assert INDEX not in data
    assert TABLE not in data


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.3)


def config_of(folder: Path, out: Path, **changes: Any) -> Any:
    changes = {"task__name": "Alternating", "task__args": {}, **changes}
    return small_config(out, folder, rollout__batch_size=20, **changes)


def check_obeyed(episodes: list[Episode]) -> None:
    for episode in episodes:
        for step, token in enumerate(episode.tokens.tolist()):
            assert token in allowed_ids(load_tokenizer("tiny"), episode.rollout.metadata["index"], step)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_engine_trainer_and_reference_agree_about_masked_texts(
    folder: Path, tmp_path: Path, micro: int | None, critic: str
) -> None:
    changes = {"actor__micro_batch_size": micro, "model__critic": critic, "kl__beta": 0.1, "rollout__temperature": 0.8}
    with running(config_of(folder, tmp_path, task__context=40, **changes)) as run:
        algorithm = run.algorithm
        algorithm.trusted = False  # let the trainer compute its own
        for iteration in range(2):
            batch = algorithm.collector.collect()
            check_obeyed(batch.episodes)
            data = algorithm.score(batch)
            if "trainer_log_prob" not in data:
                network_log_prob(run, data)
            torch.testing.assert_close(data["trainer_log_prob"], data["behaviour_log_prob"], atol=1e-5, rtol=1e-4)
            if iteration == 0:
                torch.testing.assert_close(data["ref_log_prob"], data["trainer_log_prob"], atol=1e-5, rtol=1e-4)
            else:
                assert (data["ref_log_prob"] - data["trainer_log_prob"]).abs().max() > 1e-3
            metrics = algorithm.learn(data)
            assert metrics["policy/entropy"] < np.log(22)  # of 100 tokens no step allows more than 22
        assert run.evaluator is not None
        check_obeyed(run.evaluator.evaluate().episodes)
        indices = np.arange(4)
        check_obeyed(run.evaluator.writer.episodes(indices, indices, Sampling(temperature=0.0, seed=0)))


def network_log_prob(run: Run, data: TensorDict) -> None:
    with torch.no_grad():
        data["trainer_log_prob"] = run.network.actor.get_dist(data.clone(False)).log_prob(data["action"])


def test_a_policy_is_shown_the_mask_and_must_obey(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with running(config_of(folder, tmp_path)) as run:
        mdp, network = run.mdp, run.network
        indices = np.arange(5)
        episodes = PolicyWriter(mdp, network.policy(), 2).episodes(indices, indices, Sampling())
        check_obeyed(episodes)
        data = pack(episodes, mdp.vocabulary.pad_token)
        network_log_prob(run, data)
        torch.testing.assert_close(data["trainer_log_prob"], data["behaviour_log_prob"], atol=1e-5, rtol=1e-4)

        def disobeys(data: TensorDict) -> TensorDict:
            data["action"] = data["action_mask"].int().argmin(-1)
            return data.set("action_log_prob", torch.zeros(len(data)))

        with pytest.raises(ValueError, match="the policy chose token 0, which the task Alternating forbids here"):
            PolicyWriter(mdp, disobeys, 2).episodes(indices, indices, Sampling())


def test_the_policy_of_a_network_obeys_the_mask_of_a_torchrl_environment() -> None:
    env = TorchRLTokenEnv(Alternating(), num_envs=3, seed=0)
    torch.manual_seed(0)
    rollout = env.rollout(3, Network(character_model(spread=0.3)).policy(), break_when_any_done=False)
    assert rollout["action_mask"].gather(-1, rollout["action"][..., None]).all()
