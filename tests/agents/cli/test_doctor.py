"""`llm-env doctor`: it says what is there, what is missing, and which part does not work."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from agents.cli import main
from agents.run import doctor
from agents.run.doctor import CHECKS, Finding, packages


def states(found: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.state for finding in found}


def test_all_is_well_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The checks are real, and pass."""
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    assert "was killed" not in said.err  # it is what the check is about, and no news
    for what in ("environment", "engine", "learner", "killable rewards"):
        assert f"ok       {what} " in said.out
    assert f"torch {torch.__version__}" in said.out
    assert "GFLOP/s in float32" in said.out


def test_one_that_fails_is_named_and_the_others_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise ValueError("the disk is\nfull")

    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    monkeypatch.setattr(doctor, "CHECKS", {"disk": broken, "other": lambda: "fine"})
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "failed   disk                 ValueError: the disk is\n" in said.out
    assert "ok       other                fine (" in said.out
    assert "1 of the checks failed" in said.err


def test_wrong_log_probs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_env.engines.transformers import TransformersEngine

    honest = TransformersEngine.log_probs
    monkeypatch.setattr(
        TransformersEngine, "log_probs", lambda self, texts: [each - 0.01 for each in honest(self, texts)]
    )
    with pytest.raises(RuntimeError, match=r"log-probs differ by 0\.01"):
        CHECKS["engine"]()


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=1", "nothing-such>=1; extra == 'train'", 'torch>=99; extra == "sb3"', "vllm; extra == 'vllm'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(packages())
    assert states(found) == {"llm-env": "ok", "llm-env[train]": "missing", "llm-env[sb3]": "missing"}
    assert found[1].detail == "nothing-such: pip install 'llm-env[train]'"
    assert "(needs >=99): pip install 'llm-env[sb3]'" in found[2].detail
