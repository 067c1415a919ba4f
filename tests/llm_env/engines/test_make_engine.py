import pytest

from llm_env.engines import Engine, engine_names, make_engine
from llm_env.engines.transformers import TransformersEngine

from .conftest import AlphabetEngine


def test_by_name():
    engine = make_engine("transformers", "tiny", num_slots=3, context=16)
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine, Engine)
    assert (engine.num_slots, engine.context, engine.vocab_size, engine.version) == (3, 16, 100, 0)
    assert engine_names() == ["transformers", "vllm"]


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
    with pytest.raises(ValueError, match=r"unknown engine 'transformer'. Did you mean 'transformers'\?"):
        make_engine("transformer", "tiny", num_slots=1, context=8)
    with pytest.raises(ValueError, match=r"unknown engine 'xyz'\. Known engines are transformers"):
        make_engine("xyz", "tiny", num_slots=1, context=8)
    with pytest.raises(ValueError, match="needs a model"):
        make_engine("transformers", num_slots=1, context=8)
