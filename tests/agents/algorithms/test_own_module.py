"""A user's own module brings an algorithm, a loss, a loss term and an advantage estimator; nothing of ours changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.algorithms.registry import check_algorithm
from agents.cli.options import read_options
from agents.config.files import ConfigError
from tests.agents.runs import Config, learn

SOURCE = '''
from agents import Algorithm, TokenLoss, register_advantage, register_algorithm, register_loss, register_term


@register_loss("my_signed")
class Signed(TokenLoss):
    """Only whether an advantage is positive counts."""

    settings = ("loss.clip_low",)

    def gain(self, log_prob, old_log_prob, advantage):
        sign = advantage.sign() * self.config.clip_low
        return log_prob * sign, {"my/positive": (sign > 0).float()}


@register_term("my_surprise")
def surprise(log_prob, distribution, data):
    return -log_prob


@register_advantage("my_return", settings=("advantage.gamma",))
def plain_return(data, reward, config):
    return config.gamma * reward.sum(1, keepdim=True) * data["mask"], None


@register_algorithm("my_algorithm")
class Mine(Algorithm):
    loss_kind = "my_signed"
    advantage_kind = "my_return"
    has_critic = False

    def __init__(self, *parts, factor=1.0, **more):
        super().__init__(*parts, **more)
        self.factor = factor

    @classmethod
    def problems(cls, config):
        if config.rollout.batch_size < 2:
            yield "--rollout.batch-size is 1, but mine needs two"

    def advantages(self, data, reward):
        advantage, _ = super().advantages(data, reward)
        return self.factor * advantage, None
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file in the current folder, which is not on the path."""
    (tmp_path / "my_research.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield "my_research"
    sys.modules.pop("my_research", None)


# The settings of a critic as they are by default, for small runs have others.
NO_CRITIC: dict[str, object] = {
    "model__critic": "fitted",
    "critic__epochs": 4,
    "critic__minibatches": 4,
    "critic__learning_rate": 3e-4,
}


def test_each_is_used(config: Config, module: str) -> None:
    base = config(module=module, iterations=2)
    _, rows = learn(base.replace(loss__kind="my_signed", loss__clip_low=0.5))
    assert 0 < rows[0]["my/positive"] < 1
    assert rows[0]["value/loss"] > 0
    _, rows = learn(base.replace(loss__terms={"my_surprise": 0.25}))
    assert rows[0]["policy/my_surprise_loss"] > 0.25  # a nat or more for each token
    own = base.replace(**NO_CRITIC, algo="my_algorithm", advantage__gamma=0.5, algo_args={"factor": -2})
    run, rows = learn(own)
    assert type(run.algorithm).__name__ == "Mine"
    assert not [name for name in rows[1] if name.startswith("value/")]
    assert run.algorithm.factor == -2  # type: ignore[attr-defined]
    assert rows[0]["my/positive"] == 0
    assert rows[0]["policy/loss"] != 0


def test_an_estimator_is_chosen_by_name(config: Config, module: str) -> None:
    with pytest.raises(ConfigError, match=r"--advantage.kind is my_return, but --algo ppo has a critic"):
        check_algorithm(config(module=module, advantage__kind="my_return"))


def test_they_are_refused_what_they_do_not_read(config: Config, module: str) -> None:
    base = config(module=module).replace(**NO_CRITIC)
    own = base.replace(algo="my_algorithm", rollout__batch_size=1, loss__clip_high=0.5, algo_args={"fact": 1})
    with pytest.raises(ConfigError, match=r"(?s)mine needs two.*no argument 'fact'; did you.*--loss.clip-high is 0.5"):
        check_algorithm(own)


def test_from_the_command_line(module: str) -> None:
    options = read_options(["--module", module, "--algo", "my_algorithm", "--algo-args", "factor", "3"])
    assert options.settings.algo_args == {"factor": 3}
    options = read_options(["--module", module, "--loss.terms", "my_surprise", "1", "--loss.kind", "my_signed"])
    assert options.settings.loss.terms == {"my_surprise": 1.0}
    with pytest.raises(ConfigError, match="--module is no_such_module, but Python finds no module"):
        read_options(["--module", "no_such_module", "--algo", "my_algorithm"])
