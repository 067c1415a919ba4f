import subprocess
import sys

import numpy as np
import pytest

from llm_env import TokenVectorEnv
from llm_env.engines import Engine, engine_names, make_engine, register_engine
from llm_env.engines.transformers import TransformersEngine

from .conftest import AlphabetEngine


def test_by_name():
    engine = make_engine("transformers", "tiny", num_slots=3, context=16)
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine, Engine)
    assert (engine.num_slots, engine.context, engine.vocab_size, engine.version) == (3, 16, 100, 0)
    assert {"transformers", "vllm"} <= set(engine_names())


def test_an_engine_is_passed_through_if_it_is_large_enough():
    engine = AlphabetEngine(num_slots=2, context=8)
    assert isinstance(engine, Engine)
    assert make_engine(engine, num_slots=2, context=8) is engine
    with pytest.raises(ValueError, match="has 2 slots of 8 tokens, but 3 of 8 are needed"):
        make_engine(engine, num_slots=3, context=8)
    with pytest.raises(ValueError, match="but 2 of 9 are needed"):
        make_engine(engine, num_slots=2, context=9)
    with pytest.raises(ValueError, match="made already"):
        make_engine(engine, "tiny", num_slots=2, context=8)


def test_unknown():
    with pytest.raises(ValueError, match=r"unknown engine 'transformer'; did you mean 'transformers'\?"):
        make_engine("transformer", "tiny", num_slots=1, context=8)
    with pytest.raises(ValueError, match=f"unknown engine 'xyz'; Known: {', '.join(engine_names())}"):
        make_engine("xyz", "tiny", num_slots=1, context=8)
    with pytest.raises(ValueError, match="needs a model"):
        make_engine("transformers", num_slots=1, context=8)


@register_engine("alphabet")
class NamedAlphabet(AlphabetEngine):
    def __init__(self, model, *, num_slots, context, note=""):
        super().__init__(num_slots, context)
        self.model, self.note = model, note


def test_a_class_of_ones_own_is_made_by_name():
    engine = make_engine("alphabet", "tiny", num_slots=3, context=16, note="mine")
    assert isinstance(engine, NamedAlphabet)
    assert (engine.num_slots, engine.context, engine.model, engine.note) == (3, 16, "tiny", "mine")
    assert "alphabet" in engine_names()


def test_an_environment_takes_its_name():
    envs = TokenVectorEnv("Copy", num_envs=2, engine="alphabet", observe="logits", context=16)
    observation, _ = envs.reset(seed=0)
    last = [row[length - 1] for row, length in zip(observation["tokens"], observation["length"][:, 0], strict=True)]
    assert isinstance(envs.mdp.observer.engine, NamedAlphabet)
    np.testing.assert_array_equal(observation["logits"].argmax(-1), np.array(last) + 1)
    envs.close()


def test_a_name_that_is_taken_is_refused():
    for taken in ("transformers", "vllm"):  # also while it is not imported
        with pytest.raises(
            ValueError, match=rf"comes with this library \(llm_env.engines.{taken}\): give yours another"
        ):
            register_engine(taken)(NamedAlphabet)
    with pytest.raises(ValueError, match="an engine named 'alphabet' is already registered"):
        register_engine("alphabet")(AlphabetEngine)
    assert isinstance(make_engine("transformers", "tiny", num_slots=1, context=8), TransformersEngine)


def test_listing_the_names_imports_no_engine():
    program = (
        "import sys\n"
        "from llm_env.engines import engine_names\n"
        "print(engine_names(), [name for name in sys.modules if name.startswith('llm_env.engines.transformers')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['transformers', 'vllm'] []\n"
