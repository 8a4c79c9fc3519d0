"""What every LLaVA model shares, whatever its language model: the tower, the projector, and the splice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

import duet
from duet import DuetConfig, tracing
from duet.attach import check_config
from duet.families.anyres import Layout
from duet.question import Question, asked, is_read, read_question
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.anyres import Tiling, unpad_image
from llava.model.checkpoints import gathered, load_projector_weights, read_projector_file
from llava.model.language_model.decoder import LlavaDecoder, is_filled
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.calling import run_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import (
    Places,
    SplicedInputs,
    assign_features,
    embed_text,
    image_slots,
    pad,
    splice_row,
    truncate,
)

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "get_anyres_image_grid_shape", "unpad_image"]

logger = logging.get_logger(__name__)


class LlavaMetaModel(LlavaDecoder):
    """Mixin for the inner decoder: it also owns the vision tower and the projector, and drops visual tokens."""

    config: Any
    dtype: Any

    def __init__(self, config):
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            self._make_newline(config)

    def _make_newline(self, config) -> None:
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or "flat"):
            width = config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / width**0.5)

    def match_newline(self) -> None:
        """Add `image_newline`, or drop it, as the config's `mm_patch_merge_type` says."""
        has_newline = getattr(self, "image_newline", None) is not None
        if has_newline and "unpad" not in (self.config.mm_patch_merge_type or "flat"):
            del self.image_newline  # a flat model's checkpoint has no place for it
        elif not has_newline:
            self._make_newline(self.config)

    def get_vision_tower(self):
        """Return the vision tower, or None for a pure language model."""
        tower = getattr(self, "vision_tower", None)
        # Older FSDP recipes hide the tower in a list so that it is not sharded.
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Add the tower and the projector to a language model, and write their keys into its config.

        Args:
            model_args: LLaVA's ModelArguments (`vision_tower`, `mm_vision_select_layer`, `mm_projector_type`, ...).
            fsdp: FSDP options; when given, the tower is hidden in a list, as LLaVA does.

        Raises:
            ValueError: `pretrain_mm_mlp_adapter` has no projector weights, or they do not fit.
        """
        self._write_vision_config(model_args)
        tower = self.get_vision_tower()
        if tower is None:
            tower = build_vision_tower(model_args)
            self.vision_tower = [tower] if fsdp else tower
        else:
            tower.tunable = bool(getattr(self.config, "unfreeze_mm_vision_tower", False))
            tower.load_model()
            tower.freeze()
        self.config.mm_hidden_size = tower.hidden_size
        self.config.mm_vision_config = tower.config.to_diff_dict()
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(self.config)
        self.match_newline()
        # A LoRA wrap freezes everything that existed before it.
        for parameter in self.mm_projector.parameters():
            parameter.requires_grad = True
        if getattr(model_args, "pretrain_mm_mlp_adapter", None):
            load_projector_weights(self, model_args.pretrain_mm_mlp_adapter, newline_may_be_missing=True)

    def _write_vision_config(self, model_args) -> None:
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = getattr(model_args, "mm_vision_select_feature", "patch")
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        tune = getattr(model_args, "unfreeze_mm_vision_tower", None)
        if tune is not None:
            config.unfreeze_mm_vision_tower = tune


class LlavaMetaForCausalLM(ABC):
    """Mixin for the causal language model: pictures in, spliced embeddings out."""

    config: Any

    @abstractmethod
    def get_model(self) -> Any:
        """Return the inner decoder."""

    def get_vision_tower(self):
        """Return the vision tower, or None."""
        return self.get_model().get_vision_tower()

    @property
    def reduction(self) -> DuetConfig | None:
        """The token reduction in force, read from `config.duet`; None when there is none."""
        stored = getattr(self.config, "duet", None)
        if stored is None:
            return None
        # Read once: every decoding step asks. With an attached model it goes with the handle when DUET is detached.
        attached = duet.handle(self)  # type: ignore[arg-type]
        holder = vars(self if attached is None else attached)
        read, parsed = holder.get("_parsed_reduction", (None, None))
        if read != stored:
            parsed = DuetConfig.from_model_config(self.config)
            holder["_parsed_reduction"] = (deepcopy(stored), parsed)
        return parsed

    def set_reduction(self, config: DuetConfig | None) -> None:
        """Store a reduction in the model's config, where forward, generate and saving find it.

        Args:
            config: The reduction, or None for none.

        Raises:
            ValueError: It does not fit the tower or the decoder's depth, or `duet.attach` is in force.
        """
        if duet.handle(self) is not None:  # type: ignore[arg-type]
            raise ValueError(
                "duet.attach is in force on this model; call duet.detach(model) before set_reduction, or attach again "
                "with the other configuration"
            )
        vars(self).pop("_parsed_reduction", None)
        if config is None:
            if hasattr(self.config, "duet"):
                del self.config.duet
            return
        self.check_reduction(config)
        self.config.duet = config.to_dict()

    def check_reduction(self, config: DuetConfig | None) -> None:
        """Refuse a reduction that does not fit this model.

        Raises:
            ValueError: It does not fit the tower or the decoder's depth, or is no reduction at all.
        """
        if config is None:
            return
        config = DuetConfig.require(config)
        if self.get_vision_tower() is not None:
            check_config(self, config)  # type: ignore[arg-type]

    def encode_images(
        self,
        images: Tensor,
        question: Question | None = None,
        tiles: list[tuple[int, int]] | None = None,
        layouts: list[Layout] | None = None,
        places: list[Tensor] | None = None,
    ) -> Tensor | list[Tensor]:
        """Pictures to language-model tokens: tower, stage 1, projector.

        Args:
            images: [B, 3, H, W].
            question: What is asked about each picture, for reductions that listen.
            tiles: (rows, columns) of tiles of each picture, whose passes follow that of the whole picture; (0, 0) for
                one without tiles, None when each of `images` is a picture of its own.
            layouts: Where a reduction has to know which patches of each picture's passes are border, instead of
                `tiles`.
            places: Is given [K] per picture, the patch that each token stands for.

        Returns:
            [B, K, D]; K is every patch when no reduction is set. A list of [K_i, D] where the reduction finds the
            number of tokens picture by picture. With `layouts` [K_i, D] of each picture, or [passes, N, D] of one that
            the reduction leaves whole.
        """
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        reduction = self.reduction

        def project(features: Tensor) -> Tensor:
            weight = next(projector.parameters(), None)
            return projector(features if weight is None else features.to(weight.dtype))

        # Only what is set is passed on, for projects that replace the tower's forward or encode_images.
        further = {"reduction": reduction, "question": question, "tiles": tiles, "layouts": layouts, "places": places}
        further |= {"project": project} if reduction is not None else {}
        features = run_tower(tower, images, {name: value for name, value in further.items() if value is not None})
        ragged = isinstance(features, list)
        # One call, whatever the pictures are: under ZeRO-3 every rank must call every module equally often.
        flat = torch.cat([one.flatten(0, -2) for one in features]) if ragged else features
        projected = project(flat)
        if not ragged:
            return projected
        parts = projected.split([one[..., 0].numel() for one in features])
        return [part.view(*one.shape[:-1], -1) for part, one in zip(parts, features, strict=True)]

    @tracing.recorded
    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Encode the pictures and splice them into the text embeddings.

        Args:
            input_ids: [B, T] with `IMAGE_TOKEN_INDEX` where a picture goes.
            position_ids: [B, T] or None.
            attention_mask: [B, T] or None (all valid).
            past_key_values: Passed through.
            labels: [B, T] or None.
            images: [M, 3, H, W], [M, tiles, 3, H, W], or a list of M pictures [3, H, W] or [tiles, 3, H, W].
            image_sizes: (width, height) of the M pictures, needed by `spatial_unpad`.

        Returns:
            `(None, position_ids, attention_mask, past_key_values, inputs_embeds, labels)`, with what came in as None
            going out as None, and `.visual_mask` [B, L]. On a decode step, or without pictures, the inputs come back as
            they were: `(input_ids, position_ids, attention_mask, past_key_values, None, labels)`.

        Raises:
            ValueError: Pictures and `<image>` marks disagree; the message names the row.
        """
        untouched = SplicedInputs((input_ids, position_ids, attention_mask, past_key_values, None, labels))
        one = input_ids.shape[1] == 1
        if one and is_filled(past_key_values):  # a decoding step reads nothing back from the device
            return untouched
        has_images = images is not None and len(images) > 0
        decoding = one and not (input_ids == IMAGE_TOKEN_INDEX).any()
        if self.get_vision_tower() is None or not has_images or decoding:
            self._refuse_slots(input_ids)
            return untouched
        question = self._question(input_ids, attention_mask, labels)
        # What gives tensors their shapes is read here, so that nothing waits for the tower.
        ids, mask, targets = input_ids.cpu(), *(None if t is None else t.cpu() for t in (attention_mask, labels))
        placed = self.reduction is not None and self.reduction.positions == "patch"
        found: list[Tensor] | None = [] if placed else None
        features = self._image_features(images, image_sizes, ids, question, found)
        places = None if found is None else Places(found, self._whole_picture())
        batch = self._splice(ids, mask, targets, features, places, input_ids.device)
        return SplicedInputs(
            (
                None,
                batch.positions if placed or position_ids is not None else None,
                None if attention_mask is None else batch.mask.to(attention_mask.dtype),
                past_key_values,
                batch.embeds,
                None if labels is None else batch.labels,
            ),
            visual_mask=batch.visual,
            next_position=batch.ends if placed else None,
            counts=batch.counts,
        )

    def _whole_picture(self) -> int:
        """Tokens of a picture that nothing reduces, the class token included where it is taken."""
        tower: Any = self.get_vision_tower()
        return tower.num_patches + int(tower.select_feature == "cls_patch")

    def _splice(self, input_ids, attention_mask, labels, features, places: Places | None, device: torch.device):
        """Splice `features` (a list of [K, D]) into every row, then truncate and pad.

        Ids, mask and labels are on the host; the embedding table takes its ids on `device`.
        """
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        # A pad id that equals a real token must not cost a picture its slot.
        valid = valid | (input_ids == IMAGE_TOKEN_INDEX)
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        dealt = assign_features(image_slots(input_ids), len(features))
        ids = [row[keep] for row, keep in zip(input_ids, valid, strict=True)]
        texts = embed_text(ids, self.get_model().get_input_embeddings(), device)
        rows = [
            splice_row(
                ids[row],
                labels[row][valid[row]],
                [features[i] for i in indices],
                texts[row],
                None if places is None else Places([places.tokens[i] for i in indices], places.length),
            )
            for row, indices in enumerate(dealt)
        ]
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        if limit is not None and any(len(row.labels) > limit for row in rows):
            logger.warning_once(f"samples longer than tokenizer_model_max_length={limit} with their pictures are cut")
        return pad(truncate(rows, limit), getattr(self.config, "tokenizer_padding_side", None) or "right")

    def _refuse_slots(self, input_ids: Tensor) -> None:
        rows = (input_ids == IMAGE_TOKEN_INDEX).any(dim=1).nonzero().flatten().tolist()
        if not rows:
            return
        cause = "this model has no vision tower" if self.get_vision_tower() is None else "no picture was given"
        raise ValueError(
            f"the prompt in row {rows[0]} has an <image> mark but {cause}: pass images=..., or take the mark out"
        )

    def _question(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Question | None:
        """What every row asks, or None where the reduction does not listen."""
        if not is_read(self.reduction):
            return None
        marks = input_ids == IMAGE_TOKEN_INDEX
        text = asked(attention_mask, marks, None if labels is None else labels != IGNORE_INDEX)
        embeds = self.get_model().get_input_embeddings()(input_ids.clamp(min=0).masked_fill(~text, 0))
        handle = duet.handle(self)  # type: ignore[arg-type]
        return read_question(input_ids, embeds, text, None if handle is None else handle.text_encoder)

    def _image_features(
        self,
        images,
        image_sizes,
        input_ids: Tensor,
        question: Question | None,
        places: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """One [K, D] per picture; an object that is in the list several times is encoded once per question.

        `places` is given [K] per picture: the patch that each token stands for.
        """
        images = list(images)
        keys: list[Any] = [id(image) for image in images]
        owners = torch.zeros(len(images), dtype=torch.long)
        if question is not None:
            dealt = assign_features(image_slots(input_ids), len(images))
            owners = torch.tensor([row for row, indices in enumerate(dealt) for _ in indices])
            keys = list(zip(keys, owners.tolist(), strict=True))
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        chosen = sorted(first.values())
        if image_sizes is not None and len(image_sizes) != len(images):
            raise ValueError(
                f"{len(image_sizes)} image_sizes were given for {len(images)} picture(s); give one for each, in order"
            )
        sizes = None if image_sizes is None else [image_sizes[index] for index in chosen]
        asked_of = None if question is None else question.select(owners[chosen])
        found: list[Tensor] = []
        features = self._encode_pictures(
            [images[index] for index in chosen], sizes, asked_of, None if places is None else found
        )
        order = {index: place for place, index in enumerate(chosen)}
        if places is not None:
            places += [found[order[first[key]]] for key in keys]
        return [features[order[first[key]]] for key in keys]

    def _encode_pictures(
        self, images: list[Tensor], image_sizes, question: Question | None, places: list[Tensor] | None = None
    ) -> list[Tensor]:
        """One [K, D] per picture, tiles merged."""
        if places is not None and any(image.ndim == 4 for image in images):
            raise ValueError("positions='patch' counts the patches of one picture, and these have tiles; take 'auto'")
        stacks = [image if image.ndim == 4 else image.unsqueeze(0) for image in images]
        tiling = Tiling.of(self.config, self.get_vision_tower().config)
        merge = getattr(self.config, "mm_patch_merge_type", None) or "flat"
        laid_out = merge != "flat" and any(image.ndim == 4 for image in images)
        if not laid_out and self.reduction is not None and self.reduction.per == "picture":
            layouts = [tiling.stacked(len(stack)) for stack in stacks]
            shared = self.encode_images(torch.cat(stacks), question, layouts=layouts)
            return [tokens.flatten(0, -2) for tokens in shared]
        if not laid_out:
            return self._encode_flat(stacks, image_sizes, question, places)
        if image_sizes is None:
            raise ValueError(
                f"mm_patch_merge_type={merge!r} needs image_sizes, the (width, height) in pixels of every picture"
            )
        sizes = [(int(width), int(height)) for width, height in image_sizes]
        newline = self.get_model().image_newline if tiling.unpad else None
        merged = []
        for feature, size in zip(self._encode_laid_out(stacks, sizes, tiling, question), sizes, strict=True):
            if feature.ndim == 3:
                merged.append(tiling.merge(feature, size, newline))
                continue
            # What stage 1 keeps of a picture forms no rows any more, so it has no newlines. The parameter stays in the
            # graph all the same, because ranks whose pictures differ must have gradients of the same parameters.
            merged.append(feature if newline is None else torch.cat([feature, newline[None].to(feature)[:0]]))
        return merged

    def _encode_laid_out(
        self, stacks: list[Tensor], sizes: list[tuple[int, int]], tiling: Tiling, question: Question | None
    ) -> list[Tensor]:
        """Tokens [K, D] of each picture that stage 1 reduces, and all passes [P, N, D] of each other one."""
        counts = [len(stack) for stack in stacks]
        layouts = [tiling.layout(size, count) for size, count in zip(sizes, counts, strict=True)]
        further = {} if self.reduction is None else {"layouts": layouts, "question": question}
        encoded = self.encode_images(torch.cat(stacks), **{k: v for k, v in further.items() if v is not None})
        return list(encoded.split(counts)) if isinstance(encoded, Tensor) else encoded

    def _encode_flat(
        self, stacks: list[Tensor], image_sizes, question: Question | None, places: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Tokens [K, D] of each picture: what its tower passes give, one after the other."""
        counts = [len(stack) for stack in stacks]
        tiles = self._tiles(counts, image_sizes)
        if question is not None and tiles is None:
            question = question.select(torch.arange(len(stacks)).repeat_interleave(torch.tensor(counts)))
        further = {"question": question, "tiles": tiles, "places": places}
        encoded = self.encode_images(
            torch.cat(stacks), **{name: value for name, value in further.items() if value is not None}
        )
        return [f.flatten(0, 1) if isinstance(f, Tensor) else torch.cat(f) for f in _deal(counts, encoded)]

    def _tiles(self, counts: list[int], image_sizes) -> list[tuple[int, int]] | None:
        """(rows, columns) of tiles of each picture; None where no picture has any, or their layout is not known."""
        tiling = Tiling.of(self.config, self.get_vision_tower().config)
        if self.reduction is None or max(counts) == 1 or image_sizes is None or not tiling.pinpoints:
            return None
        tiles = []
        for size, count in zip(image_sizes, counts, strict=True):
            across, down = tiling.grid(size) if count > 1 else (0, 0)
            tiles.append((down, across))
        return tiles if [1 + rows * columns for rows, columns in tiles] == counts else None

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the image tokens that the options ask for, with mean-initialised rows.

        Args:
            model_args: `mm_use_im_patch_token`, `mm_use_im_start_end`, `tune_mm_mlp_adapter`,
                `pretrain_mm_mlp_adapter`.
            tokenizer: Grows in place, and the embeddings with it.

        Raises:
            ValueError: The projector file's embedding rows do not fit the new tokens.
        """
        model: Any = self
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            model.resize_token_embeddings(len(tokenizer))
        if model_args.mm_use_im_start_end:
            added = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
            model.resize_token_embeddings(len(tokenizer))
            self._initialize_new_rows(model_args, added)
        elif model_args.mm_use_im_patch_token and getattr(model_args, "tune_mm_mlp_adapter", False):
            self._train_embeddings(inputs=False)

    def _initialize_new_rows(self, model_args, added: int) -> None:
        model: Any = self
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if added > 0:
            with torch.no_grad(), gathered([inputs, outputs]):
                for weight in (inputs, outputs):
                    weight[-added:] = weight[:-added].mean(dim=0, keepdim=True)
        if getattr(model_args, "tune_mm_mlp_adapter", False):
            self._train_embeddings(inputs=True)
        path = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if path and added > 0:
            stored = read_projector_file(path).get("model.embed_tokens.weight")
            if stored is None:
                raise ValueError(f"{path}: no model.embed_tokens.weight, which mm_use_im_start_end needs")
            with torch.no_grad(), gathered([inputs]):
                if stored.shape[1:] != inputs.shape[1:] or len(stored) not in (added, len(inputs)):
                    raise ValueError(
                        f"{path}: model.embed_tokens.weight has shape {tuple(stored.shape)}; expected {added} or "
                        f"{len(inputs)} rows of width {inputs.shape[1]}"
                    )
                inputs[-added:] = stored[-added:].to(inputs)

    def _train_embeddings(self, inputs: bool) -> None:
        model: Any = self
        model.get_input_embeddings().requires_grad_(inputs)
        model.get_output_embeddings().requires_grad_(False)


def _deal(tiles: list[int], encoded: Tensor | list[Tensor]) -> list[Any]:
    """Split what the tiles of a batch gave ([B, K, D], or a list of [K_i, D]) into one part per picture."""
    if isinstance(encoded, Tensor):
        return list(encoded.split(tiles))
    parts = iter(encoded)
    return [[next(parts) for _ in range(count)] for count in tiles]
