"""A hundred thousand calls of environments, good and bad, beside the slow copy of the task's rules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm_env import TokenEnv, TokenMDP, TokenVectorEnv
from llm_env.tokens.state import END_OF_CODE
from tests.fuzz.wild import LETTERS, PROMPTS, SlowEpisode, Wild

ON_ERROR = -0.75
BAD = ValueError


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of rewards and tools fail here, on purpose."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def random_task(rng: np.random.Generator) -> Wild:
    return Wild(
        when_cut=rng.choice(["score", "bootstrap"]),
        answer=rng.choice([None, "sorry", "?"]),
        talks=bool(rng.random() < 0.8),
        masks=bool(rng.random() < 0.5),
    )


class Beside:
    """An environment's rows and their slow copies."""

    def __init__(self, mdp: TokenMDP, rng: np.random.Generator) -> None:
        self.mdp, self.rng = mdp, rng
        self.slow: list[SlowEpisode | None] = [None] * mdp.num_envs
        self.returns = [0.0] * mdp.num_envs
        self.palette = [*mdp.vocabulary.encode(LETTERS).tolist(), mdp.vocabulary.eos_tokens[0]]
        self.weights = np.array([*[1.0] * len(LETTERS), 0.3]) / (len(LETTERS) + 0.3)

    def begin(self, row: int, prompt_index: int) -> None:
        mdp = self.mdp
        self.slow[row] = SlowEpisode(mdp.vocabulary, mdp.task, prompt_index, mdp.context, mdp.max_new_tokens)  # type: ignore[arg-type]

    def running(self) -> list[int]:
        return [row for row, slow in enumerate(self.slow) if slow is not None and slow.end == "running"]

    def tokens(self, count: int) -> np.ndarray:
        return self.rng.choice(self.palette, size=count, p=self.weights)

    def expect(self, rows: list[int], actions: np.ndarray) -> np.ndarray:
        """What these rows earn, by the slow copies, which take the step."""
        reward = np.zeros(self.mdp.num_envs)
        for row, action in zip(rows, actions.tolist(), strict=True):
            slow = self.slow[row]
            assert slow is not None
            reward[row] = slow.act(action, ON_ERROR)
        return reward

    def check(self) -> None:
        """Every row is what its slow copy is."""
        mdp, state = self.mdp, self.mdp.state
        mask = mdp.action_mask()
        for row, slow in enumerate(self.slow):
            if slow is None:
                continue
            tokens = slow.prompt + slow.written
            assert state.tokens[row, : len(tokens)].tolist() == tokens, (row, slow)
            assert state.length[row] == len(tokens)
            assert (state.tokens[row, len(tokens) :] == mdp.vocabulary.pad_token).all()
            assert state.is_action[row, len(slow.prompt) : len(tokens)].tolist() == slow.is_action
            assert END_OF_CODE[state.end[row]] == slow.end, (row, slow)
            assert mdp.prompt_index[row] == slow.prompt_index
            assert mdp.episode_return[row] == pytest.approx(slow.earned)
            if mask is not None:
                chosen = {letter for letter, token in zip(LETTERS, self.palette, strict=False) if mask[row, token]}
                assert chosen == slow.mask


def misuse(mdp: TokenMDP, beside: Beside, rng: np.random.Generator) -> None:
    """A call that must be refused, and change nothing."""
    running = beside.running()
    ended = [row for row in range(mdp.num_envs) if row not in running]
    calls: list[Any] = [
        lambda: mdp.step(beside.tokens(mdp.num_envs + 1)),
        lambda: mdp.step([[5]] * mdp.num_envs),
        lambda: mdp.reset([mdp.num_envs]),
        lambda: mdp.reset([-1]),
        lambda: mdp.reset([0, 0]),
        lambda: mdp.reset([0], prompt_indices=[len(PROMPTS)]),
        lambda: mdp.reset([0], prompt_indices=[0, 1]),
        lambda: mdp.save([mdp.num_envs]),
        lambda: mdp.restore([0], mdp.save([])),
    ]
    if running:
        calls += [
            lambda: mdp.step([mdp.vocabulary.size], running[:1]),
            lambda: mdp.step([-1], running[:1]),
            lambda: mdp.step([5, 5], [running[0], running[0]]),
            lambda: mdp.step([0.5], running[:1]),
        ]
    if ended:
        calls.append(lambda: mdp.step([5], ended[:1]))
    with pytest.raises((ValueError, TypeError)):
        calls[rng.integers(len(calls))]()


def walk_mdp(seed: int, calls: int) -> None:
    rng = np.random.default_rng(seed)
    num_envs = int(rng.integers(1, 6))
    mdp = TokenMDP(
        random_task(rng),
        num_envs,
        context=int(rng.integers(17, 30)),
        max_new_tokens=int(rng.integers(1, 12)),
        on_reward_error=ON_ERROR,
    )
    beside = Beside(mdp, rng)
    saved: list[tuple[Any, list[SlowEpisode | None]]] = []
    mdp.reset(prompt_indices=[0] * num_envs)
    for row in range(num_envs):
        beside.begin(row, 0)
    for _ in range(calls):
        running = beside.running()
        move = rng.random()
        if move < 0.7 and running:
            rows = sorted(rng.permutation(running)[: rng.integers(1, len(running) + 1)].tolist())
            actions = beside.tokens(len(rows))
            reward = mdp.step(actions, rows)
            expected = beside.expect(rows, actions)
            np.testing.assert_allclose(reward, expected)
            over = [row for row in rows if row not in beside.running()]
            assert sorted(mdp.finished) == over
            for row, episode in mdp.finished.items():
                assert episode.truncated == (not beside.slow[row].terminated)  # type: ignore[union-attr]
        elif move < 0.85:
            rows = rng.permutation(num_envs)[: rng.integers(1, num_envs + 1)].tolist()
            indices = rng.integers(0, len(PROMPTS), len(rows))
            mdp.reset(rows, prompt_indices=indices)
            for row, index in zip(rows, indices.tolist(), strict=True):
                beside.begin(row, index)
        elif move < 0.9:
            rows = rng.permutation(num_envs)[: rng.integers(1, num_envs + 1)].tolist()
            copies = [None if (slow := beside.slow[row]) is None else slow.copied() for row in rows]
            saved = [*saved[-3:], (mdp.save(rows), copies)]
        elif move < 0.95 and saved:
            kept, copies = saved[rng.integers(len(saved))]
            rows = rng.permutation(num_envs)[: len(copies)].tolist()
            if len(copies) == 1:
                rows = rng.permutation(num_envs)[: rng.integers(1, num_envs + 1)].tolist()
                copies = copies * len(rows)
            mdp.restore(rows, kept)
            for row, slow in zip(rows, copies, strict=True):
                assert slow is not None
                beside.slow[row] = slow.copied()
        else:
            misuse(mdp, beside, rng)
        beside.check()
    mdp.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_mdp(seed: int) -> None:
    walk_mdp(seed, calls=1500)


def test_mdp_briefly() -> None:
    for seed in range(100, 106):
        walk_mdp(seed, calls=60)


def walk_vector(seed: int, mode: str, calls: int) -> None:
    """Every step of a vector environment, whose rows begin again by themselves, in one of two ways."""
    rng = np.random.default_rng(seed)
    num_envs = int(rng.integers(1, 6))
    envs = TokenVectorEnv(
        random_task(rng), num_envs, autoreset_mode=mode, context=24, max_new_tokens=int(rng.integers(1, 9)),
        on_reward_error=ON_ERROR,
    )  # fmt: skip
    beside = Beside(envs.mdp, rng)
    _, info = envs.reset(seed=seed)
    for row in range(num_envs):
        beside.begin(row, int(info["prompt_index"][row]))
    ended: list[int] = []
    for _ in range(calls):
        acting = [row for row in range(num_envs) if row not in ended]
        actions = beside.tokens(num_envs)
        _, reward, terminated, truncated, info = envs.step(actions)
        expected = beside.expect(acting, actions[acting])
        np.testing.assert_allclose(reward, expected)
        slow = [each for each in beside.slow if each is not None]
        over = np.array([row in acting and slow[row].end != "running" for row in range(num_envs)])
        finished = np.array([slow[row].terminated for row in range(num_envs)])
        assert terminated.tolist() == (over & finished).tolist()
        assert truncated.tolist() == (over & ~finished).tolist()
        again = ended if mode == "NextStep" else np.flatnonzero(over).tolist()
        for row in again:
            beside.begin(row, int(info["prompt_index"][row]))
        ended = np.flatnonzero(over).tolist() if mode == "NextStep" else []
        beside.check()
    envs.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("seed", range(10))
def test_vector(seed: int, mode: str) -> None:
    walk_vector(seed, mode, calls=1000)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_vector_briefly(mode: str) -> None:
    for seed in range(4):
        walk_vector(seed, mode, calls=50)


def walk_single(seed: int, calls: int) -> None:
    rng = np.random.default_rng(seed)
    env = TokenEnv(random_task(rng), context=24, max_new_tokens=int(rng.integers(1, 9)), on_reward_error=ON_ERROR)
    beside = Beside(env.mdp, rng)
    over = True
    for _ in range(calls):
        if over:
            _, info = env.reset()
            beside.begin(0, int(info["prompt_index"]))
            over = False
        else:
            actions = beside.tokens(1)
            _, reward, terminated, truncated, _ = env.step(int(actions[0]))
            assert reward == pytest.approx(beside.expect([0], actions)[0])
            assert beside.slow[0] is not None
            over = beside.slow[0].end != "running"
            assert (terminated, truncated) == (
                over and beside.slow[0].terminated,
                over and not beside.slow[0].terminated,
            )
        beside.check()
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_single(seed: int) -> None:
    walk_single(seed, calls=2000)
