"""A curriculum in a run: it goes on where it stood."""

from __future__ import annotations

from pathlib import Path

from agents import TrainConfig, build


def test_a_resumed_run_deals_what_it_would_have_dealt(tmp_path: Path) -> None:
    config = TrainConfig(seed=0, iterations=4).replace(
        task__name="Curriculum",
        task__args={"tasks": "Reverse", "vary": "length", "levels": "1,2,3", "alphabet": "ab", "target": 0.1},
        rollout__batch_size=16,
    )
    whole, first, second = (build(config) for _ in range(3))
    expected = [whole.algorithm.collector.collect().data["tokens"].tolist() for _ in range(4)]
    assert [first.algorithm.collector.collect().data["tokens"].tolist() for _ in range(2)] == expected[:2]
    state = first.algorithm.collector.state_dict()
    assert state["task"]["level"] > 0
    second.algorithm.collector.load_state_dict(state)
    assert [second.algorithm.collector.collect().data["tokens"].tolist() for _ in range(2)] == expected[2:]
    for run in (whole, first, second):
        run.close()
