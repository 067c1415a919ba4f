"""Tokens and the text they stand for."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_env.tokens.arrays import IntArray
from llm_env.tokens.chat import ChatTurns
from llm_env.tokens.stopping import StopMatcher, match_strings, match_tokens

if TYPE_CHECKING:  # importing it for real costs a second, and some of its submodules bring torch along
    import torch
    from transformers import PreTrainedTokenizerBase

StopKey = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]


class Vocabulary:
    """The tokens of a tokenizer and the text they stand for.

    The tokenizer decides which ids there are. Models often have a few rows more, to make their number round. What such
    rows say has no meaning: engines and trainers pass logits through `usable`, so that no softmax sees them.

    Args:
        tokenizer: a transformers tokenizer.
        eos_tokens: the end-of-sequence tokens; by default the tokenizer's one. Chat models often have several.

    Attributes:
        tokenizer: the tokenizer.
        size: token ids go from 0 to `size - 1`.
        unused: `[k]` ids among them that stand for no token; few tokenizers have any.
        bos_token: the token that begins a text, or None.
        eos_tokens: the tokens that end a text.
        pad_token: the padding token; where the tokenizer has none, the first end-of-sequence token, else 0.

    Examples:
        >>> from llm_env.models import load_tokenizer
        >>> vocabulary = Vocabulary(load_tokenizer("tiny"))
        >>> tokens = vocabulary.encode("1+2=")
        >>> len(tokens), vocabulary.decode(tokens)
        (4, '1+2=')
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_tokens: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        # Ids need not be consecutive, so the count of tokens alone may be less than the largest id.
        known = {*self.tokenizer.get_vocab().values(), *self.tokenizer.added_tokens_decoder}
        self.size = 1 + max(known, default=-1)
        self.unused: IntArray = np.setdiff1d(np.arange(self.size), np.fromiter(known, np.int64, len(known)))
        if eos_tokens is None:
            eos = self.tokenizer.eos_token_id
            eos_tokens = () if eos is None else (eos,)
        # A generation config may list tokens that this model does not have, of a larger sibling.
        self.eos_tokens = tuple(int(token) for token in eos_tokens if token < self.size)
        self.bos_token: int | None = self.tokenizer.bos_token_id
        pad = self.tokenizer.pad_token_id
        self.pad_token: int = next(iter(self.eos_tokens), 0) if pad is None else pad
        self._matchers: dict[StopKey, tuple[StopMatcher, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: what can be computed again is left out, and the tokenizer waits until it is used.

        A task takes its vocabulary along into a process that scores its texts, where most never read it; importing
        transformers there would cost a second or more each time that such a process is begun.
        """
        left_out = ("tokenizer", "token_bytes", "_plain_text")
        kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
        pickled = pickle.dumps(self.tokenizer) if "tokenizer" in self.__dict__ else self._pickled
        return {**kept, "_matchers": {}, "_pickled": pickled}

    _pickled: bytes

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which a vocabulary that was pickled reads when it is first used."""
        return pickle.loads(self._pickled)

    def __repr__(self) -> str:
        return f"Vocabulary({type(self.tokenizer).__name__}, size={self.size}, eos_tokens={self.eos_tokens})"

    def check_model(self, rows: int) -> None:
        """Raise unless a model whose output layer has so many rows knows all tokens."""
        if rows < self.size:
            raise ValueError(
                f"the tokenizer has token ids up to {self.size - 1}, but the model has logits for {rows} only: "
                "the tokenizer and the model do not belong together"
            )

    def usable(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., size]` of a model's `[..., V]` logits: without those beyond the tokens, and -inf where ids are unused.

        Examples:
            >>> import torch
            >>> from llm_env.models import load_tokenizer
            >>> Vocabulary(load_tokenizer("tiny")).usable(torch.zeros(2, 128)).shape
            torch.Size([2, 100])
        """
        self.check_model(logits.shape[-1])
        return usable_logits(logits, self.size, self.unused)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> IntArray:
        """The tokens of a text, with the special tokens that the tokenizer itself puts around one, or without."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=add_special_tokens), dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """`encode` of many texts, several times faster than one by one."""
        if not texts:
            return []
        return [np.asarray(ids, dtype=np.int64) for ids in self.tokenizer(list(texts))["input_ids"]]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> IntArray:
        """The tokens of a conversation, up to the point where the assistant begins to answer.

        Args:
            messages: such as `[{"role": "user", "content": "Hello"}]`.
            tools: what the template is told of tools, as JSON schemas.
        """
        self._check_chat()
        tokens = self.tokenizer.apply_chat_template(
            list(messages), list(tools) or None, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return np.asarray(tokens, dtype=np.int64)

    def encode_turn(self, messages: Sequence[Mapping[str, Any]], *, ended: bool) -> IntArray:
        """The tokens between what the assistant has written and where it is to go on, see `ChatTurns`.

        Args:
            messages: what is said to it next.
            ended: whether it has written the token that ends its turn.
        """
        return self.encode(self.turn_text(messages, ended=ended), add_special_tokens=False)

    def turn_text(self, messages: Sequence[Mapping[str, Any]], *, ended: bool) -> str:
        """The text of `encode_turn`, the marks of the turns included."""
        return self._chat_turns.between(messages, ended)

    @cached_property
    def _chat_turns(self) -> ChatTurns:
        self._check_chat()

        def render(messages: Sequence[Mapping[str, Any]], begin: bool) -> str:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begin))

        return ChatTurns(render, [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.eos_tokens])

    def _check_chat(self) -> None:
        if not self.has_chat_template:
            raise ValueError(
                f"the tokenizer ({type(self.tokenizer).__name__}) has no chat template: use a model trained to chat, "
                "set `tokenizer.chat_template`, or write the prompt as plain text and `encode` it"
            )

    def tokens_that_say(self, texts: Iterable[str]) -> IntArray:
        """The tokens whose whole text is one of these."""
        wanted = {text.encode() for text in texts}
        return np.array([token for token, text in enumerate(self.token_bytes) if text in wanted], dtype=np.int64)

    def decode(self, tokens: Sequence[int] | IntArray) -> str:
        """The text of the tokens, without the special ones.

        Where the text of a sequence is simply that of its tokens, one after the other, joining them is several times
        faster than asking the tokenizer.
        """
        ids = tokens.tolist() if isinstance(tokens, np.ndarray) else [int(token) for token in tokens]
        if self._plain_text is None:
            known = [token for token in ids if self.token_bytes[token]]
            return str(self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return b"".join([self._plain_text[token] for token in ids]).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The text of every token as UTF-8 bytes, that of special tokens included.

        A token may be a part of a character. One that begins a word includes the space before it.
        """
        names: list[str | None] = [None] * self.size
        for name, token in self.tokenizer.get_vocab().items():
            names[token] = name
        read = _reader(_decoder_steps(self.tokenizer)) or self._read_after_anchor
        return [b"" if name is None else read(name) for name in names]

    def matchers(self, stop: Sequence[str | Sequence[int]]) -> tuple[StopMatcher, ...]:
        """Matchers for stop sequences, given as strings or as token ids: one for all strings, one for all ids.

        They are kept: building them for a vocabulary of 150 000 tokens takes a good part of a second.

        Examples:
            >>> from llm_env.models import load_tokenizer
            >>> vocabulary = Vocabulary(load_tokenizer("tiny"))
            >>> len(vocabulary.matchers(["END", "\\n\\n", [7, 8]]))
            2
        """
        if isinstance(stop, str):
            raise ValueError(f"stop must be a list of stop sequences; write [{stop!r}], not {stop!r}")
        if not all(isinstance(s, Sequence | np.ndarray) for s in stop):
            raise ValueError(f"each stop sequence must be a string or a list of token ids, got {list(stop)!r}")
        strings = tuple(s for s in stop if isinstance(s, str))
        sequences = tuple(tuple(int(token) for token in s) for s in stop if not isinstance(s, str))
        key = (strings, sequences)
        if key not in self._matchers:
            found = []
            if strings:
                found.append(match_strings(strings, self.token_bytes))
            if sequences:
                found.append(match_tokens(sequences, self.size))
            self._matchers[key] = tuple(found)
        return self._matchers[key]

    @cached_property
    def _plain_text(self) -> list[bytes] | None:
        """What each token adds to a decoded text, or None where that depends on the tokens around it."""
        if {step["type"] for step in _decoder_steps(self.tokenizer)} not in ({"ByteLevel"}, {"Fuse"}):
            return None
        text = list(self.token_bytes)
        for token, added in self.tokenizer.added_tokens_decoder.items():
            if added.special:
                text[token] = b""
        return text

    def _read_after_anchor(self, name: str) -> bytes:
        """Ask an unknown kind of tokenizer what the token adds to a text that has already begun."""
        anchor = self.tokenizer.convert_tokens_to_ids("a")
        if anchor is None or anchor == self.tokenizer.unk_token_id:
            anchor = 0
        both = [anchor, self.tokenizer.convert_tokens_to_ids(name)]
        before, after = (self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (both[:1], both))
        return str(after[len(before) :]).encode()


def usable_logits(logits: torch.Tensor, size: int, unused: IntArray) -> torch.Tensor:
    """`Vocabulary.usable` where there is no vocabulary."""
    logits = logits[..., :size]
    if not len(unused):
        return logits
    import torch

    return logits.index_fill(-1, torch.from_numpy(unused).to(logits.device), -torch.inf)


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]]:
    """How a fast tokenizer turns tokens into text, as the `tokenizers` library writes it in JSON; [] if unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _reader(steps: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """A function from the name of a token to its text, for the usual decoders."""
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _read_byte_level
    if kinds == {"Fuse"}:
        return str.encode
    is_sentencepiece = "Metaspace" in kinds or any(
        step["type"] == "Replace" and step["pattern"] == {"String": "▁"} and step["content"] == " " for step in steps
    )
    if is_sentencepiece and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return _read_byte_fallback if "ByteFallback" in kinds else _read_sentencepiece
    return None


def _read_sentencepiece(name: str) -> bytes:
    return name.replace("▁", " ").encode()


def _read_byte_fallback(name: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else _read_sentencepiece(name)


def _read_byte_level(name: str) -> bytes:
    # A token added by hand may hold characters that stand for no byte; the tokenizer then takes its name literally.
    values = [_BYTE_OF_CHARACTER.get(character, -1) for character in name]
    return name.encode() if -1 in values else bytes(values)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print as themselves in Latin-1 do so; the others come, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
