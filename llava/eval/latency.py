"""How long single questions take with each configuration, measured in turn so that a busy machine meets all alike.

The seconds of a run depend on its batches: questions about one picture share the picture's prefill where a method
allows that. Here every question is asked alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from duet.probe import seconds_of
from llava.eval.generate import Answerer, template_for
from llava.eval.pictures import open_with
from llava.eval.plans import Plan
from llava.eval.tasks.base import Question, Task

ROUNDS = 3


def pick_questions(found: Sequence[tuple[Task, list[Question]]], count: int) -> tuple[Task, list[Question]]:
    """The first benchmark with pictures, and `count` of its questions, spread evenly.

    Raises:
        ValueError: no benchmark asks about pictures.
    """
    for task, questions in found:
        pictured = [question for question in questions if question.visuals]
        if pictured and not task.video:
            count = min(count, len(pictured))
            return task, [pictured[index * len(pictured) // count] for index in range(count)]
    raise ValueError("--latency needs a benchmark that asks about pictures")


def latencies(session: Any, plans: Sequence[Plan], count: int) -> dict[str, float]:
    """Median seconds of a question by run name: tower, prefill and answer; loading of pictures is left out.

    Args:
        session: a loaded model with its benchmarks (`llava.eval.__main__.Session`).
        plans: the configurations; those that the model refuses are left out.
        count: questions, each asked `ROUNDS` times after one that does not count.
    """
    task, questions = pick_questions(session.found, count)
    model = session.model
    template = template_for(session.model_name, model.config, session.args.conv_mode)
    answerer = Answerer(model, session.tokenizer, session.image_processor, template)
    asked = [(q.text, [image for path in q.visuals for image in open_with(task, path)]) for q in questions]
    taken: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for plan in plans:
            model.set_reduction(plan.config)
            part = asked if number else asked[:1]
            taken.setdefault(plan.name, []).extend(
                seconds_of(partial(answerer.answer, [sample], task.max_new_tokens), model.device) for sample in part
            )
    return {name: median(values[1:]) for name, values in taken.items()}
