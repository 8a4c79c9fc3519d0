"""Answer text-only questions with any causal language model: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.model_qa --model-name MODEL --question-file question.jsonl --answers-file answer.jsonl

Answers are sampled at temperature 0.7, as LLaVA's script does.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

import torch
from tqdm import tqdm

from duet.errors import main_guard
from llava.conversation import default_conversation
from llava.eval import vqa
from llava.eval.answers import write_lines
from llava.eval.files import read_json_lines
from llava.eval.generate import stop_string
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 1024


@torch.inference_mode()
def eval_model(model_name: str, questions_file: str, answers_file: str) -> None:
    """Answer a question file with the default conversation template.

    Args:
        model_name: checkpoint folder or hub name.
        questions_file: one object a line with `question_id` and `text`.
        answers_file: written in whole at the end.

    Raises:
        BadEvalData: the question file is missing or malformed.
    """
    rows = read_json_lines(Path(os.path.expanduser(questions_file)))
    asked = [(row.get("question_id", str, int), row.get("text", str)) for row in rows]
    model_name = os.path.expanduser(model_name)
    tokenizer, model, _, _ = load_pretrained_model(model_name, None, get_model_name_from_path(model_name))
    stop = stop_string(default_conversation, tokenizer)
    stopping = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = []
    for question_id, text in tqdm(asked):
        conversation = default_conversation.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer(conversation.get_prompt(), return_tensors="pt").input_ids.to(model.device)
        sampling = {"do_sample": True, "temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS}
        output = model.generate(ids, use_cache=True, pad_token_id=pad, **sampling, **stopping)
        # A plain language model repeats the prompt, a LLaVA model gives new tokens only.
        repeated = torch.equal(output[:, : ids.shape[1]], ids)
        said = tokenizer.decode(output[0, ids.shape[1] * repeated :], skip_special_tokens=True)
        answers.append(vqa.answer_row(question_id, text, said.split(stop)[0].strip() if stop else said, model_name))
    write_lines(Path(os.path.expanduser(answers_file)), answers)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.model_qa", description="Answer text-only questions.")
    parser.add_argument("--model-name", default="facebook/opt-350m", help="checkpoint folder or hub name")
    parser.add_argument("--question-file", default="tables/question.jsonl")
    parser.add_argument("--answers-file", default="answer.jsonl")
    args = parser.parse_args(argv)
    work = functools.partial(eval_model, args.model_name, args.question_file, args.answers_file)
    return vqa.exit_status(work)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
