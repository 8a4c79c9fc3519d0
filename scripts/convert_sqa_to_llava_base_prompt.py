"""ScienceQA's problems as prompts, in the formats that "Learn to Explain" names by letters.

Before the dash, the parts of the question in order: Q question, C context, M options, and for upper bounds L lecture, E
solution. Behind it, the parts of the answer: A answer, L lecture, E solution; LEPA is LLaVA's step-by-step form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OPTIONS = ("A", "B", "C", "D", "E")
_QUESTIONS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
# In LLaVA's script the letters L and E behind an answer are swapped: "AL" gives the solution, "AE" the lecture.
_ANSWERS = {
    "A": "The answer is {answer}.",
    "AL": "The answer is {answer}. BECAUSE: {solution}",
    "AE": "The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {answer}.",
    "EA": "{solution} The answer is {answer}.",
    "LEA": "{lecture} {solution} The answer is {answer}.",
    "ELA": "{solution} {lecture} The answer is {answer}.",
}


def get_question_text(problem: Mapping[str, Any]) -> str:
    """The question."""
    return problem["question"]


def get_context_text(problem: Mapping[str, Any], use_caption: bool) -> str:
    """The hint, and the picture's caption if that is wanted; "N/A" where there is neither."""
    caption = problem["caption"] if use_caption else ""
    return " ".join([problem["hint"], caption]).strip() or "N/A"


def get_choice_text(problem: Mapping[str, Any], options: Sequence[str]) -> str:
    """The choices on one line, as "(A) first (B) second"."""
    return " ".join(f"({options[place]}) {choice}" for place, choice in enumerate(problem["choices"]))


def get_answer(problem: Mapping[str, Any], options: Sequence[str]) -> str:
    """The letter of the right choice."""
    return options[problem["answer"]]


def get_lecture_text(problem: Mapping[str, Any]) -> str:
    """The lecture, with line ends as two letters."""
    return problem["lecture"].replace("\n", "\\n")


def get_solution_text(problem: Mapping[str, Any]) -> str:
    """The solution, with line ends as two letters."""
    return problem["solution"].replace("\n", "\\n")


def _cleaned(text: str) -> str:
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _input(input_format: str, question: str, context: str, choice: str, lecture: str, solution: str) -> str:
    if input_format not in _QUESTIONS:
        raise ValueError(f"unknown question format {input_format!r}; known: {', '.join(_QUESTIONS)}")
    lines = {"Q": f"Question: {question}", "C": f"Context: {context}", "M": f"Options: {choice}"}
    reasons = {"L": lecture, "E": solution}
    found: list[str] = []
    for letter in input_format:
        if letter in lines:
            found.append(lines[letter])
        elif found[-1].startswith("BECAUSE:"):
            found[-1] += f" {reasons[letter]}"
        else:
            found.append(f"BECAUSE: {reasons[letter]}")
    return "".join(f"{line}\n" for line in found)


def _output(output_format: str, answer: str, lecture: str, solution: str, test_example: bool) -> str:
    if test_example:
        return "Answer:"
    if output_format == "LEPA":
        reasons = [f"{name}: {text}\n" for name, text in (("LECTURE", lecture), ("SOLUTION", solution)) if text.strip()]
        return "".join(reasons) + f"###\nANSWER: {answer}."
    if output_format not in _ANSWERS:
        raise ValueError(f"unknown answer format {output_format!r}; known: {', '.join([*_ANSWERS, 'LEPA'])}")
    return "Answer: " + _ANSWERS[output_format].format(answer=answer, lecture=lecture, solution=solution)


def _formats(format: str) -> tuple[str, str]:
    question, dash, answer = format.partition("-")
    if not dash:
        raise ValueError(f"prompt format {format!r}: expected QUESTION-ANSWER, such as QCM-LEA")
    return question, answer


def create_one_example_chatbot(
    format: str,
    question: str,
    context: str,
    choice: str,
    answer: str,
    lecture: str,
    solution: str,
    test_example: bool = True,
) -> tuple[str, str]:
    """A problem as question and answer; the answer of a test example is left open.

    Raises:
        ValueError: the format is unknown.
    """
    input_format, output_format = _formats(format)
    asked = _input(input_format, question, context, choice, lecture, solution)
    return _cleaned(asked), _cleaned(_output(output_format, answer, lecture, solution, test_example))


def create_one_example(
    format: str,
    question: str,
    context: str,
    choice: str,
    answer: str,
    lecture: str,
    solution: str,
    test_example: bool = True,
) -> str:
    """A problem as one text, for a model that continues it; see `create_one_example_chatbot`."""
    input_format, output_format = _formats(format)
    asked = _input(input_format, question, context, choice, lecture, solution)
    return _cleaned(asked + _output(output_format, answer, lecture, solution, test_example))


def create_one_example_gpt4(
    format: str,
    question: str,
    context: str,
    choice: str,
    answer: str,
    lecture: str,
    solution: str,
    test_example: bool = True,
) -> tuple[dict[str, str], dict[str, str]]:
    """A problem as two messages of a chat; see `create_one_example_chatbot`."""
    input_format, output_format = _formats(format)
    asked = _input(input_format, question, context, choice, lecture, solution).replace("  ", " ").strip()
    said = _cleaned(_output(output_format, answer, lecture, solution, test_example))
    return {"role": "user", "content": f"Can you explain {asked}?"}, {"role": "assistant", "content": said}


def _parts(problem: Mapping[str, Any], use_caption: bool, options: Sequence[str]) -> tuple[str, ...]:
    return (
        get_question_text(problem),
        get_context_text(problem, use_caption),
        get_choice_text(problem, options),
        get_answer(problem, options),
        get_lecture_text(problem),
        get_solution_text(problem),
    )


def build_prompt_chatbot(
    problems: Mapping[str, Mapping[str, Any]],
    shot_qids: Iterable[str],
    prompt_format: str,
    use_caption: bool = False,
    options: Sequence[str] = OPTIONS,
    is_test: bool = False,
) -> dict[str, tuple[str, str]]:
    """Question and answer of every problem, by id; here line ends of lecture and solution are line ends."""
    found = {}
    for qid in shot_qids:
        *front, lecture, solution = _parts(problems[qid], use_caption, options)
        reasons = (text.replace("\\n", "\n") for text in (lecture, solution))
        found[qid] = create_one_example_chatbot(prompt_format, *front, *reasons, test_example=is_test)
    return found


def build_prompt(problems: Mapping[str, Mapping[str, Any]], shot_qids: Iterable[str], test_qid: str, args: Any) -> str:
    """Solved problems and an open one, as one text.

    Args:
        problems: by id.
        shot_qids: the solved ones.
        test_qid: the open one.
        args: `prompt_format`, `use_caption` and `options`.
    """
    texts = [
        create_one_example(
            args.prompt_format, *_parts(problems[qid], args.use_caption, args.options), test_example=is_test
        )
        for qids, is_test in ((shot_qids, False), ([test_qid], True))
        for qid in qids
    ]
    return "\n\n".join(texts)


def build_prompt_gpt4(
    problems: Mapping[str, Mapping[str, Any]], shot_qids: Iterable[str], test_qid: str, args: Any
) -> list[dict[str, str]]:
    """Solved problems and an open one, as a chat; see `build_prompt`."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for qids, is_test in ((shot_qids, False), ([test_qid], True)):
        for qid in qids:
            parts = _parts(problems[qid], args.use_caption, args.options)
            messages += create_one_example_gpt4(args.prompt_format, *parts, test_example=is_test)
    return messages
