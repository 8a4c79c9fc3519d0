"""What LLaVA's question-answering entry points share: a question file and an image folder in, an answers file out."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from duet.errors import main_guard
from llava.eval.answers import AnswersFile, write_json
from llava.eval.files import read_json_lines, require_inside
from llava.eval.generate import Answerer
from llava.eval.pictures import PictureBatches, load_batches, refuse_long
from llava.eval.run_llava import generation_options
from llava.eval.settings import Settings, model_fingerprint, questions_digest
from llava.eval.tasks.base import BadEvalData, Question
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pictures import add_arguments as add_picture_arguments
from llava.pictures import read_picture
from llava.reduction import ReductionArguments
from llava.sanity import BROKEN, BrokenResult, about_answers, refuse, require_finite_weights

logger = logging.get_logger(__name__)

SHOWN = 10


@dataclass(frozen=True)
class VqaRow:
    """One question.

    Attributes:
        question_id: its id.
        text: the user's turn without the image mark.
        prompt: what is stored as the prompt.
        image: a file below the image folder, or None.
        extra: further fields of the answer's row.
        answer_field: which field of that row holds the answer.
    """

    question_id: str | int
    text: str
    prompt: str
    image: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    answer_field: str = "text"


def make_parser(prog: str, description: str, question_file: str, conv_mode: str) -> argparse.ArgumentParser:
    """LLaVA's flags with LLaVA's defaults, and ours."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--model-path", default="facebook/opt-350m", help="checkpoint folder or hub name")
    parser.add_argument("--model-base", default=None, help="base model of a LoRA or projector folder")
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--question-file", default=question_file)
    parser.add_argument("--answers-file", default="answer.jsonl")
    parser.add_argument("--conv-mode", default=conv_mode, help="conversation template")
    parser.add_argument("--num-chunks", type=int, default=1, help="parts that the questions are split into")
    parser.add_argument("--chunk-idx", type=int, default=0, help="which part to answer, from 0")
    parser.add_argument("--temperature", type=float, default=0.2, help="LLaVA's default; the benchmarks want 0")
    parser.add_argument("--top_p", "--top-p", type=float, default=None)
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="questions at once; greedy answers do not depend on it")
    parser.add_argument("--workers", type=int, default=2, help="processes that load pictures")
    parser.add_argument("--device", default="cuda", help="cuda (NVIDIA and AMD) or cpu")
    add_picture_arguments(parser)
    ReductionArguments.add_arguments(parser)
    return parser


def split_list(lst: Any, n: int) -> list[Any]:
    """Cut into `n` consecutive parts of ceil(len / n) items; the last ones may be short or empty.

    Args:
        lst: a list, or anything else that has a length and slices, such as a table.
        n: how many parts.
    """
    size = math.ceil(len(lst) / n)
    return [lst[start * size : (start + 1) * size] for start in range(n)]


def get_chunk(lst: Any, n: int, k: int) -> Any:
    """Part `k` of `split_list`.

    Raises:
        ValueError: there is no such part.
    """
    if not 0 <= k < n:
        raise ValueError(f"--chunk-idx {k} must be at least 0 and below --num-chunks {n}")
    return split_list(lst, n)[k]


def read_questions(path: Path) -> list[VqaRow]:
    """Read a question file, one object a line with `question_id`, `image` and `text`.

    Raises:
        BadEvalData: a line is wrong; names it.
    """
    rows = []
    for row in read_json_lines(path):
        text = row.get("text", str)
        rows.append(VqaRow(row.get("question_id", str, int), text, text, row.get("image", str)))
    return rows


def open_rgb(path: Path, orientation: str = "exif") -> list[Image.Image]:
    """A picture as RGB; see `llava.pictures.read_picture`."""
    return [read_picture(path, orientation)]


class FolderPictures:
    """Pictures as files below a folder.

    Args:
        folder: where they are.
        open_picture: opens one; takes the path and `orientation`.
    """

    def __init__(self, folder: Path, open_picture: Callable[..., list[Image.Image]] = open_rgb) -> None:
        self.folder, self.open = folder, open_picture

    def find(self, rows: Sequence[VqaRow]) -> list[tuple[Path, ...]]:
        """The picture of every row.

        Raises:
            BadEvalData: some are missing, or lie outside of the folder; names them.
        """
        for row in rows:
            if row.image and self.folder != Path():  # without a folder a name is a path of the user's own
                require_inside(self.folder / row.image, self.folder, f"question {row.question_id}")
        files = [(self.folder / row.image,) if row.image else () for row in rows]
        gone = [(row, path) for row, paths in zip(rows, files, strict=True) for path in paths if not path.is_file()]
        if gone:
            listed = "\n".join(f"  question {row.question_id}: {path}" for row, path in gone[:SHOWN])
            raise BadEvalData(f"{len(gone)} pictures are missing, see --image-folder; among them\n{listed}")
        return files


def continue_file(file: AnswersFile, settings: Settings) -> None:
    """Start an answers file anew unless it was begun with the same settings, which lie next to it; old answers stay."""
    beside = file.path.with_name(file.path.name + ".settings.json")
    try:
        stored = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        stored = None
    wanted = json.loads(json.dumps(asdict(settings)))
    if file.rows and stored != wanted:
        old: dict[str, Any] = stored if isinstance(stored, dict) else {}
        changed = ", ".join(name for name in wanted if old.get(name) != wanted[name]) if old else "not known"
        logger.warning(
            "%s was written with other settings (%s); it is written anew, and its answers are kept in %s",
            file.path, changed, file.set_aside(),
        )  # fmt: skip
    write_json(beside, wanted)


def answer_rows(
    rows: Sequence[VqaRow],
    files: Sequence[tuple[Path, ...]],
    file: AnswersFile,
    answerer: Answerer,
    args: argparse.Namespace,
    max_new_tokens: int,
    open_picture: Callable[[Path], list[Image.Image]],
) -> None:
    """Answer the rows that the file does not have yet, in order.

    Raises:
        BadEvalData: a picture cannot be opened, or the file's rows are not these.
    """
    for number, (row, old) in enumerate(zip(rows, file.rows, strict=False), start=1):
        if old.get("question_id") != row.question_id:
            raise BadEvalData(f"{file.path}, line {number}: expected question {row.question_id}; remove the file")
    starts = range(len(file.rows) // args.batch * args.batch, len(rows), args.batch)
    pictures = PictureBatches(
        [files[start : start + args.batch] for start in starts],
        open_picture,
        answerer.image_processor,
        answerer.model.config,
    )
    options = generation_options(args.temperature, args.top_p, args.num_beams, max_new_tokens)
    del options["max_new_tokens"]
    model_id = get_model_name_from_path(args.model_path)
    answered = list(file.rows)
    with tqdm(total=len(rows), initial=starts.start, unit="sample") as bar:
        for start, loaded in zip(starts, load_batches(pictures, args.workers), strict=True):
            batch = rows[start : start + args.batch]
            asked = [batch[place].text for place in loaded.kept]
            ids = [answerer.prompt_ids(text, count) for text, count in zip(asked, loaded.counts, strict=True)]
            ids = refuse_long(loaded, ids, answerer, max_new_tokens)
            if loaded.failures:
                place, reason = loaded.failures[0]
                raise BadEvalData(f"question {batch[place].question_id}: {reason}")
            texts = answerer.generate(ids, loaded.images(), loaded.sizes, max_new_tokens, **options)
            new = [
                _answer_row(row, text, model_id, bad)
                for row, text, bad in zip(batch, texts, answerer.non_finite, strict=True)
            ][max(len(file.rows) - start, 0) :]
            file.append(new)
            answered += new
            bar.update(len(batch))
    # What an earlier start left counts as well: a broken run stays broken when the same command finds it whole.
    said = [str(row.get(question.answer_field, "")) for question, row in zip(rows, answered, strict=True)]
    refuse({str(file.path): about_answers(said, None, sum(_is_non_finite(row) for row in answered))})


def _answer_row(row: VqaRow, text: str, model_id: str, non_finite: bool) -> dict[str, Any]:
    made = answer_row(row.question_id, row.prompt, text, model_id, row.answer_field) | dict(row.extra)
    return made | ({"metadata": {"non_finite": True}} if non_finite else {})


def _is_non_finite(row: dict[str, Any]) -> bool:
    metadata = row.get("metadata")
    return isinstance(metadata, dict) and bool(metadata.get("non_finite"))


def answer_row(
    question_id: str | int, prompt: str, text: str, model_id: str, answer_field: str = "text"
) -> dict[str, Any]:
    """A row of LLaVA's answers files; its id is the same in every run.

    Args:
        question_id: the question's id.
        prompt: what was asked.
        text: the answer.
        model_id: the model's name.
        answer_field: the field that holds the answer.
    """
    return {
        "question_id": question_id,
        "prompt": prompt,
        answer_field: text,
        "answer_id": hashlib.sha256(f"{model_id} {question_id} {prompt}".encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": {},
    }


def run(
    args: argparse.Namespace,
    read: Callable[[Path], list[VqaRow]],
    max_new_tokens: int,
    pictures: Any = None,
) -> None:
    """Answer one chunk of a question file.

    Args:
        args: the flags of `make_parser`.
        read: reads the question file.
        max_new_tokens: length limit of an answer.
        pictures: finds and opens the rows' pictures; default: `FolderPictures` of --image-folder.

    Raises:
        BadEvalData: the question file or a picture is missing or wrong.
        ValueError: a wrong request.
    """
    rows = get_chunk(read(Path(os.path.expanduser(args.question_file))), args.num_chunks, args.chunk_idx)
    pictures = pictures or FolderPictures(Path(os.path.expanduser(args.image_folder)))
    files = pictures.find(rows)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        get_model_name_from_path(args.model_path),
        device=args.device,
        duet_config=ReductionArguments.from_namespace(args),
    )
    require_finite_weights(model, args.model_path)
    answerer = Answerer(model, tokenizer, image_processor, args.conv_mode)
    asked = [
        Question(str(i), r.question_id, r.text, paths) for i, (r, paths) in enumerate(zip(rows, files, strict=True))
    ]
    settings = Settings(
        benchmark=args.question_file,
        questions=questions_digest(asked, pictures.folder),
        model=model_fingerprint(args.model_path, args.model_base, model.config),
        reduction=getattr(model.config, "duet", None),
        template=args.conv_mode,
        decoding=generation_options(args.temperature, args.top_p, args.num_beams, max_new_tokens),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(model.config, "_attn_implementation", None)),
        visuals=str(getattr(model.config, "image_aspect_ratio", None))
        + (f", {args.image_orientation} orientation" if args.image_orientation != "exif" else ""),
    )
    path = Path(os.path.expanduser(args.answers_file))
    with AnswersFile(path) as file:
        continue_file(file, settings)
        opener = functools.partial(pictures.open, orientation=args.image_orientation)
        answer_rows(rows, files, file, answerer, args, max_new_tokens, opener)


@main_guard(statuses={BadEvalData: 2, BrokenResult: BROKEN})
def exit_status(function: Callable[[], None]) -> None:
    """Run it; returns 0, 2 if a file or picture is missing or wrong, 1 for other errors, with the reason printed."""
    function()
