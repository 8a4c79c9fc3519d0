"""Let a chat model answer text-only questions, as a baseline: LLaVA's entry point with LLaVA's flags.

OPENAI_API_BASE=https://host/v1 OPENAI_API_KEY=... python -m llava.eval.qa_baseline_gpt35 -q question.jsonl -o out.jsonl
"""

from __future__ import annotations

import argparse
import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duet.errors import main_guard
from llava.eval.answers import write_lines
from llava.eval.chat import Chat, Endpoint, RequestFailed
from llava.eval.files import read_json_lines
from llava.eval.vqa import answer_row

MODEL = "gpt-3.5-turbo"
MODEL_ID = "gpt-3.5-turbo:20230327"
SYSTEM = "You are a helpful assistant."
FAILED = "#ERROR#"
"""What LLaVA stores where no answer came."""


def open_chat(model: str, max_tokens: int, calls: int = 1) -> Chat:
    """A client of the model.

    Raises:
        EndpointError: no endpoint is set.
    """
    options = {"temperature": None, "max_tokens": max_tokens}
    return Chat(Endpoint.from_environment(), model, options, max_calls=max(10, 2 * calls))


def get_answer(question_id: int | str, question: str, max_tokens: int, chat: Chat | None = None) -> dict[str, Any]:
    """Ask one question.

    Args:
        question_id: its id.
        question: its text.
        max_tokens: length limit of the answer.
        chat: an open client; default: one for this question.

    Returns:
        A row of an answers file; its text is `FAILED` where no answer came.

    Raises:
        EndpointError: no endpoint is set, or it refuses for good.
    """
    chat = chat or open_chat(MODEL, max_tokens)
    model_id = MODEL_ID if chat.model == MODEL else chat.model
    try:
        text = chat.ask([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]).text
    except RequestFailed as error:
        print(f"no answer to question {question_id}: {error}", file=sys.stderr)
        text = FAILED
    return answer_row(question_id, question, text, model_id)


def run(args: argparse.Namespace) -> int:
    """Ask all questions; returns how many have no answer.

    Raises:
        BadEvalData: the question file is malformed.
        EndpointError: no endpoint is set, or it refuses for good.
    """
    rows = read_json_lines(Path(args.question).expanduser())
    asked = {row.get("question_id", int, str): row.get("text", str) for row in rows}
    chat = open_chat(args.model, args.max_tokens, len(asked))
    one = functools.partial(get_answer, max_tokens=args.max_tokens, chat=chat)
    with ThreadPoolExecutor(args.num_tasks) as pool:
        answers = list(tqdm(pool.map(one, asked, asked.values()), total=len(asked)))
    write_lines(Path(args.output).expanduser(), sorted(answers, key=lambda row: row["question_id"]))
    return sum(row["text"] == FAILED for row in answers)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for wrong input, 2 where answers are missing."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.qa_baseline_gpt35", description="Let a chat model answer questions."
    )
    parser.add_argument("-q", "--question", required=True, help="questions, one JSON object per line")
    parser.add_argument("-o", "--output", required=True, help="answers")
    parser.add_argument("--max-tokens", type=int, default=1024, help="length limit of an answer")
    parser.add_argument("--model", default=MODEL, help="the model's name at the endpoint")
    parser.add_argument("--num-tasks", type=int, default=8, help="requests at a time")
    args = parser.parse_args(argv)
    failed = run(args)
    if failed:
        print(f"error: {failed} questions have no answer; their text is {FAILED}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
