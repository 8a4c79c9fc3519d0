"""Write an answers file of MME as the text files that the official calculation reads.

cd playground/data/eval/MME && python -m llava.eval.convert_answer_to_mme --experiment NAME

reads `answers/NAME.jsonl` and writes `eval_tool/answers/NAME/<category>.txt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from duet.errors import main_guard
from llava.eval.answers import read_answers
from llava.eval.tasks.mme import QUESTION_FILE, RELEASE, read_questions, write_results


def convert(home: Path, result_file: Path, folder: Path) -> list[Path]:
    """Convert a file of answers; returns the files that were written.

    Args:
        home: The folder with the release and, optionally, LLaVA's question file.
        result_file: The answers.
        folder: Where the text files go.

    Raises:
        ValueError: A file is missing or malformed, or a question has no answer or two.
    """
    question_file = home / QUESTION_FILE
    questions = read_questions(home / RELEASE, question_file if question_file.exists() else None)
    return write_results(questions, read_answers(result_file), folder)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.convert_answer_to_mme", description="Write MME answers in the official layout."
    )
    parser.add_argument("--experiment", required=True, help="name of the answers file, without .jsonl")
    parser.add_argument("--data-dir", default=".", help="MME's folder (default: the current one)")
    parser.add_argument("--result-file", default=None, help="answers (default: DATA_DIR/answers/EXPERIMENT.jsonl)")
    parser.add_argument("--output-dir", default=None, help="default: DATA_DIR/eval_tool/answers/EXPERIMENT")
    args = parser.parse_args(argv)
    home = Path(args.data_dir)
    result_file = args.result_file or home / "answers" / f"{args.experiment}.jsonl"
    folder = Path(args.output_dir or home / "eval_tool" / "answers" / args.experiment)
    paths = convert(home, Path(result_file), folder)
    print(f"{len(paths)} files written to {folder}; score them: python -m llava.eval.eval_mme --results_dir {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
