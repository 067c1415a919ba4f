"""A token that a task forbids is never written, and log-probs are those of the distribution over the others."""

import numpy as np
import pytest
import torch

from llm_env.engines import Job, Sampling
from llm_env.engines.sampling import choose
from llm_env.models import load_tokenizer
from llm_env.tokens.prompts import TokenizedPrompts
from tests.masked import Alternating, allowed_ids

from .conftest import full_logits, make_engine_of, make_model

TOKENIZER = load_tokenizer("tiny")


def written(model, sampling, num_slots=3, copies=4):
    """Episodes of each prompt but the empty one, which no engine can begin with."""
    engine = make_engine_of(model, num_slots, 40)
    task = Alternating().bind(engine.vocabulary)
    prompts = TokenizedPrompts.encode([p for p in task.prompts("train") if p.text], engine.vocabulary)
    jobs = [Job(index, index, request) for request, index in enumerate(list(range(len(prompts))) * copies)]
    done = sorted(engine.write(task, prompts, jobs, sampling), key=lambda pair: pair[0].request)
    return [(prompts.prompts[job.prompt_index].metadata["index"], episode) for job, episode in done]


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=0), Sampling(seed=1, temperature=0.6), Sampling(temperature=0.0)], ids=str
)
def test_only_allowed_tokens_are_written(sampling):
    model = make_model("llama")
    ends = set()
    for index, episode in written(model, sampling):
        assert len(episode.action_masks) == len(episode.tokens) == len(episode.log_probs)
        ends.add(str(episode.end))
        for step, token in enumerate(episode.tokens.tolist()):
            ids = allowed_ids(TOKENIZER, index, step)
            assert token in ids
            bits = np.unpackbits(np.frombuffer(episode.action_masks[step], dtype=np.uint8))[:100]
            assert np.flatnonzero(bits).tolist() == ids
            logits = full_logits(model, [*episode.rollout.prompt_tokens, *episode.tokens[:step]])[-1, ids]
            if sampling.greedy:
                assert token == ids[int(logits.argmax())]
                assert episode.log_probs[step] == 0
            else:
                log_probs = (logits / sampling.temperature).log_softmax(-1)
                assert episode.log_probs[step] == pytest.approx(float(log_probs[ids.index(token)]), abs=1e-4)
    assert "budget" in ends
    assert "eos" in ends or sampling.greedy


def test_the_number_of_slots_does_not_matter_to_masked_texts():
    one, many = (written(make_model("llama"), Sampling(seed=3), slots) for slots in (1, 9))
    assert [episode.text for _, episode in one] == [episode.text for _, episode in many]
    assert [episode.action_masks for _, episode in one] == [episode.action_masks for _, episode in many]


def test_equal_masks_are_kept_once():
    masks = [mask for _, episode in written(make_model("llama"), Sampling(seed=0)) for mask in episode.action_masks]
    assert len(masks) > 60
    assert len({id(mask) for mask in masks}) == len(set(masks)) == 4  # two kinds of letters, with an end and without


def test_a_text_of_a_task_without_masks_has_none():
    (episode,) = make_engine_of(make_model("llama")).generate([[5]], Sampling(max_new_tokens=2))
    assert episode.action_masks is None


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=2), Sampling(top_p=0.7), Sampling(min_p=0.5)]
)
def test_choosing_among_the_allowed_is_choosing_from_their_logits_alone(sampling):
    torch.manual_seed(0)
    logits, allowed = torch.randn(50, 12), torch.rand(50, 12) < 0.5
    allowed[:, 3] = True
    logits[~allowed] += 20  # what is forbidden is by far the likeliest
    uniforms = np.random.default_rng(0).random(50)
    tokens, log_probs = choose(logits, sampling, uniforms, allowed)
    for row in range(50):
        ids = allowed[row].nonzero()[:, 0]
        token, log_prob = choose(logits[row, ids][None], sampling, uniforms[row : row + 1])
        assert ids[token] == tokens[row]
        torch.testing.assert_close(log_prob[0], log_probs[row])
    with_numpy = choose(logits, sampling, uniforms, allowed.numpy())
    assert torch.equal(tokens, with_numpy[0])
    assert torch.equal(log_probs, with_numpy[1])
