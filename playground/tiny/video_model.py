"""Makes a Video-LLaVA of the tiny world's backbones: `python -m playground.tiny.video_model --out FOLDER`.

Both towers are the committed CLIP, with the part of its position table that a frame of 112 px covers; the language
model is the committed one with two more tokens. The new projector is then trained for a minute on still frames with
captions (`--pretrain-data`), the language model frozen, by `llava.train.train_hf`: this is the first of LLaVA's two
stages, shared by all trainings that start here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from duet.errors import main_guard
from llava.train.hf_processor import FrameProcessor, picture_processor
from playground.tiny.tokenizer import SYSTEM_PROMPT
from playground.tiny.tower import GRID, PATCH
from playground.tiny.video_scenes import SIDE

WEIGHTS = Path(__file__).parent / "weights"
SPECIAL = ("<image>", "<video>")
FRAMES = 8
TEMPLATE = (
    "{{ '" + SYSTEM_PROMPT.replace("'", "\\'") + " ' }}{% for m in messages %}{% if m['role'] == 'user' %}USER: "
    "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<' + c['type'] + '>\n' }}{% endfor %}"
    "{% else %} ASSISTANT:{% generation %} {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""LLaVA's vicuna_v1."""


def windowed_tower() -> CLIPVisionModel:
    """The committed tower for frames of 112 px, which lie in the middle of what it was trained on."""
    tower = CLIPVisionModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    config = CLIPVisionConfig.from_pretrained(WEIGHTS / "clip")
    config.image_size = SIDE
    small = CLIPVisionModel(config).float()
    state: dict[str, Any] = tower.state_dict()
    side = SIDE // PATCH
    begin = (GRID - side) // 2
    rows = torch.arange(begin, begin + side)
    index = torch.cat([torch.zeros(1, dtype=torch.long), 1 + (rows[:, None] * GRID + rows).flatten()])
    key = next(name for name in state if name.endswith("position_embedding.weight"))
    state[key] = state[key][index]
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    small.load_state_dict(state, strict=False)
    return small.eval()


def extend_rows(target: nn.Module, source: nn.Module) -> None:
    """Copy an embedding or a head; the rows of new tokens are the mean of the others."""
    with torch.no_grad():
        target.weight[: len(source.weight)] = source.weight
        target.weight[len(source.weight) :] = source.weight.mean(0)


def assemble() -> tuple[VideoLlavaForConditionalGeneration, Any]:
    """Put model and processor together, the projector untrained."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    image, video = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    language = LlamaForCausalLM.from_pretrained(WEIGHTS / "llm", dtype=torch.float32)
    text = LlamaConfig.from_pretrained(WEIGHTS / "llm")
    text.vocab_size = len(tokenizer)
    tower = windowed_tower()
    patches = (SIDE // PATCH) ** 2
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image,
        video_token_index=video,
        image_seq_length=patches,
        video_seq_length=FRAMES * (patches + 1),
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    model = VideoLlavaForConditionalGeneration(config).float()  # the backbones' files are bf16
    body: Any = model.model
    for own in (body.image_tower, body.video_tower):
        own.load_state_dict(tower.state_dict())
    extend_rows(model.get_input_embeddings(), language.get_input_embeddings())
    extend_rows(model.get_output_embeddings(), language.get_output_embeddings())
    rest = {name: value for name, value in language.model.state_dict().items() if "embed_tokens" not in name}
    body.language_model.load_state_dict(rest, strict=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, make_processor(tokenizer)


def make_processor(tokenizer: Any) -> Any:
    """Video-LLaVA's processor for frames of 112 px."""
    clip = CLIPImageProcessorPil.from_pretrained(WEIGHTS / "clip")
    pictures = VideoLlavaImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=clip.image_mean,
        image_std=clip.image_std,
    )  # fmt: skip
    settings = {"video_processor_type": "VideoLlavaVideoProcessor", "size": {"shortest_edge": SIDE}}
    settings |= {"crop_size": {"height": SIDE, "width": SIDE}, "do_sample_frames": False}
    return picture_processor(VideoLlavaProcessor)(
        image_processor=pictures, tokenizer=tokenizer, video_processor=FrameProcessor(pictures, settings, True),
        patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
    )  # fmt: skip


def pretrain(raw: Path, data: Path, out: Path, flags: list[str]) -> int:
    """Train the projector on still frames; returns the exit code."""
    command = [sys.executable, "-m", "llava.train.train_hf", "--model_name_or_path", str(raw), "--data_path", str(data)]
    command += ["--image_folder", str(data.parent), "--output_dir", str(out), "--mm_tunable_parts", "mm_mlp_adapter"]
    command += ["--learning_rate", "2e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.03", "--bf16", "False"]
    command += ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--logging_steps", "25"]
    command += ["--save_strategy", "no", "--report_to", "none", "--seed", "42", "--duet_tokens", "0", *flags]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])))
    return subprocess.run(command, env=env, check=False).returncode


@main_guard
def main() -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="playground/tiny/runs/video-base")
    parser.add_argument("--pretrain-data", default="playground/tiny/data/video/pretrain.json")
    parser.add_argument("--no-pretrain", action="store_true", help="leave the projector untrained")
    args, flags = parser.parse_known_args()
    out = Path(args.out)
    raw = out if args.no_pretrain else out.with_name(out.name + "-raw")
    model, processor = assemble()
    model.save_pretrained(raw)
    processor.save_pretrained(raw)
    return 0 if args.no_pretrain else pretrain(raw, Path(args.pretrain_data), out, flags)


if __name__ == "__main__":
    raise SystemExit(main())
