"""The benchmarks: one file each, found by name.

Every other module of this package is a benchmark (or shared by some) and registers what it defines:

    @TASKS.register("pope")
    class Pope(Task): ...
"""

from duet.registry import Registry
from llava.eval.tasks.base import Answer, BadEvalData, Needed, Question, Score, Task, join_answers

TASKS: Registry[type[Task]] = Registry("benchmark", __name__)

__all__ = ["TASKS", "Answer", "BadEvalData", "Needed", "Question", "Score", "Task", "join_answers"]
