import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm_env.models import load_tokenizer
from llm_env.tokens.vocabulary import Vocabulary

CORPUS = ["Hello world, hello wörld 語語 😀! 12 + 34 = 46\n\n  def f(x):\n\treturn x", "the cat sat on the mat " * 3]


def byte_level():
    """As GPT-2, Llama 3, Qwen and SmolLM have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("two words 語", special=False), AddedToken("é", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback():
    """As Llama 2 and Mistral have it: "▁" for spaces, <0xNN> for what has no token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, limit_alphabet=40, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", bos_token="<s>")
    return fast


def word_pieces():
    """Some other kind, which this library knows nothing about."""
    words = ["<unk>", "a", "the", "cat", "##s", "mat"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


MAKERS = {
    "tiny": lambda: load_tokenizer("tiny"),
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word_pieces": word_pieces,
}
VOCABULARIES = {name: Vocabulary(make()) for name, make in MAKERS.items()}


def plain(vocabulary, tokens, skip=True):
    return vocabulary.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(MAKERS)), data=st.data())
def test_decode_is_what_the_tokenizer_says(name, data):
    vocabulary = VOCABULARIES[name]
    tokens = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=12))
    assert vocabulary.decode(tokens) == plain(vocabulary, tokens)
    assert vocabulary.decode(np.array(tokens, dtype=np.int64)) == plain(vocabulary, tokens)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["tiny", "byte_level"]), data=st.data())
def test_token_bytes_join_to_the_whole_text_specials_included(name, data):
    vocabulary = VOCABULARIES[name]
    tokens = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=12))
    joined = b"".join(vocabulary.token_bytes[token] for token in tokens).decode(errors="replace")
    assert joined == plain(vocabulary, tokens, skip=False)


# Nothing that could spell a special token, and not the "é" added by hand above: even `decode` takes it for a byte.
ORDINARY = st.characters(exclude_categories=["Cs"], exclude_characters="<é")


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["byte_level", "byte_fallback"]), text=st.text(ORDINARY, max_size=20))
def test_token_bytes_of_any_text(name, text):
    vocabulary = VOCABULARIES[name]
    joined = b"".join(vocabulary.token_bytes[token] for token in vocabulary.encode(text)).decode()
    if name == "byte_fallback" and text:
        text = f" {text}".replace("▁", " ")
    assert joined == text


def test_token_bytes_by_hand():
    fallback = VOCABULARIES["byte_fallback"]
    assert fallback.token_bytes[3 + 0xE8] == b"\xe8"
    assert fallback.token_bytes[fallback.tokenizer.convert_tokens_to_ids("</s>")] == b"</s>"
    assert fallback.token_bytes[fallback.tokenizer.convert_tokens_to_ids("▁")] == b" "
    level = VOCABULARIES["byte_level"]
    assert level.token_bytes[level.tokenizer.convert_tokens_to_ids("two words 語")] == "two words 語".encode()
    assert b" the" in level.token_bytes
    assert VOCABULARIES["tiny"].token_bytes[:6] == [b"<pad>", b"<bos>", b"<eos>", b"<unk>", b"\n", b" "]
    assert VOCABULARIES["word_pieces"].token_bytes == [b" <unk>", b" a", b" the", b" cat", b"s", b" mat"]


@pytest.mark.parametrize("name", ["tiny", "byte_level", "byte_fallback"])
def test_a_stop_string_is_found_where_the_text_has_it(name):
    vocabulary = VOCABULARIES[name]
    (matcher,) = vocabulary.matchers(["cat sat", "o wor"])
    for text, expected in (("the cat sat on", True), ("the cat  sat", False), ("hello world", True), ("xyz", False)):
        state = 0
        for token in vocabulary.encode(text):
            state = matcher.next_state[state, token]
        assert (state == matcher.found) == expected


def test_matchers_are_kept():
    vocabulary = Vocabulary(load_tokenizer("tiny"))
    first = vocabulary.matchers(["ab", "c", [5, 6]])
    assert len(first) == 2
    assert vocabulary.matchers(("ab", "c", (5, 6))) is first
    assert vocabulary.matchers(["ab", np.array([5, 6]), "c"]) is first
    assert vocabulary.matchers(["ab"]) is not first
    assert vocabulary.matchers([]) == ()
    with pytest.raises(ValueError, match=r"write \['END'\], not 'END'"):
        vocabulary.matchers("END")


def test_special_tokens():
    tiny = VOCABULARIES["tiny"]
    assert (tiny.pad_token, tiny.bos_token, tiny.eos_tokens, tiny.size) == (0, 1, (2,), 100)
    level = VOCABULARIES["byte_level"]
    assert level.bos_token is None
    assert level.pad_token == level.eos_tokens[0] == level.tokenizer.convert_tokens_to_ids("<end>")
    pieces = VOCABULARIES["word_pieces"]
    assert (pieces.pad_token, pieces.eos_tokens) == (0, ())
    assert Vocabulary(load_tokenizer("tiny"), eos_tokens=[7, 8]).eos_tokens == (7, 8)


def test_logits_beyond_the_tokens_are_not_usable():
    vocabulary = Vocabulary(load_tokenizer("tiny"))
    logits = torch.arange(2 * 128.0).view(2, 128)
    assert torch.equal(vocabulary.usable(logits), logits[:, :100])
    assert vocabulary.usable(logits[:, :100]) is not None
    assert not len(vocabulary.unused)
    with pytest.raises(ValueError, match=r"ids up to 99, but the model has logits for 50 only.*do not belong together"):
        vocabulary.usable(logits[:, :50])


def test_ids_between_those_of_tokens_are_unused():
    vocabulary = Vocabulary(with_holes())
    assert vocabulary.size == len(vocabulary.token_bytes) == 9
    assert vocabulary.unused.tolist() == [3, 5, 6, 7]
    found = vocabulary.usable(torch.zeros(1, 12))
    assert found.tolist() == [[0, 0, 0, -np.inf, 0, -np.inf, -np.inf, -np.inf, 0]]
    assert vocabulary.decode([1, 5, 2, 3, 4, 8]) == "abc"
    assert vocabulary.matchers(["x"])[0].next_state.shape[1] == 9


def with_holes():
    """The letters a, b and c are the tokens 1, 2 and 4; a special token was added far behind them."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 4, "<end>": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="?")


def test_encode():
    tokens = VOCABULARIES["tiny"].encode("ab")
    assert tokens.dtype == np.int64
    assert tokens.shape == (2,)
    assert VOCABULARIES["tiny"].encode("").shape == (0,)


def test_encode_chat():
    tokenizer = load_tokenizer("tiny")
    vocabulary = Vocabulary(tokenizer)
    messages = [{"role": "user", "content": "Hi"}]
    assert not vocabulary.has_chat_template
    with pytest.raises(ValueError, match="has no chat template: use a model trained to chat"):
        vocabulary.encode_chat(messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert vocabulary.has_chat_template
    tokens = vocabulary.encode_chat(messages)
    assert tokens.dtype == np.int64
    assert vocabulary.decode(tokens) == "user: Hi\nassistant:"


@pytest.mark.slow
def test_a_real_tokenizer():
    pytest.importorskip("gguf")
    vocabulary = Vocabulary(load_tokenizer("smollm2-135m"))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        tokens = rng.integers(0, vocabulary.size, rng.integers(1, 30))
        assert vocabulary.decode(tokens) == plain(vocabulary, tokens.tolist())


def test_a_pickled_vocabulary_reads_its_tokenizer_when_it_is_used():
    vocabulary = Vocabulary(load_tokenizer("tiny"), eos_tokens=[2, 5])
    small = len(pickle.dumps(vocabulary))
    vocabulary.matchers(["END"])
    assert vocabulary.token_bytes[5]
    assert len(pickle.dumps(vocabulary)) == small  # what can be computed again stays at home
    once = pickle.loads(pickle.dumps(vocabulary))
    for copy in (pickle.loads(pickle.dumps(once)), once):
        assert "tokenizer" not in vars(copy)
        assert (copy.size, copy.eos_tokens, copy.pad_token) == (100, (2, 5), vocabulary.pad_token)
        assert copy.decode(copy.encode("1+2=")) == "1+2="
        assert copy.token_bytes == vocabulary.token_bytes
        assert len(copy.matchers(["END"])) == 1
