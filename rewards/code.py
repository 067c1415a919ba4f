"""Code: a program is worth what its tests say, run in a sandbox."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards.base import Reward
from rewards.named import register_reward
from rewards.rollout import Rollout
from rewards.sandbox import Outcome, Sandbox
from rewards.score import Score
from rewards.seats import Limits

_BLOCK = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def program_in(text: str) -> str:
    """The program in a text: its last block between ``` marks, or all of it where there is none.

    Examples:
        >>> program_in("So:\\n```python\\nprint(1)\\n```\\nThat prints 1.")
        'print(1)'
        >>> program_in("print(2)")
        'print(2)'
    """
    blocks = _BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text


@register_reward("code_tests")
class CodeTests(Reward):
    """Runs the program in a text, in a sandbox, and pays 1 if it does all that its tests ask, or else 0.

    The rollout's metadata has the tests, in one of two ways:

    - "tests": what is printed for what is read, such as `[{"stdin": "1 2", "stdout": "3"}]`. White space at the ends of
      lines makes no difference.
    - "test" and "entry_point": Python that calls a function by that name, or defines `check(candidate)`, and asserts.
      A text that does not define the function goes on from the prompt, whose code is under "code" in the metadata.

    A program never decides by itself whether it is right, see `Sandbox`.

    Parts of the score: the fraction of its "tests_passed", and whether it ran "out_of_time".

    Args:
        seconds: that one program may take for one of its tests, or for all of those that call a function.
        memory: megabytes that it may have.
        workers: how many run at once; by default one for each processor.
        partly: pay the fraction of tests that it passes.
        unsafe: where the kernel cannot fence programs in, run them nevertheless. They can do whatever this one may.

    Examples:
        >>> tests = CodeTests()
        >>> facts = {"tests": [{"stdin": "2", "stdout": "4"}, {"stdin": "3", "stdout": "9"}]}
        >>> right, half = "print(int(input()) ** 2)", "print(2 * int(input()))"
        >>> [score.value for score in tests([Rollout.of(text, metadata=facts) for text in (right, half)])]
        [1.0, 0.0]
        >>> facts = {"code": "def double(x):\\n", "entry_point": "double", "test": "assert double(4) == 8"}
        >>> [score.value for score in tests([Rollout.of("    return 2 * x", metadata=facts)])]
        [1.0]
        >>> tests.close()
    """

    alongside = True

    def __init__(
        self,
        seconds: float = 5.0,
        memory: int = 256,
        *,
        workers: int | None = None,
        partly: bool = False,
        unsafe: bool = False,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.sandbox = Sandbox(Limits(seconds, memory), unsafe=unsafe)
        self.workers = workers or os.cpu_count() or 1
        self.partly = partly

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Several at once, each in processes of its own."""
        if len(rollouts) == 1:
            return [self.score(rollouts[0])]
        with ThreadPoolExecutor(min(self.workers, len(rollouts) or 1)) as pool:
            return list(pool.map(self.score, rollouts))

    def score(self, rollout: Rollout) -> Score:
        """Score one rollout."""
        outcomes = list(self._outcomes(rollout))
        passed = sum(outcome.passed for outcome in outcomes) / len(outcomes)
        late = any(outcome.why.startswith("TimeoutError") for outcome in outcomes)
        value = passed if self.partly else float(passed == 1)
        return Score(value, {"tests_passed": passed, "out_of_time": float(late)})

    def close(self) -> None:
        """End the sandbox's processes."""
        self.sandbox.close()

    def _outcomes(self, rollout: Rollout) -> list[Outcome]:
        facts = rollout.metadata
        program = program_in(rollout.text)
        if "tests" in facts:
            outcomes = []
            for test in _printing_tests(facts["tests"]):
                outcome = self.sandbox.run(program, test["stdin"])
                right = outcome.passed and _lines(outcome.stdout) == _lines(test["stdout"])
                outcomes.append(outcome._replace(passed=right))
                if not right and not self.partly:
                    break
            return outcomes
        missing = [name for name in ("test", "entry_point") if not isinstance(facts.get(name), str)]
        if missing:
            raise KeyError(
                f"CodeTests found no {' and no '.join(map(repr, missing))} in the metadata, which has {sorted(facts)}; "
                'expected "tests", or "test" and "entry_point"'
            )
        name, code = facts["entry_point"], str(facts.get("code", ""))
        if not re.search(rf"^(?:async )?def {re.escape(name)}\b|^{re.escape(name)}\s*=", program, re.MULTILINE):
            program = code + program
        tests = facts["test"]
        if re.search(r"^def check\(", tests, re.MULTILINE):
            tests += "\ncheck(candidate)\n"
        before = code + "\n    pass\n" if code else ""
        return [self.sandbox.check(program, tests, name, before=before)]


def _printing_tests(given: Any) -> Sequence[Mapping[str, str]]:
    good = (
        isinstance(given, Sequence)
        and len(given)
        and all(
            isinstance(test, Mapping) and all(isinstance(test.get(key), str) for key in ("stdin", "stdout"))
            for test in given
        )
    )
    if not good:
        raise ValueError(
            f"the tests of a program are {given!r}; expected a list with one or more such as "
            '{"stdin": "1 2", "stdout": "3"}'
        )
    return given  # type: ignore[no-any-return]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
