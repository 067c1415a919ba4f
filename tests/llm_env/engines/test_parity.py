"""The check after a weight update: what it lets pass, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_env.engines.parity import ParityCheck, StaleWeightsError
from llm_env.models import load_model, load_vocabulary, model_folder

TOLERANCE = 0.1


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


def check_with(model, errors: list[float]) -> float:
    """An engine whose log-probs of the texts are each off by so much."""
    check = ParityCheck(str(model_folder("tiny")), load_vocabulary("tiny"), torch.float32, TOLERANCE)
    check.sequences = [np.arange(4 + row, 12 + row) for row in range(len(errors))]

    def score(sequences):
        with torch.no_grad():
            tokens = torch.tensor(np.stack(sequences))
            log_probs = model(tokens[:, :-1]).logits.log_softmax(-1)
        exact = log_probs.gather(-1, tokens[:, 1:, None])[..., 0].numpy()
        return [row + error for row, error in zip(exact, errors, strict=True)]

    return check.check(check.by_first_name(dict(model.named_parameters())), score)


def test_rounding_passes(model):
    assert check_with(model, [0.05, 0.04, 0.06, 0.05]) == pytest.approx(0.06, abs=1e-4)


def test_one_text_that_the_model_finds_odd_passes(model):
    """Seen in training: one of four texts off by 0.37 in bfloat16, while the others were off by 0.04."""
    assert check_with(model, [0.37, 0.043, 0.053, 0.034]) == pytest.approx(0.37, abs=1e-4)


@pytest.mark.parametrize("errors", [[0.3, 0.2, 0.5, 0.2], [0.05, 0.04, 1.5, 0.05], [0.0, 0.0, float("nan"), 0.0]])
def test_stale_weights_do_not(model, errors: list[float]):
    with pytest.raises(StaleWeightsError, match="disagree by"):
        check_with(model, errors)
