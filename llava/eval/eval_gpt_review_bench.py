"""Let a chat model compare answers about pictures that are described in words (LLaVA-Bench).

LLaVA's entry point with LLaVA's flags:

    python -m llava.eval.eval_gpt_review_bench --question questions.jsonl --context context.jsonl --rule rule.json \\
        --answer-list reference.jsonl own.jsonl --output reviews.jsonl
"""

from __future__ import annotations

import argparse

from duet.errors import main_guard
from llava.eval import gpt_review
from llava.eval.files import Row
from llava.eval.gpt_review import parse_score

__all__ = ["find_reviews", "get_eval", "main", "parse_score"]

MODEL = "gpt-4-0314"
NUM_SECONDS_TO_SLEEP = 0.5
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
    """Read the files that the flags name; a question's rule is `llava_bench_` and its category.

    Raises:
        BadEvalData: a file is malformed, or they do not belong together.
    """
    described = gpt_review.read_context(args.context)

    def context(question: Row) -> str:
        caption = described(question).get("caption", str, list)
        return caption if isinstance(caption, str) else "\n".join(caption)

    return gpt_review.gather(args, lambda category: f"llava_bench_{category}", context)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = gpt_review.make_parser(
        "python -m llava.eval.eval_gpt_review_bench",
        "Let a chat model compare answers about pictures that are described in words (LLaVA-Bench).",
        MODEL,
        "what is in each picture: rows of image and caption",
    )
    return gpt_review.run(parser.parse_args(argv), find_reviews)


if __name__ == "__main__":
    raise SystemExit(main())
