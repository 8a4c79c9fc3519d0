"""Let a chat model compare two text-only answers to each question: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.eval_gpt_review --question questions.jsonl --rule rule.json \\
    --answer-list reference.jsonl own.jsonl --output reviews.jsonl
"""

from __future__ import annotations

import argparse

from duet.errors import main_guard
from llava.eval import gpt_review
from llava.eval.gpt_review import parse_score

__all__ = ["find_reviews", "get_eval", "main", "parse_score"]

MODEL = "gpt-4"
NUM_SECONDS_TO_SLEEP = 3
"""LLaVA's pause between requests; the client here waits as long as the server asks for."""


def get_eval(content: str, max_tokens: int, model: str = MODEL) -> str:
    """Ask for one review.

    Args:
        content: what the judge reads.
        max_tokens: length limit of the review.
        model: the judge's name at the endpoint.

    Raises:
        EndpointError: no endpoint is set, or it refuses for good.
        RequestFailed: no usable reply.
    """
    return gpt_review.ask(gpt_review.open_chat(model, max_tokens), content)


def find_reviews(args: argparse.Namespace) -> list[gpt_review.Review]:
    """Read the files that the flags name; a category without a rule has the rule "default".

    Raises:
        BadEvalData: a file is malformed, or they do not belong together.
    """
    return gpt_review.gather(args, lambda category: category, lambda question: "", fallback="default")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = gpt_review.make_parser(
        "python -m llava.eval.eval_gpt_review",
        "Let a chat model compare two text-only answers to each question.",
        MODEL,
        None,
    )
    return gpt_review.run(parser.parse_args(argv), find_reviews)


if __name__ == "__main__":
    raise SystemExit(main())
