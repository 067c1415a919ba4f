"""Language tasks: the base class, the registry, and those built in."""

from llm_env.tasks.base import Episodes, Task, TaskError
from llm_env.tasks.characters import Addition, Copy, Reverse
from llm_env.tasks.countdown import Countdown
from llm_env.tasks.curriculum import Curriculum
from llm_env.tasks.dataset import Dataset
from llm_env.tasks.functions import Functions
from llm_env.tasks.gsm8k import GSM8K
from llm_env.tasks.humaneval import HumanEval
from llm_env.tasks.libraries.gem import GEM
from llm_env.tasks.libraries.openenv import OpenEnv
from llm_env.tasks.libraries.reasoning_gym import ReasoningGym
from llm_env.tasks.libraries.skyrl import SkyRLGym
from llm_env.tasks.libraries.textarena import TextArena
from llm_env.tasks.libraries.verifiers import Verifiers
from llm_env.tasks.maze import Maze
from llm_env.tasks.mixture import Mixture
from llm_env.tasks.nim import Nim
from llm_env.tasks.registry import make_task, register_task, task_class, task_names
from llm_env.tasks.sentiment import Sentiment
from llm_env.tasks.sessions import SessionError
from llm_env.tasks.sums import WordSums
from llm_env.tasks.tools import CalculatorSums, Tools, register_tool
from llm_env.tasks.turns import OwnRandom, TurnTask

__all__ = [
    "GEM",
    "GSM8K",
    "Addition",
    "CalculatorSums",
    "Copy",
    "Countdown",
    "Curriculum",
    "Dataset",
    "Episodes",
    "Functions",
    "HumanEval",
    "Maze",
    "Mixture",
    "Nim",
    "OpenEnv",
    "OwnRandom",
    "ReasoningGym",
    "Reverse",
    "Sentiment",
    "SessionError",
    "SkyRLGym",
    "Task",
    "TaskError",
    "TextArena",
    "Tools",
    "TurnTask",
    "Verifiers",
    "WordSums",
    "make_task",
    "register_task",
    "register_tool",
    "task_class",
    "task_names",
]
