"""The trainer of Hugging Face models: LLaVA's trainer with their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from duet.families import FAMILIES
from llava.model.checkpoints import gathered
from llava.train.checkpoints import CheckpointError
from llava.train.hf_model import projectors
from llava.train.llava_trainer import ADAPTER_FILE, LLaVATrainer
from llava.train.lora import get_mm_adapter_state_maybe_zero_3, load_adapter
from llava.train.optim import part_of

_FIRST = ("embeddings", "patch_embed")  # what a tower calls first


class HfTrainer(LLaVATrainer):
    """Trains a Hugging Face model with LLaVA's sampler, optimizer groups, checkpoints and figures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch_vision()

    def _watch_vision(self) -> None:
        """Time what lies between the first part of a tower and the end of its projector."""
        ends = projectors(self.model)
        for path, module in self.model.named_modules():
            if path.rsplit(".", 1)[-1] in _FIRST and part_of(path) == "vision_tower":
                self.meter.handles.append(module.register_forward_pre_hook(lambda *_: self.meter.start("vision")))
            elif path in ends:
                self.meter.handles.append(module.register_forward_hook(lambda *_: self.meter.stop("vision")))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of one batch, without a cache."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def save_kind(self) -> str:
        """What a save writes: `adapter` or `full`."""
        return "adapter" if self.args.lora_enable else "full"

    def weight_names(self) -> list[str] | None:
        """Files of a checkpoint that hold what learns; PEFT keeps a projector that learns in the adapter's file."""
        return [ADAPTER_FILE] if self.save_kind() == "adapter" else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write Hugging Face's files: the whole model, or PEFT's adapter with the model's configuration beside it.

        Every rank has to call it.
        """
        if self.save_kind() == "full":
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        state = get_mm_adapter_state_maybe_zero_3(self.model.named_parameters(), ("lora_", "modules_to_save"))
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        self.model.save_pretrained(folder, state_dict=state)
        self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        if self.save_kind() == "adapter":
            load_adapter(target, folder)
            return
        # Through the class itself: a saved file may name its tensors as the hub does, not as the model does.
        host: Any = FAMILIES.get(target.config.model_type).host  # type: ignore[attr-defined]
        saved, report = host.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:
            absent = sorted(report["missing_keys"])
            raise CheckpointError(
                f"{folder}: {len(absent)} weights are in no file of this checkpoint, e.g. {absent[0]}"
            )
        with gathered(target.parameters()), torch.no_grad():
            target.load_state_dict(saved.state_dict(), strict=True)
