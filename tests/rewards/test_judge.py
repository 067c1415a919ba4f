"""A judge: a real server of a few lines, whose answers, failures and delays are known."""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rewards import Judge, Rollout, make_reward
from rewards.judge import JudgeError


class Server(ThreadingHTTPServer):
    """Marks an answer by its number of a's; of two it prefers the one with more, or the first if they are alike."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.says: str | None = None
        super().__init__(("127.0.0.1", 0), Handler)

    def answer(self, user: str) -> str:
        if self.says is not None:
            return self.says
        if "Answer A:" in user:
            one, other = re.findall(r"Answer [AB]:\n(.*)", user)
            return f"Better: {'A' if one.count('a') >= other.count('a') else 'B'}"
        return f"Some a's.\n**Score:** {user.rpartition('Answer:')[2].count('a')}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status = self.server.failures.pop() if self.server.failures else 200
        text = self.server.answer(body["messages"][-1]["content"])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("rewards.judge.time.sleep", lambda seconds: None)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge(server: Server, **given: Any) -> Judge:
    return Judge(f"http://127.0.0.1:{server.server_port}/v1/", "some-model", **given)


def test_marks(server: Server) -> None:
    texts = [Rollout.of(text, prompt="Say a: ") for text in ("a", "aaaaaaaaaa", "b")]
    scores = judge(server, rubric="Count the letter.")(texts)
    assert [score.value for score in scores] == [0.0, 1.0, 0.0]
    assert [score.parts["unread"] for score in scores] == [0.0, 0.0, 1.0]  # a mark of 0 is none from 1 to 10
    asked = next(body for body in server.asked if "aaaa" in body["messages"][1]["content"])
    assert asked["model"] == "some-model"
    assert asked["temperature"] == 0
    assert "Count the letter." in asked["messages"][0]["content"]
    assert "a number from 1 to 10" in asked["messages"][0]["content"]
    assert asked["messages"][1]["content"] == "Prompt:\nSay a: \n\nAnswer:\naaaaaaaaaa"


def test_nothing_is_asked_twice(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "answers.sqlite")
    first = judge(server, cache=path)
    text = Rollout.of("aaa")
    assert first([text]) == first([text])
    first.close()
    again = judge(server, cache=path)
    assert again([text])[0].value == pytest.approx(2 / 9)
    assert len(server.asked) == 1
    judge(server, cache=path, rubric="Another.")([text])
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("one", "other", "better"), [("aa", "b", 1.0), ("b", "aa", 0.0), ("a", "a", 0.5), ("b", "c", 0.5)]
)
def test_both_orders_are_compared(server: Server, one: str, other: str, better: float) -> None:
    assert judge(server).compare("Say a: ", one, other) == better
    assert len(server.asked) == 2 - (one == other)


def test_pairs_by_its_comparison(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores say the opposite, and are not asked. Where neither is better there is no pair, and equal texts cost no
    question.
    """
    from agents.cli import main

    rows = [
        {"prompt": prompt, "text": text, "score": -float(text.count("a"))}
        for prompt, texts in {"one": ["a", "aaa"], "two": ["b", "c"], "three": ["aa", "aa"]}.items()
        for text in texts
    ]
    texts, out = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = ["url", f"http://127.0.0.1:{server.server_port}/v1", "model", "some-model"]
    assert main(["pairs", "--texts", str(texts), "--out", str(out), "--judge", *address]) == 0
    assert json.loads(out.read_text()) == {"prompt": "one", "chosen": "aaa", "rejected": "a"}
    assert "1 pairs, 0 of them the wrong way round, 2 ties left out" in capsys.readouterr().out
    assert len(server.asked) == 4
    assert main(["pairs", "--texts", str(texts), "--out", str(out), "--judge", "url", "here", "model", "x"]) == 2
    assert "url must be that of a server" in capsys.readouterr().err


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.failures = [503, 429]
    assert judge(server)([Rollout.of("aaa")])[0].value == pytest.approx(2 / 9)
    assert len(server.asked) == 3


@pytest.mark.parametrize(("failures", "asked"), [([500] * 9, 3), ([401], 1)])
def test_one_that_does_not_answer(server: Server, failures: list[int], asked: int) -> None:
    server.failures = failures
    with pytest.raises(JudgeError, match=rf"does not answer: HTTP {failures[0]}"):
        judge(server, retries=2)([Rollout.of("aaa")])
    assert len(server.asked) == asked


def test_no_server() -> None:
    with pytest.raises(JudgeError, match="does not answer: URLError"):
        Judge("http://127.0.0.1:9/v1", "m", retries=0)([Rollout.of("a")])


@pytest.mark.parametrize("says", ["", "I would not say.", "Score: 11", "Score: many"])
def test_what_cannot_be_read_is_counted(server: Server, says: str) -> None:
    server.says = says
    [score] = judge(server, unread=-1.0)([Rollout.of("aaa")])
    assert (score.value, score.parts["unread"]) == (-1.0, 1.0)
    assert judge(server).compare("?", "a", "b") == 0.5


@pytest.mark.parametrize(("good", "warned"), [(0, 1), (1, 0)])
def test_one_that_never_gives_a_mark_is_called_so(
    server: Server, caplog: pytest.LogCaptureFixture, good: int, warned: int
) -> None:
    asked = judge(server, workers=1)
    asked([Rollout.of("aaa")] * good)
    server.says = "Boil an egg."
    for begin in (0, 25):
        asked([Rollout.of("b" * (begin + number)) for number in range(25)])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert all("None of the first 20 answers of the judge some-model" in each and "Boil" in each for each in said)


def test_a_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no environment variable JUDGE_KEY"):
        judge(server, key="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "open sesame")
    judge(server, key="JUDGE_KEY")([Rollout.of("aaa")])
    assert server.keys == ["Bearer open sesame"]


def test_by_name_and_in_another_process(server: Server) -> None:
    made = make_reward("judge", {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "high": 4})
    copy = pickle.loads(pickle.dumps(made))
    assert copy([Rollout.of("aaaa")]) == made([Rollout.of("aaaa")])
    assert made([Rollout.of("aaaa")])[0].value == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [({"low": 3, "high": 3}, "low must be below high"), ({"workers": 0}, "workers and max_tokens must be at least 1")],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge("http://localhost/v1", "m", **given)
    with pytest.raises(ValueError, match="url must be that of a server"):
        Judge("localhost", "m")
