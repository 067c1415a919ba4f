"""Tools: calls, their answers, what goes wrong, and what an episode is worth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llm_env import TokenMDP
from llm_env.models import load_tokenizer
from llm_env.tasks import CalculatorSums, Tools, register_tool
from llm_env.tasks.calls import TemplateCalls
from llm_env.tasks.search import Search
from llm_env.tokens.vocabulary import Vocabulary
from rewards import ExactMatch, NumericMatch, Rollout

CALL = "<calculator>2+3</calculator>"


@register_tool("test_broken")
def broken(text: str) -> str:
    raise RuntimeError("no line")


@register_tool("test_long")
def long(text: str) -> str:
    """Says a lot."""
    return "x" * 1000


def play(mdp: TokenMDP, written: list[str], end: bool = True) -> Rollout:
    """One episode: each text is written as it is; at last comes the end."""
    mdp.reset(seed=0)
    last = mdp.rollout(0)
    tokens = [token for text in written for token in mdp.vocabulary.encode(text, add_special_tokens=False).tolist()]
    for token in [*tokens, *(mdp.vocabulary.eos_tokens[:1] if end else ())]:
        assert mdp.episodes.state.running[0], "the episode was over before"
        mdp.step([int(token)])
        last = mdp.rollout(0)
    return last


def texts(rollout: Rollout) -> list[str]:
    return [turn.text for turn in rollout.turns]


def test_an_episode_with_a_call_is_worth_its_answer() -> None:
    mdp = TokenMDP(CalculatorSums(digits=2))
    mdp.reset(seed=0)
    facts = mdp.prompt(0).metadata
    call, answer = facts["turns"]
    rollout = play(mdp, [call, answer])
    assert texts(rollout) == [call, f"<result>{facts['answer']}</result>", answer]
    [score] = mdp.reward([rollout])
    assert (score.value, score.parts["calls"], score.parts["refused"]) == (1.0, 1.0, 0.0)
    [wrong] = mdp.reward([play(mdp, [call, "1"])])
    assert (wrong.value, wrong.parts["calls"]) == (0.0, 1.0)
    [alone] = mdp.reward([play(mdp, [answer])])
    assert (alone.value, alone.parts["calls"]) == (1.0, 0.0)  # tools may be left alone


@pytest.mark.parametrize(
    ("written", "reply"),
    [
        ("so <calculator> (2 + 3) * 4 </calculator>", "<result>20</result>"),
        ("<calculator>1/0</calculator>", "<result>error: division by zero: '1/0'</result>"),
        ("<calculator>two</calculator>", "<result>error: not arithmetic: 'two'</result>"),
        ("2+3</calculator>", "<result>error: write <calculator>...</calculator></result>"),
        ("<calculator>2<calculator>7</calculator>", "<result>7</result>"),
        ("<test_long></test_long>", f"<result>{'x' * 20}</result>"),
        ("<calculator>" + "1+" * 200 + "1</calculator>", "<result>error: not arithmeti</result>"),
        ("5", None),
        ("<calculator>2+3", None),
    ],
)
def test_replies(written: str, reply: str | None) -> None:
    task = Tools("Addition", tools=["calculator", "test_long"], longest=64 if "error" in str(reply) else 20)
    if reply is not None and "arithmeti<" in reply:
        task.longest = 20
    assert task.reply(Rollout.of(written)) == reply


def test_calls_run_out_and_one_that_goes_on_calling_is_ended() -> None:
    mdp = TokenMDP(Tools("Addition", calls=2, call_tokens=80, explain=False))
    rollout = play(mdp, [CALL] * 4, end=False)
    assert texts(rollout)[1::2] == ["<result>5</result>"] * 2 + [
        "<result>error: no calls are left; answer now</result>"
    ]
    assert not mdp.episodes.state.running[0]
    [score] = mdp.reward([rollout])
    assert (score.value, score.parts["calls"], score.parts["refused"]) == (0.0, 3.0, 1.0)


def test_a_tool_that_breaks_is_counted_and_the_episode_goes_on() -> None:
    mdp = TokenMDP(Tools("Addition", tools="test_broken", explain=False))
    rollout = play(mdp, ["<test_broken></test_broken>", "5"])
    assert texts(rollout)[1] == "<result>error: the tool has failed</result>"
    assert mdp.task.replies.num_failures == 1


def test_a_result_is_no_answer() -> None:
    """Of a text that was cut off behind one, though it is the right number."""
    task = Tools("Dataset", train=[{"prompt": "2+3=", "answer": 5}] * 2, reward=NumericMatch(), explain=False)
    [score] = TokenMDP(task).reward([Rollout.of([CALL, "<result>5</result>"], metadata={"answer": 5}, end="budget")])
    assert score.value == 0.0
    [score] = TokenMDP(task).reward([Rollout.of([CALL, "<result>5</result>", "5"], metadata={"answer": 5})])
    assert score.value == 1.0


def test_rewards_of_letters_stand_where_these_were_written() -> None:
    """The other task pays 1/6 for each of five characters and the end; before them stand the tokens of the call."""
    mdp = TokenMDP(CalculatorSums(digits=4, dense=True))
    mdp.reset(seed=0)
    call, answer = mdp.prompt(0).metadata["turns"]
    [score] = mdp.reward([play(mdp, [call, answer])])
    assert score.per_token is not None
    places = len(answer) + 1
    assert score.per_token.tolist() == pytest.approx([0.0] * len(call) + [1 / places] * places)
    assert score.total == pytest.approx(1.0)


def test_the_explanation_goes_ahead_of_text_and_of_messages() -> None:
    assert Tools("Addition").prompts("test")[0].identity.startswith("You may use these tools as often as 3 times")
    messages = [{"role": "user", "content": "How many?"}]
    task = Tools("Dataset", train=[{"prompt": messages}] * 2, reward=lambda rollout: 0.0, calls=1)
    prompt = task.prompts("train")[0].text
    assert [message["role"] for message in prompt if not isinstance(message, str)] == ["system", "user"]
    assert "these tools once" in prompt[0]["content"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": "calculater"}, "unknown tool 'calculater'; did you mean 'calculator'"),
        ({"tools": []}, "expected at least one tool"),
        ({"calls": 0}, "calls=0"),
        ({"task": "Maze"}, "the task Maze, which has `reply` itself"),
        ({"digits": 2, "dense": 3, "sides": 1}, "no argument 'sides'"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, LookupError), match=message):
        Tools(**arguments)


def test_a_reward_set_on_it_sees_the_answer_alone() -> None:
    task = Tools("Dataset", train=[{"prompt": "1+1=", "answer": 2}] * 2, explain=False)
    with pytest.raises(NotImplementedError, match="the task Dataset has neither"):
        task.as_reward()
    task.reward = ExactMatch()
    mdp = TokenMDP(task)
    [score] = mdp.reward([play(mdp, ["<calculator>1+1</calculator>", "2"])])
    assert (score.value, score.parts["exact_match"]) == (1.0, 1.0)


def test_names_of_tools() -> None:
    with pytest.raises(ValueError, match=r"must be like 'calculator', got 'My tool'"):
        register_tool("My tool")


class TestMoreTools:
    def test_python(self) -> None:
        pytest.importorskip("pydantic_monty")
        task = Tools("Addition", tools="python,calculator")
        assert task.reply(Rollout.of("<python>print(sum(range(5)))</python>")) == "<result>10</result>"
        reply = task.reply(Rollout.of("<python>print(7)\n1 / 0</python>"))
        assert reply == "<result>error: ZeroDivisionError: division by zero</result>"

    def test_search(self, tmp_path: Path) -> None:
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text('"Paris is in France."\n{"text": "Rome is in Italy."}\n')
        task = Tools("Addition", tools="", corpus=str(corpus))
        assert list(task.tools) == ["search"]
        assert "<search>...</search> The document that fits" in task.prompts("test")[0].text
        assert task.reply(Rollout.of("<search>Where is Rome?</search>")) == "<result>Rome is in Italy.</result>"
        nothing = task.reply(Rollout.of("<search>qqq</search>"))
        assert nothing == "<result>error: nothing found; use other words</result>"

    def test_the_ranking_is_bm25(self) -> None:
        """By hand: two documents of 2 and 4 words, mean 3; the word is in one of them, once."""
        search = Search(["a b", "c d d e"])
        rarity = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
        assert search._score(0, ["a"]) == pytest.approx(rarity * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 3)))
        assert search._score(1, ["d"]) == pytest.approx(rarity * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 4 / 3)))
        assert search._score(1, ["a"]) == 0

    def test_no_documents(self) -> None:
        with pytest.raises(ValueError, match="there are no documents"):
            Search([])

    def test_functions_of_ones_own(self) -> None:
        task = Tools("Addition", tools={"shout": str.upper})
        assert task.reply(Rollout.of("<shout>abc</shout>")) == "<result>ABC</result>"


# In the manner of Qwen's: what tools there are goes ahead of everything, and what they answer is said by the user.
TEMPLATE = (
    "{% if tools %}[system]{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ eos_token }}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}[user]<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class TestTemplate:
    """Calls as a model's chat template teaches them."""

    @pytest.fixture
    def mdp(self) -> TokenMDP:
        tokenizer = load_tokenizer("tiny")
        tokenizer.chat_template = TEMPLATE
        task = Tools("Addition", tools="calculator,test_broken", template=True, calls=2, call_tokens=80, digits=2)
        return TokenMDP(task, model=Vocabulary(tokenizer))

    def shown(self, mdp: TokenMDP) -> str:
        return str(mdp.vocabulary.tokenizer.decode(mdp.state.tokens[0, : mdp.state.length[0]]))

    def test_the_template_says_what_tools_there_are(self, mdp: TokenMDP) -> None:
        mdp.reset(seed=0)
        system, asked = self.shown(mdp).split("[user]")
        schema = json.loads(system.removeprefix("[system]").split("\n")[0])["function"]
        assert schema["name"] == "calculator"
        assert schema["description"].startswith("What an expression of whole numbers")
        assert schema["parameters"]["required"] == ["input"]
        assert asked.endswith("[assistant]")

    def test_an_episode_with_a_call_is_worth_its_answer(self, mdp: TokenMDP) -> None:
        mdp.reset(seed=0)
        answer = mdp.prompt(0).metadata["answer"]
        sum_ = mdp.prompt(0).text.rstrip("=")
        call = f'<tool_call>{{"name": "calculator", "arguments": {{"input": "{sum_}"}}}}</tool_call>'
        rollout = play(mdp, [call, answer])
        eos = mdp.vocabulary.tokenizer.eos_token
        told = f"{eos}\n[user]<tool_response>\n{answer}\n</tool_response>{eos}\n[assistant]"
        assert self.shown(mdp).endswith(f"[assistant]{call}{told}{answer}{eos}")
        [score] = mdp.reward([rollout])
        assert (score.value, score.parts["calls"], score.parts["refused"]) == (1.0, 1.0, 0.0)

    @pytest.mark.parametrize(
        ("call", "told"),
        [
            ('{"name": "calculator", "arguments": {"input": "1+"}}', "error: not arithmetic: '1+'"),
            (
                '{"name": "calc", "arguments": {"input": "1"}}',
                "error: there is no tool 'calc'; there are calc",
            ),
            ('{"name": "calculator", "arguments": {}}', 'error: write <tool_call>{"name": "...", "argument'),
            ('{"name": "calculator"', 'error: write <tool_call>{"name": "...", "argument'),
            ('["calculator", "1"]', 'error: write <tool_call>{"name": "...", "argument'),
            ('{"name": "test_broken", "arguments": {"input": "1"}}', "error: the tool has failed"),
        ],
    )
    def test_a_bad_call_is_told_how(self, mdp: TokenMDP, call: str, told: str) -> None:
        rollout = play(mdp, [f"<tool_call>{call}</tool_call>", "1"])
        assert f"<tool_response>\n{told}" in rollout.turns[1].text
        [score] = mdp.reward([rollout])
        assert (score.parts["calls"], score.parts["refused"]) == (1.0, 1.0)

    def test_a_number_or_a_string_will_do_for_arguments(self) -> None:
        calls = TemplateCalls({"calculator": lambda text: text})
        for given in ('"7"', "7", '{"expression": 7}'):
            read = calls.read(f'<tool_call>{{"name": "calculator", "arguments": {given}}}</tool_call>')
            assert read == ("calculator", "7")

    def test_a_model_without_a_template(self) -> None:
        with pytest.raises(ValueError, match="has no chat template"):
            TokenMDP(Tools("Addition", template=True, digits=2))
