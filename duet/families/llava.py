"""``transformers.LlavaForConditionalGeneration`` (LLaVA-1.5 and models of the same class).

Shapes: B batch, L sequence as the processor made it (one placeholder per unreduced patch), L' after stage 1,
I images, K tokens per image, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaForConditionalGeneration

from duet.config import DuetConfig
from duet.decoder import DecoderOutput, run_decoder
from duet.families import FAMILIES, Family, ModelFacts
from duet.tokens import IGNORE_INDEX, compaction_index, gather_tokens, is_left_padded
from duet.vision import encode_vision


@dataclass
class Prompt:
    """A batch of prompts whose image placeholders match the tokens that stage 1 made."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    visual_mask: Tensor | None
    labels: Tensor | None
    answer_mask: Tensor | None


class ReducedLlava:
    """Stands in front of ``LlavaForConditionalGeneration`` while DUET is attached.

    Modifications:
        forward: the vision tower stops early and is reduced (stage 1), placeholders shrink to match, the decoder drops
            visual tokens between layers (stage 2), labels shrink in lockstep. Logits have the reduced length.
        generate: remembers the prompt length, so that generated tokens never rank, with or without a cache; beams of a
            sample with several images keep them in order.
    """

    def generate(self, inputs: Tensor | None = None, **kwargs: Any):
        """Generate as the host class does; the prompt alone decides which visual tokens stay."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None and kwargs.get("past_key_values") is None:
            kwargs.setdefault("prompt_length", ids.shape[1])
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ):
        pixels, model = kwargs.pop("pixel_values", None), self
        if pixels is not None and expand_size > 1:
            ids_or_embeds = kwargs["inputs_embeds"] if input_ids is None else input_ids
            owner = _image_owners(_placeholders(model, ids_or_embeds), len(pixels))
            pixels = torch.cat([pixels[owner == row].repeat(expand_size, 1, 1, 1) for row in owner.unique()])
        ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs if pixels is None else kwargs | {"pixel_values": pixels}

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_length: int | None = None,
        query_indices: Tensor | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ):
        """Run the reduced model.

        Args beyond the host's:
            prompt_length: positions of ``input_ids`` from this one on are answers and never rank.
            query_indices: [B, R] positions (after stage 1) of the rows that rank, padded with -1.

        Raises:
            ValueError: the placeholders of a sample do not match the images, or an option cannot work reduced.
        """
        del image_sizes
        model: Any = self
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        config = model._duet.config
        prompt = Prompt(inputs_embeds, attention_mask, position_ids, None, labels, None)  # type: ignore[arg-type]
        if inputs_embeds is None:
            prompt.inputs_embeds = model.get_input_embeddings()(input_ids)
        fed_length = prompt.inputs_embeds.shape[1]
        features = None
        if pixel_values is not None:
            strategy = vision_feature_select_strategy or model.config.vision_feature_select_strategy
            features = _image_features(model, pixel_values, vision_feature_layer, strategy, config)
            ids_or_embeds = input_ids if input_ids is not None else prompt.inputs_embeds
            expected = model._duet.facts.patches + int(strategy == "full" and model._duet.facts.class_token)
            prompt = _insert_images(prompt, _placeholders(model, ids_or_embeds), features, expected, prompt_length)
        decoder = model.model.language_model
        if use_cache is None:
            use_cache = bool(model.config.text_config.use_cache) and not _checkpoints(decoder)
        out = run_decoder(
            decoder,
            prompt.inputs_embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            visual_mask=prompt.visual_mask,
            labels=prompt.labels,
            answer_mask=prompt.answer_mask,
            query_indices=query_indices,
            past_key_values=past_key_values,
            use_cache=use_cache,
            config=config,
            fed_length=fed_length,
            output_hidden_states=output_hidden_states,
            **{key: kwargs.pop(key) for key in ("output_attentions",) if key in kwargs},
        )
        result = _output(model, out, features, logits_to_keep, kwargs)
        return result.to_tuple() if return_dict is False else result


def _output(model: Any, out: DecoderOutput, features: Tensor | None, logits_to_keep: int | Tensor, kwargs: dict):
    hidden = out.last_hidden_state
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(hidden[:, keep, :])
    loss = None
    if out.labels is not None:
        loss = model.loss_function(
            logits=logits, labels=out.labels, vocab_size=model.config.text_config.vocab_size, **kwargs
        )
    return LlavaCausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=out.past_key_values,
        hidden_states=out.hidden_states,  # type: ignore[arg-type]
        image_hidden_states=None if features is None else features.flatten(0, 1),
    )


def _checkpoints(decoder: nn.Module) -> bool:
    return decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers)  # type: ignore[union-attr]


def _image_features(model: Any, pixel_values: Tensor, layer: Any, strategy: str, config: DuetConfig) -> Tensor:
    """Return projected visual tokens, [I, K, D]."""
    layer = model.config.vision_feature_layer if layer is None else layer
    pixel_values = pixel_values.to(model.model.vision_tower.dtype)
    projector = model.model.multi_modal_projector
    reduction = encode_vision(
        model.model.vision_tower,
        pixel_values,
        select_layer=layer,
        class_token=strategy == "full",
        config=config,
        project=projector,
    )
    return projector(reduction.tokens)


def _placeholders(model: Any, ids_or_embeds: Tensor) -> Tensor:
    """Return where image placeholders stand, [B, L] bool."""
    token = model.config.image_token_id
    if ids_or_embeds.dim() == 2:
        return ids_or_embeds == token
    wanted = model.get_input_embeddings()(torch.tensor(token, device=ids_or_embeds.device))
    return (ids_or_embeds == wanted).all(-1)


def _insert_images(prompt: Prompt, marks: Tensor, features: Tensor, expected: int, prompt_length: int | None) -> Prompt:
    """Shrink the ``expected`` placeholders of every image to K and fill in the features."""
    images, kept, _ = features.shape
    _check_placeholders(marks, images, expected)
    batch, length = marks.shape
    if prompt_length is not None and prompt_length < length:
        prompt.answer_mask = (torch.arange(length, device=marks.device) >= prompt_length).expand(batch, -1)
    if expected != kept:
        prompt, marks = _shrink(prompt, marks, expected, kept)
    embeds = prompt.inputs_embeds
    flat = features.flatten(0, 1).to(embeds.device, embeds.dtype)
    prompt.inputs_embeds = embeds.masked_scatter(marks.unsqueeze(-1), flat)
    prompt.visual_mask = marks
    return prompt


def _image_owners(marks: Tensor, images: int) -> Tensor:
    """Return the sample that each image belongs to. Shapes: marks [B, L]; returns [I]."""
    per_image = max(1, int(marks.sum()) // images)
    rows = torch.arange(len(marks), device=marks.device)
    return rows.repeat_interleave(marks.sum(1) // per_image)


def _check_placeholders(marks: Tensor, images: int, expected: int) -> None:
    """Raise ValueError unless every sample holds whole images and all images have their placeholders."""
    counts = marks.sum(1).tolist()
    if sum(counts) != images * expected or any(count % expected for count in counts):
        raise ValueError(
            f"{images} image(s) were given, but the samples hold {counts} image placeholder tokens; every image needs "
            f"{expected} of them in one sample (the processor writes them), before DUET shrinks them"
        )


def _shrink(prompt: Prompt, marks: Tensor, per_image: int, kept: int) -> tuple[Prompt, Tensor]:
    """Keep the first ``kept`` placeholders of every image and close the gaps."""
    if kept > per_image:
        raise ValueError(
            f"stage 1 gives {kept} tokens per image, but a prompt has only {per_image} placeholders for each"
        )
    mask = prompt.attention_mask
    valid = torch.ones_like(marks) if mask is None else mask.bool()
    keep = (~marks | ((marks.cumsum(1) - 1) % per_image < kept)) & valid
    left = is_left_padded(None if mask is None else valid)
    index = compaction_index(keep, int(keep.sum(1).max()), left)
    new_valid = keep.gather(1, index)
    labels = None if prompt.labels is None else prompt.labels.gather(1, index).masked_fill(~new_valid, IGNORE_INDEX)
    answers = None if prompt.answer_mask is None else prompt.answer_mask.gather(1, index) & new_valid
    shrunk = Prompt(
        inputs_embeds=gather_tokens(prompt.inputs_embeds, index),
        attention_mask=new_valid,
        position_ids=None,
        visual_mask=None,
        labels=labels,
        answer_mask=answers,
    )
    return shrunk, marks.gather(1, index) & new_valid


class LlavaFamily(Family):
    """``model_type`` "llava"."""

    mixin = ReducedLlava

    def check(self, model: nn.Module) -> None:
        """Accept ``LlavaForConditionalGeneration`` and its subclasses only."""
        if not isinstance(model, LlavaForConditionalGeneration):
            raise ValueError(
                f"{type(model).__name__} has model_type 'llava' but is no LlavaForConditionalGeneration; attach to the "
                "full model, head included"
            )

    def facts(self, model: Any) -> ModelFacts:
        """Return patches, depth and class token from the configuration."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        has_class = hasattr(
            getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).embeddings, "class_embedding"
        )
        return ModelFacts(side * side, model.config.text_config.num_hidden_layers, has_class)


FAMILIES.register("llava")(LlavaFamily())
