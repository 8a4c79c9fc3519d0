"""Calibrate FitPrune for a model: how many visual tokens every layer can spare, measured on questions about pictures.

    python -m llava.eval.calibrate --model-path MODEL --data-path finetune.json --image-folder images

The annotation file is LLaVA's (the questions of a training mix will do; answers are not read). What comes out is a
small JSON file, next to the model unless --out says otherwise, from which the methods `fitprune` and `fitprune-release`
take the stages for any budget: give it as the reduction option `calibration`. It costs about 16 prefills a sample, in
which every layer's attention is computed twice, in blocks.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from duet.calibrate import Calibrator
from duet.errors import main_guard
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.generate import Answerer, pack, preprocess, template_for
from llava.eval.run_llava import load_image, move_pixels
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.train.images import find_image
from llava.train.records import images_of, load_records, split_system

FILE_NAME = "fitprune.json"
_SHARES = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", default=None, help="base model of a LoRA or projector folder")
    parser.add_argument("--data-path", required=True, help="annotation file with questions about pictures")
    parser.add_argument("--image-folder", type=Path, required=True, help="where its pictures lie")
    parser.add_argument("--samples", type=int, default=64, help="how many questions are measured")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument(
        "--tokens",
        default=None,
        help="budgets around which to measure finely, e.g. 192,128,64 (default: these, scaled)",
    )
    parser.add_argument("--out", type=Path, default=None, help=f"default: {FILE_NAME} in the model's folder")
    parser.add_argument("--conv-mode", default=None, help="template (default: the model's own, else vicuna_v1)")
    parser.add_argument("--device", default="cuda", help="cuda (NVIDIA and AMD) or cpu")
    parser.add_argument("--dtype", default=None, help="float16, bfloat16 or float32 (default: fp16; fp32 on a CPU)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    return parser


def target(args: argparse.Namespace) -> Path:
    """Where the file goes.

    Raises:
        ValueError: the model is no folder and no place was given, or a count is wrong.
    """
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples} must be at least 1")
    if args.out is not None:
        return args.out
    if not os.path.isdir(args.model_path):
        raise ValueError(f"{args.model_path} is no folder; say where the calibration goes with --out FILE")
    return Path(args.model_path) / FILE_NAME


def choose_questions(data_path: str, folder: Path, count: int, seed: int) -> list[tuple[str, list[Path]]]:
    """Draw first questions about pictures, each with the paths of its pictures.

    Raises:
        FileNotFoundError: the annotation file is missing.
        ValueError: it cannot be parsed, or holds no question about a picture.
    """
    records, origins = load_records(data_path)
    found = []
    for record, origin in zip(records, origins, strict=True):
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise ValueError(f"{data_path}: record {origin.index} has no list of conversations; this is no LLaVA mix")
        _, turns = split_system(record["conversations"])
        if images_of(record) and turns and turns[0].get("from") == "human":
            found.append((str(turns[0]["value"]), images_of(record)))
    if not found:
        raise ValueError(f"{data_path} has no record with a picture and a question")
    chosen = random.Random(seed).sample(found, min(count, len(found)))
    return [(text, [Path(find_image(folder, name)) for name in names]) for text, names in chosen]


@torch.inference_mode()
def make_prompts(answerer: Answerer, questions: Sequence[tuple[str, list[Path]]]) -> list[dict[str, Any]]:
    """Splice every question with its pictures: what `duet.run_decoder` takes.

    Raises:
        ValueError: a picture cannot be opened, or its marks do not match.
    """
    model, prompts = answerer.model, []
    for text, paths in questions:
        pictures = [load_image(str(path)) for path in paths]
        marked = (
            text if text.count(DEFAULT_IMAGE_TOKEN) == len(paths) else text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        )
        ids = torch.tensor([answerer.prompt_ids(marked, len(paths))], device=model.device)
        pixels = pack(preprocess(pictures, answerer.image_processor, model.config))
        if isinstance(pixels, list):
            pixels = [tensor.to(model.device, model.dtype) for tensor in pixels]
        else:
            pixels = move_pixels(pixels, model)
        sizes = [picture.size for picture in pictures]
        prepared = model.prepare_inputs_labels_for_multimodal(
            ids, None, torch.ones_like(ids), None, None, pixels, image_sizes=sizes
        )
        prompts.append({"inputs_embeds": prepared[4], "visual_mask": prepared.visual_mask})
    return prompts


def budgets(text: str | None, patches: int) -> list[float]:
    """Shares of the patches around which to measure.

    Raises:
        ValueError: the flag holds something else than numbers between 1 and the patches.
    """
    if text is None:
        return list(_SHARES)
    try:
        wanted = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        wanted = []
    if not wanted or min(wanted) < 1 or max(wanted) > patches:
        raise ValueError(f"--tokens {text}: expected numbers between 1 and {patches}, separated by commas")
    return [tokens / patches for tokens in wanted]


def run(args: argparse.Namespace) -> Path:
    """Measure and write; returns the file.

    Raises:
        FileNotFoundError: the model or the annotation file is missing.
        ValueError: a wrong request or wrong data.
    """
    out = target(args)
    questions = choose_questions(args.data_path, args.image_folder, args.samples, args.seed)
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, name, load_8bit=args.load_8bit, load_4bit=args.load_4bit,
        device=args.device, dtype=args.dtype, duet_config="none",
    )  # fmt: skip
    answerer = Answerer(model, tokenizer, processor, template_for(name, model.config, args.conv_mode))
    patches = model.get_vision_tower().num_patches
    shares = budgets(args.tokens, patches)
    calibrator = Calibrator(model.get_model(), make_prompts(answerer, questions))
    for share in shares:
        curve = calibrator.search(share)
        average = curve.average() * patches
        print(f"{share * patches:g} visual tokens: alpha {curve.alpha:.4f} leaves {average:.1f} on average")
    calibrator.result({"model": name, "data": os.path.basename(args.data_path), "seed": args.seed}).save(out)
    return out


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    print(run(args))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
