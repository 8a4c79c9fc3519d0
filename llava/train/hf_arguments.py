"""The flags of `llava.train.train_hf`: those of LLaVA's training that mean something for any Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava.pictures import ORIENTATIONS
from llava.reduction import ReductionArguments
from llava.train.arguments import TrainingArguments, check_choice, parse_arguments

TUNABLE = ("mm_mlp_adapter", "mm_language_model", "mm_vision_tower")


@dataclass
class HfModelArguments:
    """Which model is trained, and which parts of it learn."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hugging Face model, folder or hub name"})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file, for a model without a chat template or with one to be replaced"}
    )
    mm_tunable_parts: str = field(
        default="mm_mlp_adapter,mm_language_model",
        metadata={"help": f"comma list of {', '.join(TUNABLE)}; with --lora_enable the language model gets adapters"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), flash_attention_2 or eager"}
    )

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is needed: a Hugging Face model, folder or hub name")
        if not self.parts or self.parts - set(TUNABLE):
            raise ValueError(f"--mm_tunable_parts {self.mm_tunable_parts}: expected a comma list of {list(TUNABLE)}")

    @property
    def parts(self) -> set[str]:
        """The parts that learn."""
        return {part.strip() for part in self.mm_tunable_parts.split(",") if part.strip()}


@dataclass
class HfDataArguments:
    """Which records are read, and how."""

    data_path: str | None = field(default=None, metadata={"help": "annotation file in LLaVA's format (docs/data.md)"})
    eval_data_path: str | None = field(default=None, metadata={"help": "annotation file for the validation loss"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that image paths start from"})
    video_folder: str | None = field(
        default=None, metadata={"help": "folder that video paths start from (default: the image folder)"}
    )
    num_frames: int = field(default=8, metadata={"help": "frames of a video, spread evenly over its length"})
    on_bad_sample: str = field(
        default="error", metadata={"help": "error: stop before the first step; skip: leave out and count"}
    )
    scan_images: str = field(
        default="open", metadata={"help": "pre-flight scan of pictures and videos: none, open (headers) or decode"}
    )
    max_zero_label_share: float = field(
        default=0.01, metadata={"help": "stop when more than this share of the records has nothing to learn from"}
    )
    image_orientation: str = field(
        default="exif",
        metadata={"help": "exif: pictures are turned as the camera noted; stored: they are not, as in LLaVA"},
    )

    def __post_init__(self) -> None:
        check_choice("on_bad_sample", self.on_bad_sample, ("error", "skip"))
        check_choice("scan_images", self.scan_images, ("none", "open", "decode"))
        check_choice("image_orientation", self.image_orientation, ORIENTATIONS)
        if self.num_frames < 1:
            raise ValueError(f"--num_frames {self.num_frames}: expected at least 1")
        # No flags: what the dataset of LLaVA's own training reads.
        self.is_multimodal = True
        self.bad_sample_file: str | None = None

    @property
    def videos(self) -> str | None:
        """The folder that video paths start from."""
        return self.video_folder or self.image_folder


@dataclass
class HfTrainingArguments(TrainingArguments):
    """How it is trained: LLaVA's training flags without those that only its own models know."""

    model_max_length: int = field(
        default=2048, metadata={"help": "text tokens of a record; whole turns at its end are left out beyond"}
    )

    def _check(self) -> None:
        super()._check()
        if self.bits != 16:
            raise ValueError(f"--bits {self.bits}: quantised bases are trained by scripts/finetune_duet_qlora.sh only")


def parse_hf_arguments(argv: list[str] | None = None) -> Any:
    """Read a command line.

    Returns:
        `RunArguments` whose groups are those above.

    Raises:
        ValueError: an unknown flag, or a value that is not allowed.
    """
    groups = (HfModelArguments, HfDataArguments, HfTrainingArguments, ReductionArguments)
    return parse_arguments(argv, groups)
