"""A policy from pairs, by direct preference optimisation."""

from __future__ import annotations

import json

import torch

from agents.config import LoraConfig, ModelConfig
from agents.config.files import ConfigError
from agents.config.preferences import DPOConfig
from agents.networks.network import Network
from agents.preferences.dpo import DPOTrainer
from agents.run.pairs import PairRun, begin
from agents.run.parts import seed_everything
from llm_env.files import replace_file, replace_folder
from llm_env.models import load_model, load_tokenizer, load_vocabulary
from rewards.reward_model import quietly

RESULTS = "dpo.json"
"""What was measured of the model, beside it."""


def train_dpo(config: DPOConfig, resume: bool = False) -> dict[str, float]:
    """Train a policy on pairs; what was measured of it.

    Args:
        config: how.
        resume: go on where the same command was stopped.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> rows = [{"prompt": f"{n}: ", "chosen": "ab", "rejected": "cd"} for n in range(40)]
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
        >>> config = DPOConfig(folder / "pairs.jsonl", out=folder / "dpo", batch_size=12, learning_rate=1e-3)
        >>> train_dpo(config)["accuracy"]
        36 pairs to learn from, 4 held out
        step 1 of 3 ...
        1.0
    """
    both = config.loss == "ipo" and config.smoothing > 0
    wrong = [f"--smoothing is {config.smoothing}, which the loss ipo has no use for: leave it out"] if both else []
    train, test = begin(config, resume, wrong)
    if (config.out / RESULTS).is_file():
        raise ConfigError(f"the run in {config.out} is done")
    seed_everything(config.seed)
    tokenizer, vocabulary = load_tokenizer(config.model), load_vocabulary(config.model)
    how = ModelConfig(
        name=config.model, critic="shared", hints=False, reference="penalty", lora=LoraConfig(rank=config.lora_rank),
        autocast="on" if config.bfloat16 else "off",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.model, dtype=torch.float32, device=device, seed=config.seed)
    network = Network(model, how, vocabulary=vocabulary).eval()

    def export(measured: dict[str, float]) -> None:
        with replace_folder(config.out / "model") as new, quietly():
            network.export(new, tokenizer)

    trainer = DPOTrainer(config, network, vocabulary, train, test)
    best = PairRun(trainer, config.out / "checkpoints", "", export).go()
    found = {"pairs": len(train), "held_out": len(test), **best}
    with replace_file(config.out / RESULTS) as new:
        new.write_text(json.dumps(found, indent=2) + "\n")
    return found
