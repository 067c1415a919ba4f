"""`generate` is an agent that steps; what it must add is when texts end and which one begins next."""

import numpy as np
import pytest
import torch

from llm_env.engines import Job
from llm_env.engines.sampling import Sampling, choose, draw, process, uniforms
from llm_env.tasks import Task
from llm_env.tokens.prompts import Prompt, TokenizedPrompts

from .conftest import AlphabetEngine, full_logits, make_engine_of, make_model

PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]
SAMPLINGS = [
    Sampling(max_new_tokens=8, n=2, seed=3),
    Sampling(max_new_tokens=8, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=4),
    Sampling(max_new_tokens=8, temperature=0.0),
]


def text_of(engine, episode):
    return engine.vocabulary.tokenizer.decode(episode.tokens.tolist())


def encode(engine, *texts):
    return [engine.vocabulary.encode(text) for text in texts]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_stepping_the_generated_tokens_gives_the_same_log_probs(sampling):
    engine = make_engine_of(make_model("llama"), num_slots=3)
    for episode in engine.generate(PROMPTS, sampling):
        logits = engine.start([1], [PROMPTS[episode.prompt_index]])
        for token, log_prob in zip(episode.tokens, episode.log_probs, strict=True):
            assert abs(process(logits, sampling)[0, token].item() - log_prob) < 1e-4
            logits = engine.step([1], [token]) if engine.lengths[1] < engine.context else None
        engine.stop([1])


@pytest.mark.parametrize("sampling", SAMPLINGS[:2])
def test_an_agent_with_the_public_parts_writes_the_same_text(sampling):
    engine = make_engine_of(make_model("qwen2"), num_slots=2)
    for episode in engine.generate(PROMPTS, sampling):
        index, sample = episode.prompt_index, episode.completion_index
        random = uniforms(sampling.seed, index, sample, sampling.max_new_tokens)
        logits, written = engine.start([0], [PROMPTS[index]]), []
        while True:
            log_probs = process(logits, sampling)
            token = int(draw(log_probs, random[len(written) : len(written) + 1]))
            assert abs(log_probs[0, token].item() - episode.log_probs[len(written)]) < 1e-5
            written.append(token)
            if token in engine.vocabulary.eos_tokens or len(written) == sampling.max_new_tokens:
                break
            logits = engine.step([0], [token])
        engine.stop([0])
        assert written == episode.tokens.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_greedy_equals_transformers(family):
    model = make_model(family)
    engine = make_engine_of(model, num_slots=2)
    for prompt, episode in zip(
        PROMPTS, engine.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=12)), strict=True
    ):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert episode.tokens.tolist() == expected[0, len(prompt) :].tolist()
        assert (episode.log_probs == 0).all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_number_of_slots_does_not_matter(sampling):
    model = make_model("llama")
    runs = [make_engine_of(model, num_slots).generate(PROMPTS, sampling) for num_slots in (1, 3, 16)]
    for run in runs:
        order = [(c.prompt_index, c.completion_index) for c in run]
        assert order == [(i, j) for i in range(len(PROMPTS)) for j in range(sampling.n)]
        for one, other in zip(run, runs[0], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.end == other.end
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
            assert one.tokens.dtype == np.int64
            assert one.log_probs.dtype == np.float32


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_prompts_of_a_few_tokens_need_no_text_beside_them(length, count):
    """What is read token by token waits for others that go on; alone there is nobody who goes on."""
    model = make_model("llama")
    prompt = [int(token) for token in PROMPTS[0]][:length]
    for written in make_engine_of(model).generate([prompt] * count, Sampling(temperature=0, max_new_tokens=2)):
        text = list(prompt)
        for token in written.tokens.tolist():
            assert token == int(full_logits(model, text)[-1].argmax())
            text.append(token)


def test_completions_of_one_prompt_differ_and_seeds_matter():
    engine = make_engine_of(make_model("llama"), num_slots=4)
    first = engine.generate([PROMPTS[0]], Sampling(n=3, max_new_tokens=10, seed=1))
    assert len({tuple(c.tokens) for c in first}) == 3
    assert len({tuple(engine.generate([PROMPTS[0]], Sampling(max_new_tokens=10))[0].tokens) for _ in range(3)}) == 3


def test_sampled_frequencies():
    model = make_model("llama")
    engine = make_engine_of(model, num_slots=64)
    sampling = Sampling(n=4000, max_new_tokens=1, seed=0, temperature=0.5)
    tokens = [c.tokens[0] for c in engine.generate([[4, 5]], sampling)]
    expected = (full_logits(model, [4, 5])[-1] / 0.5).softmax(-1).numpy()
    observed = np.bincount(tokens, minlength=100) / 4000
    assert np.abs(observed - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_log_probs_are_those_of_generate_at_temperature_one():
    engine = make_engine_of(make_model("gpt2"), num_slots=2)
    done = engine.generate(PROMPTS, Sampling(max_new_tokens=8, seed=0))
    scores = engine.log_probs([PROMPTS[c.prompt_index] + c.tokens.tolist() for c in done])
    for episode, score in zip(done, scores, strict=True):
        np.testing.assert_allclose(score[-len(episode.tokens) :], episode.log_probs, atol=1e-4)


@pytest.mark.parametrize("memory", [2**29, 4 * 100 * 5])
def test_log_probs_equal_a_plain_forward_pass(memory, monkeypatch):
    monkeypatch.setattr("llm_env.engines.transformers.engine.LOGITS_BYTES", memory)  # the small one: 5 positions a pass
    model = make_model("llama")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 100, length) for length in (7, 1, 24, 0, 2, 12, 7)]
    for sequence, score in zip(sequences, make_engine_of(model).log_probs(sequences), strict=True):
        assert score.shape == (max(len(sequence) - 1, 0),)
        assert score.dtype == np.float32
        if len(score):
            all_log_probs = full_logits(model, sequence).log_softmax(-1)
            expected = all_log_probs[np.arange(len(score)), sequence[1:]]
            np.testing.assert_allclose(score, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "options", "text", "end"),
    [
        ("w", {}, "xyz<eos>", "eos"),
        ("z", {}, "<eos>", "eos"),
        ("w", {"ignore_eos": True, "max_new_tokens": 6}, "xyz<eos><unk>\n", "budget"),
        ("a", {"max_new_tokens": 1}, "b", "budget"),
        ("a", {"stop": ["b"]}, "b", "stop"),
        ("a", {"stop": ["ef", "jk"]}, "bcdef", "stop"),
        ("a", {"stop": ["abc"], "max_new_tokens": 4}, "bcde", "budget"),  # "a" is the prompt's, it does not count
        ("abcdefghijklmnopqrstuvwxyzABC", {}, "DEF", "context"),
        ("abcdefghijklmnopqrstuvwxyzABCDE", {}, "F", "context"),
    ],
)
def test_why_a_text_ends(prompt, options, text, end):
    engine = AlphabetEngine(context=32)
    (episode,) = engine.generate(encode(engine, prompt), Sampling(seed=0, **options))
    assert text_of(engine, episode) == text
    assert episode.end == end
    assert episode.log_probs.shape == episode.tokens.shape
    assert engine.lengths.tolist() == [0, 0]


def test_stop_sequences_of_token_ids():
    engine = AlphabetEngine()
    stop = [[int(token) for token in engine.vocabulary.encode("de")]]
    (episode,) = engine.generate(encode(engine, "a"), Sampling(stop=stop))
    assert (text_of(engine, episode), episode.end) == ("bcde", "stop")


def test_the_next_request_starts_when_a_slot_falls_free():
    """Two slots: "q" takes 10 steps in one, "x", "w" and "y" take turns in the other."""
    engine = AlphabetEngine(num_slots=2)
    done = list(engine.stream(encode(engine, "q", "x", "w", "y"), Sampling(temperature=0)))
    assert [text_of(engine, c) for c in done] == ["yz<eos>", "xyz<eos>", "z<eos>", "rstuvwxyz<eos>"]
    assert [c.prompt_index for c in done] == [1, 2, 3, 0]
    begin, both, one = ("start", [0, 1]), ("step", [0, 1]), ("step", [0])
    again = ("start", [1])
    assert engine.calls == [begin, both, both, one, again, both, both, both, one, again, both, one]


def test_only_free_slots_are_used():
    model = make_model("llama")
    engine = make_engine_of(model, num_slots=2)
    engine.start([0], [[4, 5]])
    assert len(engine.generate(PROMPTS, SAMPLINGS[0])) == 10
    torch.testing.assert_close(engine.step([0], [6])[0], full_logits(model, [4, 5, 6])[-1], atol=1e-4, rtol=1e-4)
    engine.start([1], [[4]])
    with pytest.raises(ValueError, match="all 2 slots hold texts"):
        engine.generate(PROMPTS)


def test_a_stream_left_early_frees_its_slots():
    engine = AlphabetEngine(num_slots=2)
    stream = engine.stream(encode(engine, "a", "y", "b"), Sampling(seed=0))
    assert text_of(engine, next(stream)) == "z<eos>"
    stream.close()
    assert engine.lengths.tolist() == [0, 0]


def test_nothing_to_generate():
    assert AlphabetEngine().generate([]) == []


def test_bad_prompts_are_refused_before_anything_runs():
    engine = AlphabetEngine(context=8)
    for prompts, message in (
        ([[4], []], "a prompt is empty"),
        ([[4], [4] * 8], "a prompt of 8 tokens does not fit a context of 8 with a token after it"),
        (["Hi"], "encode"),
        ([[4, 100]], "token id 100"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.stream(prompts)
    assert engine.calls == []


def test_a_model_that_has_diverged_is_an_error():
    with pytest.raises(ValueError, match="row 1 has no token of positive probability"):
        choose(torch.tensor([[0.0, 0.0], [torch.nan, 0.0]]), Sampling(), np.array([0.1, 0.1]))


def starts(engine):
    return [slots for kind, slots in engine.calls if kind == "start"]


def test_a_text_begins_as_soon_as_a_slot_is_free():
    engine = AlphabetEngine(num_slots=8)
    prompts = encode(engine, *["q"] * 7, "y", "x", "w")
    done = engine.generate(prompts, Sampling(temperature=0))
    assert starts(engine) == [[0, 1, 2, 3, 4, 5, 6, 7], [7], [7]]
    assert [text_of(engine, c) for c in done[7:]] == ["z<eos>", "yz<eos>", "xyz<eos>"]


class Echo(Task):
    """Answers at the end of a turn, once."""

    max_new_tokens = 9

    def __init__(self, reply):
        super().__init__(num_train=1)
        self.stop = ("z",)
        self.answer = reply

    def splits(self):
        return {"train": [Prompt(letter) for letter in "abcdefgy"]}

    def reply(self, rollout):
        return self.answer if rollout.is_action.all() else None


def test_a_reply_is_read_in_one_pass_while_the_other_texts_go_on():
    engine = AlphabetEngine(num_slots=8, context=64)
    reply = "?" * 19 + "a"
    task = Echo(reply).bind(engine.vocabulary)
    widths = []
    advance = engine._advance

    def record(slots, token_lists, fresh, begun):
        widths.append([len(tokens) for tokens in token_lists])
        return advance(slots, token_lists, fresh, begun)

    engine._advance = record
    texts = TokenizedPrompts.encode(task.prompts("train"), engine.vocabulary)
    jobs = [Job(index, index, index) for index in range(8)]
    written = {job.prompt_index: e for job, e in engine.write(task, texts, jobs, Sampling(temperature=0))}
    assert widths == [[], [1] * 7 + [21], *[[1] * 8] * 7]
    assert written[7].rollout.transcript == "z" + reply + "bcdefghi"
    assert written[7].text == "z\nbcdefghi"
    assert written[7].rollout.is_action.sum() == 9
    assert written[0].text == "bcdefghij"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "a prompt is empty"), ([4] * 16, "does not fit a context of 16 with a token after it"), ([100], "id 100")],
)
def test_the_prompts_of_a_task_are_checked_before_anything_runs(prompt, message):
    engine = AlphabetEngine(context=32)
    task = Echo("?").bind(engine.vocabulary)
    texts = TokenizedPrompts([Prompt("")] * 2, [np.array([5]), np.array(prompt, dtype=np.int64)])
    with pytest.raises(ValueError, match=message):
        engine.write(task, texts, [Job(0, 0, 0), Job(1, 1, 1)], Sampling(), context=16)
    assert engine.calls == []
    assert len(list(engine.write(task, texts, [Job(0, 0, 0)], Sampling(), context=16))) == 1
