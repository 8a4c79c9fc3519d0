"""Answer a question file, up to 1024 tokens an answer: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.model_vqa --model-path MODEL --question-file Q.jsonl --image-folder DIR --answers-file A.jsonl \\
    --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import os

from llava.eval import vqa


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return vqa.main(argv, "python -m llava.eval.model_vqa", "Answer a question file.", max_new_tokens=1024)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
