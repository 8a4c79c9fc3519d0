"""What LLaVA's three GPT-4 reviews share: two answers to each question are rated from 1 to 10 by a chat model.

The endpoint and its key come from the environment, as for `llava.eval.judge`. Reviews are kept as they come, so that an
interrupted run continues. A figure is comparable only with the same judge and rules; LLaVA's published ones were made
by gpt-4-0314 (LLaVA-Bench) with the `rule.json` of its repository.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.eval.answers import AnswersFile
from llava.eval.chat import Chat, Endpoint, EndpointError, RequestFailed
from llava.eval.files import Row, as_row, read_json, read_json_lines
from llava.eval.tasks.base import BadEvalData

logger = logging.getLogger(__name__)

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
UNREADABLE = [-1.0, -1.0]
"""What LLaVA stores for a review without two figures."""


def open_chat(model: str, max_tokens: int, calls: int = 1) -> Chat:
    """A client of the judge.

    Args:
        model: its name at the endpoint.
        max_tokens: length limit of a review.
        calls: reviews that will be asked for.

    Raises:
        EndpointError: no endpoint is set.
    """
    options = {"temperature": TEMPERATURE, "max_tokens": max_tokens}
    return Chat(Endpoint.from_environment(), model, options, max_calls=max(10, 2 * calls))


def ask(chat: Chat, content: str) -> str:
    """Ask for one review.

    Raises:
        EndpointError: the endpoint refuses for good.
        RequestFailed: no usable reply.
    """
    return chat.ask([{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]).text


def parse_score(review: str) -> list[float]:
    """The two figures in a review's first line, separated by space or comma, or `UNREADABLE` (with a warning)."""
    first = review.split("\n")[0]
    try:
        one, two = map(float, first.replace(",", " ").split())
    except ValueError:
        logger.warning("a review does not begin with two figures: %r", first[:120])
        return list(UNREADABLE)
    return [one, two]


def review_content(question: str, answers: Sequence[str], rule: Mapping[str, str], context: str = "") -> str:
    """What the judge reads, in LLaVA's layout.

    Args:
        question: the question.
        answers: the two answers.
        rule: `role` and `prompt`.
        context: what is in the picture, in words; empty for none.
    """
    role = rule["role"]
    parts = [f"[Context]\n{context}"] if context else []
    parts.append(f"[Question]\n{question}")
    for number, answer in enumerate(answers, start=1):
        parts += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
    parts.append(f"[System]\n{rule['prompt']}")
    return "".join(f"{part}\n\n" for part in parts)


@dataclass(frozen=True)
class Review:
    """One review to ask for: the row that will be stored, without `content` and `tuple`, and what the judge reads."""

    row: dict[str, Any]
    content: str


def make_parser(prog: str, description: str, model: str, context: str | None) -> argparse.ArgumentParser:
    """LLaVA's flags, and the judge's name.

    Args:
        prog: name of the program.
        description: what it does.
        model: default judge, LLaVA's.
        context: what the context file holds; None: there is none.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("-q", "--question", required=True, help="questions, one JSON object per line")
    if context is not None:
        parser.add_argument("-c", "--context", required=True, help=context)
    parser.add_argument(
        "-a", "--answer-list", nargs=2, required=True, metavar="FILE", help="reference and own answers, in this order"
    )
    parser.add_argument("-r", "--rule", required=True, help="rule.json: role and prompt for each category")
    parser.add_argument("-o", "--output", required=True, help="reviews; an interrupted file is continued")
    parser.add_argument("--max-tokens", type=int, default=1024, help="length limit of a review")
    parser.add_argument("--judge-model", default=model, help="the judge's name at the endpoint")
    return parser


def read_rules(path: str) -> dict[str, Row]:
    """Rules by category.

    Raises:
        BadEvalData: the file is malformed.
    """
    rules = read_json(Path(os.path.expanduser(path)), dict)
    return {name: as_row(rule, f"{path}, rule {name!r}") for name, rule in rules.items()}


def choose_rule(rules: Mapping[str, Row], category: str, where: str, fallback: str | None = None) -> dict[str, str]:
    """The rule of a category.

    Raises:
        BadEvalData: there is none, or it lacks a field.
    """
    rule = rules.get(category) or rules.get(fallback or "")
    if rule is None:
        raise BadEvalData(f"{where}: --rule has no entry for the category {category!r}; it has {', '.join(rules)}")
    return {name: rule.get(name, str) for name in ("role", "prompt")}


def read_context(path: str) -> Callable[[Row], Row]:
    """Read what is in the pictures; returns a function that finds the row for a question.

    Raises:
        BadEvalData: the file is malformed; the function raises it for a question whose picture has no row.
    """
    rows = {row.get("image", str): row for row in read_json_lines(Path(os.path.expanduser(path)))}

    def find(question: Row) -> Row:
        picture = question.get("image", str)
        if picture not in rows:
            raise BadEvalData(f"{question.where}: {path} has no row for the picture {picture}")
        return rows[picture]

    return find


def gather(
    args: argparse.Namespace,
    category_of: Callable[[str], str],
    context_of: Callable[[Row], str],
    fallback: str | None = None,
) -> list[Review]:
    """Read questions and answers, which stand in the same order.

    Args:
        args: the flags of `make_parser`.
        category_of: from a question's category to the rules'.
        context_of: what the judge is told about the picture of a question.
        fallback: the category whose rule serves all that have none.

    Raises:
        BadEvalData: a file is malformed, or the files do not belong together.
    """
    rules = read_rules(args.rule)
    paths = [Path(os.path.expanduser(path)) for path in (args.question, *args.answer_list)]
    questions, *answers = (read_json_lines(path) for path in paths)
    for path, rows in zip(paths[1:], answers, strict=True):
        if len(rows) != len(questions):
            raise BadEvalData(f"{path} has {len(rows)} answers to the {len(questions)} questions of {paths[0]}")
    reviews = []
    for number, (question, *pair) in enumerate(zip(questions, *answers, strict=True), start=1):
        question_id = question.get("question_id", str, int)
        for answer in pair:
            if answer.get("question_id", str, int) != question_id:
                raise BadEvalData(
                    f"{answer.where}: answers question {answer.data['question_id']}, but {question.where} is question "
                    f"{question_id}; both files must be in the questions' order"
                )
        category = category_of(question.get("category", str))
        rule = choose_rule(rules, category, question.where, fallback)
        texts = [answer.get("text", str) for answer in pair]
        ids = [answer.data.get("answer_id", question_id) for answer in pair]
        row = {
            "id": number,
            "question_id": question_id,
            "answer1_id": ids[0],
            "answer2_id": ids[1],
            "category": category,
        }
        reviews.append(Review(row, review_content(question.get("text", str), texts, rule, context_of(question))))
    return reviews


def write_reviews(reviews: Sequence[Review], path: Path, model: str, max_tokens: int) -> int:
    """Ask for the reviews that the file does not have yet; returns how many of them have no figures.

    Raises:
        BadEvalData: the file holds other reviews.
        EndpointError: no endpoint is set, or it refuses for good. What came before is kept.
        RequestFailed: no usable reply to one request.
    """
    with AnswersFile(path) as file:
        for number, (old, review) in enumerate(zip(file.rows, reviews, strict=False), start=1):
            if old.get("question_id") != review.row["question_id"]:
                raise BadEvalData(
                    f"{path}, line {number}: expected question {review.row['question_id']}; remove the file"
                )
        left = reviews[len(file.rows) :]
        unreadable = sum(old.get("tuple") == UNREADABLE for old in file.rows)
        if not left:
            return unreadable
        chat = open_chat(model, max_tokens, len(left))
        for review in tqdm(left, unit="review"):
            text = ask(chat, review.content)
            scores = parse_score(text)
            unreadable += scores == UNREADABLE
            file.append([{**review.row, "content": text, "tuple": scores}])
    return unreadable


def run(args: argparse.Namespace, find: Callable[[argparse.Namespace], list[Review]]) -> int:
    """Review as the flags say; returns 0, 1 for wrong input, 2 where reviews have no figures, 130 when interrupted."""
    path = Path(os.path.expanduser(args.output))
    try:
        unreadable = write_reviews(find(args), path, args.judge_model, args.max_tokens)
    except (OSError, ValueError, EndpointError, RequestFailed) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is reviewed is kept, and the same command continues\n")
        return 130
    if unreadable:
        sys.stderr.write(
            f"error: {unreadable} reviews in {path} do not begin with two figures; remove their lines to ask again\n"
        )
        return 2
    return 0
