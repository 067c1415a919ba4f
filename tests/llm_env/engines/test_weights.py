"""Loading weights: completely, in place, or not at all."""

import numpy as np
import pytest
import torch

from llm_env.engines import Sampling, merged_weights
from llm_env.engines.weights import copy_weights

from .conftest import full_logits, make_engine_of, make_model

TEXT = [4, 5, 6]


def same(logits, model):
    torch.testing.assert_close(logits[0], full_logits(model, TEXT)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("names", ["parameters", "state_dict"])
def test_the_engine_becomes_the_other_model(family, names):
    engine, other = make_engine_of(make_model(family, seed=0)), make_model(family, seed=1)
    before = engine.start([0], [TEXT])
    named = other.named_parameters() if names == "parameters" else other.state_dict()
    engine.load_weights(named, version=3)
    after = engine.start([0], [TEXT])
    assert engine.version == 3
    assert not torch.allclose(before, after, atol=0.1)
    same(after, other)


def test_tied_weights_may_have_either_name():
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        engine, other = make_engine_of(make_model("llama", seed=0)), make_model("llama", seed=1)
        engine.load_weights({name: w for name, w in other.state_dict().items() if name != left_out}, version=1)
        same(engine.start([0], [TEXT]), other)
        assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight


def test_weights_are_copied_not_kept():
    engine, other = make_engine_of(make_model("llama", seed=0)), make_model("llama", seed=1)
    engine.load_weights(other.named_parameters(), version=1)
    expected = engine.start([0], [TEXT])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(engine.start([0], [TEXT]), expected)


def test_slots_are_stopped_because_they_remember_the_old_weights():
    engine = make_engine_of(make_model("llama"))
    engine.start([0, 1], [TEXT, TEXT])
    engine.load_weights(make_model("llama", seed=1).named_parameters(), version=1)
    with pytest.raises(ValueError, match=r"slot 0 holds no text.*the weights were replaced"):
        engine.step([0], [7])


def test_nothing_is_left_of_bad_weights():
    model = make_model("llama")
    good = {name: weight.clone() for name, weight in model.named_parameters()}
    engine = make_engine_of(model)
    engine.load_weights({name: torch.full_like(weight, torch.nan) for name, weight in good.items()}, version=1)
    assert engine.start([0], [[1] * 20]).isnan().all()
    engine.load_weights(good, version=2)
    assert engine.start([0, 1], [[1], [1, 2]]).isfinite().all()
    assert engine.step([0, 1], [3, 4]).isfinite().all()


def test_other_dtypes():
    engine, other = make_engine_of(make_model("llama", seed=0)), make_model("llama", seed=1)
    rounded = {name: weight.detach().to(torch.bfloat16) for name, weight in other.named_parameters()}
    engine.load_weights(rounded, version=1)
    assert getattr(engine, "model", other).dtype == torch.float32
    copy_weights(other, {name: weight.float() for name, weight in rounded.items()})
    same(engine.start([0], [TEXT]), other)


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model = make_model("llama", seed=0)
    engine = make_engine_of(model)
    expected = engine.start([0], [TEXT])
    good = make_model("llama", seed=1).state_dict()

    def without(name):
        return {key: weight for key, weight in good.items() if key != name}

    norm = "model.norm.weight"
    for bad, message in (
        (without(norm), f"missing: {norm}"),
        (
            {key: weight for key, weight in good.items() if "embed" not in key and "lm_head" not in key},
            "missing: model.embed_tokens.weight",
        ),
        ({**good, "model.extra": torch.ones(1)}, "unknown: model.extra .this model has names such as model.embed"),
        ({**good, norm: torch.ones(31)}, rf"{norm} has shape \(31,\), expected \({len(good[norm])},\)"),
        ({**good, "lm_head.weight": good["lm_head.weight"] + 1}, "lm_head.weight are tied in this model"),
        ({}, "missing: .* and 15 more"),
    ):
        with pytest.raises(ValueError, match=f"nothing was changed: .*{message}"):
            engine.load_weights(bad, version=9)
    assert engine.version == 0
    assert engine.lengths[0] == 3
    torch.testing.assert_close(engine.start([0], [TEXT]), expected)


def test_buffers_are_loaded_and_may_be_left_out():
    norm = torch.nn.BatchNorm1d(2)
    copy_weights(norm, {"weight": torch.ones(2), "bias": torch.ones(2)})
    copy_weights(norm, {**norm.state_dict(), "running_mean": torch.full((2,), 3.0)})
    assert norm.running_mean.tolist() == [3, 3]


def test_an_engine_can_share_the_model_that_is_trained():
    model = make_model("llama")
    engine = make_engine_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        episode = engine.generate([TEXT], Sampling(max_new_tokens=5, seed=0))[0]
        scores = engine.log_probs([[*TEXT, *episode.tokens]])[0]
        np.testing.assert_allclose(scores[2:], episode.log_probs, atol=1e-4)
        model.train()
        tokens = torch.tensor([[*TEXT, *episode.tokens]])
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        engine.load_weights(model.named_parameters(), version=engine.version + 1)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "v_proj"]])
def test_lora_adapters_are_sent_merged_and_stay_themselves(targets):
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama", seed=1, tie_word_embeddings=False), config).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    engine = make_engine_of(make_model("llama", seed=0, tie_word_embeddings=False))
    engine.load_weights(merged_weights(model), version=1)
    same(engine.start([0], [TEXT]), model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_weights_without_adapters_are_merged_already():
    model = make_model("llama")
    merged = merged_weights(model)
    assert all(torch.equal(merged[name], weight) for name, weight in model.named_parameters())
