"""The causal language model around a decoder that has pictures: forward, generate, load and save.

One class serves every backbone; `llava_llama.py` and `llava_mistral.py` only name theirs.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from duet import causal_lm_loss, tracing
from duet.cache import masks_for_generate
from duet.decoder import reduces
from duet.tokens import Counts
from duet.versions import CACHE, WITHOUT_USE, build_output, refuse_unknown, take_cache
from llava import selftest
from llava.model.checkpoints import TOWER_PREFIX, to_original_layout
from llava.model.language_model.decoder import (
    LlavaCausalLMOutput,
    LlavaDecoderOutput,
    cache_argument,
    check_takes,
    goes_on_reduced,
)
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import clean_generation_config, load_pretrained
from llava.model.splice import Knowledge, knowledge_of, remember, to_left_padding

logger = logging.get_logger(__name__)


class LlavaCausalLM(LlavaMetaForCausalLM):
    """What all LLaVA language models do; stands in front of a `transformers` causal language model.

    Modifications to the host class:
        forward: splices pictures, pairs logits with labels as the decoder leaves them, and makes no logits where the
            loss alone is asked for.
        generate: takes pictures, pads on the left, returns new tokens only.
        from_pretrained: reads LLaVA and llava-hf checkpoints strictly; stock tower weights only if there are none.
        save_pretrained: writes LLaVA's layout.
    """

    config: Any
    model: Any
    lm_head: Any
    generation_config: Any
    training: bool

    create_masks_for_generate = staticmethod(masks_for_generate)
    _keys_to_ignore_on_load_unexpected = frozenset({r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$"})

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the trainer hands over the global token count (`config.loss_normalization == "global"`).

        The default, "device", is the recipe's: every device averages over its own label tokens.
        """
        kind = getattr(self.config, "loss_normalization", None) or "device"
        if kind not in ("device", "global"):
            raise ValueError(f"config.loss_normalization is {kind!r}; use 'device' (mean on each device) or 'global'")
        return kind == "global"

    def get_model(self) -> Any:
        """Return the inner decoder."""
        return self.model

    @tracing.recorded
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images=None,
        image_sizes=None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        visual_mask: Tensor | None = None,
        answer_mask: Tensor | None = None,
        query_indices: Tensor | None = None,
        next_position: Tensor | None = None,
        counts: Counts | None = None,
        num_items_in_batch: int | Tensor | None = None,
        skip_logits: bool = False,
        cache=None,
        **kwargs,
    ):
        """Run the model.

        Args:
            input_ids: [B, T] with `IMAGE_TOKEN_INDEX` where a picture goes.
            attention_mask: [B, T], or [B, L] with `inputs_embeds`.
            position_ids: Like `attention_mask`.
            past_key_values: A cache; go on with the returned one.
            inputs_embeds: [B, L, D], already spliced; see `visual_mask`.
            labels: [B, T], -100 where nothing is predicted.
            use_cache: Default: the config's, and never while training.
            output_attentions: Also return the attention maps, which eager attention alone makes; with a reduction each
                is as large as what its layer sees.
            output_hidden_states: Also return the input of every layer.
            images: See `prepare_inputs_labels_for_multimodal`.
            image_sizes: See `prepare_inputs_labels_for_multimodal`.
            return_dict: False returns a tuple.
            logits_to_keep: Logits of the last n positions only; 0 is all.
            visual_mask: [B, L] bool with `inputs_embeds`: positions that came from a picture. Not needed with the very
                tensor that `prepare_inputs_labels_for_multimodal` returned. All False for text.
            answer_mask: [B, L] bool with `inputs_embeds`: generated positions, which never rank visual tokens.
            query_indices: [B, R] positions of the rows that rank visual tokens, padded with -1.
            next_position: [B] with `inputs_embeds` and `position_ids`: the position of the token that follows each row.
            counts: With `inputs_embeds`: how many tokens and visual tokens each row has, where the caller knows.
            num_items_in_batch: Label tokens of the global batch, used with `loss_normalization="global"` only.
            skip_logits: With `labels`: make no logits, which the loss does not need (it runs the head on supervised
                positions only); the trainer asks for this.
            cache: What transformers 5.24 and later call `past_key_values`; both names work with every release.
            **kwargs: `modalities` and `token_type_ids`, which other models need and clients pass; anything else is
                refused.

        Returns:
            `LlavaCausalLMOutput`: what `CausalLMOutputWithPast` holds, and `labels` [B, L'] as they stand beside the
            logits: pictures stretch both, and a reduction leaves what the last layer saw.

        Raises:
            TypeError: A keyword argument that nothing reads.
            ValueError: Pictures and `<image>` marks disagree; attention maps are asked for that the kernel does not
                make; or a reduction is in force that unknown `inputs_embeds` or a replaced forward would go past.
        """
        cache = take_cache({"past_key_values": past_key_values, "cache": cache})
        _refuse_unread(self, kwargs)
        if inputs_embeds is None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, cache, labels, images, image_sizes
            )
            input_ids, position_ids, attention_mask, cache, inputs_embeds, labels = prepared
            # Another project's override returns a plain tuple; then only the tensor may know what is visual.
            visual_mask = getattr(prepared, "visual_mask", None)
            next_position = getattr(prepared, "next_position", next_position)
            counts = getattr(prepared, "counts", None)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        out = self._decode(
            {"input_ids": input_ids if inputs_embeds is None else None, "inputs_embeds": inputs_embeds},
            {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache},
            cache,
            {
                "visual_mask": visual_mask, "labels": labels, "answer_mask": answer_mask, "counts": counts,
                "query_indices": query_indices, "next_position": next_position,
            },
            {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states},
        )  # fmt: skip
        hidden, labels = out.last_hidden_state, getattr(out, "labels", labels)
        loss = logits = None
        if labels is not None:
            count = num_items_in_batch if self.accepts_loss_kwargs else None
            loss = causal_lm_loss(hidden, labels, self.lm_head, count)
        if labels is None or not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep, :])
        result = build_output(
            LlavaCausalLMOutput,
            cache=getattr(out, CACHE, None),
            loss=loss,
            logits=logits,
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
            labels=labels,
        )
        return result.to_tuple() if return_dict is False else result

    def _decode(self, inputs: dict, given: dict, cache: Any, further: dict, asked: dict) -> Any:
        """Call the inner decoder, so that hooks on it and a forward in its place act; what is None is not passed."""
        embeds = inputs["inputs_embeds"]
        further = {name: value for name, value in further.items() if value is not None}
        given = given | {name: value for name, value in asked.items() if value is not None}
        reduction = self.reduction
        reduced = reduces(reduction) or goes_on_reduced(cache)
        if reduced:
            check_takes(self.model, further)
            given |= further if reduction is None else further | {"reduction": reduction}
        elif tracing.is_active() and "visual_mask" in further and knowledge_of(embeds) is None:
            remember(embeds, Knowledge(further["visual_mask"]))
        if cache is not None:
            given[cache_argument(self.model.forward)] = cache
        out = self.model(**inputs, **given)
        if isinstance(out, tuple):  # another project's forward
            first, *rest = out
            held = next((part for part in rest if isinstance(part, Cache)), None)
            out = build_output(BaseModelOutputWithPast, cache=held, last_hidden_state=first)
        if reduced and not isinstance(out, LlavaDecoderOutput):
            raise ValueError(
                f"a DUET reduction is in force, but {type(self.model).__name__} returned a {type(out).__name__}: its "
                "forward was replaced, or a hook put something else in the place of its output, and the reduction was "
                "lost. Take that off, or the reduction: model.set_reduction(None)"
            )
        return out

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, images=None, image_sizes=None, **kwargs):
        """Generate after prompts with pictures.

        Args:
            inputs: [B, T] prompt ids with `IMAGE_TOKEN_INDEX`; `input_ids=` is taken, too.
            images: All pictures of the batch in the order of the marks, or None.
            image_sizes: Their (width, height).
            **kwargs: `attention_mask` (default: all valid) and everything that `transformers`' generate takes. With
                `past_key_values` that hold n positions of each prompt, the first n columns of `inputs` stand for them,
                whatever their ids, and nothing is moved to the left of them.

        Returns:
            The new tokens only, [B, n].

        Raises:
            NotImplementedError: `inputs_embeds` was given.
            ValueError: No prompt, or pictures and `<image>` marks disagree.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise NotImplementedError("generate takes input ids and images; `inputs_embeds` is not supported")
        aliased = kwargs.pop("input_ids", None)
        inputs = aliased if inputs is None else inputs
        if inputs is None:
            raise ValueError("generate needs a prompt: pass inputs=... (or input_ids=...), a LongTensor [B, T]")
        kwargs.pop("position_ids", None)  # follow from the mask once padding has moved
        kwargs.pop("modalities", None)  # LLaVA-NeXT clients say "image" here
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(inputs) if mask is None else mask
        prepared = self.prepare_inputs_labels_for_multimodal(
            inputs, None, mask, None, None, images, image_sizes=image_sizes
        )
        _, _, mask, _, embeds, _ = prepared
        known = knowledge_of(embeds)
        visual, positions = None if known is None else known.visual_mask, prepared[1]
        if embeds is None:
            visual = torch.zeros_like(inputs, dtype=torch.bool)
            # The pad id of some tokenizers has no row in the embedding table.
            embeds = self.model.get_input_embeddings()(inputs.masked_fill(mask == 0, 0))
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        embeds: Any
        given = take_cache(kwargs)
        if given is not None:
            kwargs[CACHE] = given
        else:
            mask, (embeds, visual, positions) = to_left_padding(mask.to(embeds.device), embeds, visual, positions)
            counts = getattr(prepared, "counts", None)
            kwargs["counts"] = None if counts is None else counts.left()
        if positions is not None:
            kwargs |= {"position_ids": positions, "next_position": prepared.next_position}
        if self.generation_config.max_length is not None and not {"max_length", "generation_config"} & set(kwargs):
            # Old checkpoints store max_length; next to max_new_tokens transformers would complain on every call.
            new_tokens = kwargs.pop("max_new_tokens", None)
            if new_tokens is not None:
                kwargs["max_length"] = embeds.shape[1] + new_tokens
        host: Any = super()
        return host.generate(inputs_embeds=embeds, attention_mask=mask, visual_mask=visual, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, is_first_iteration=False, cache=None, **kwargs
    ):
        """Hand pictures and visual positions to the first step; without a cache, the whole sequence to every step."""
        names = ("images", "image_sizes", "visual_mask", "next_position", "counts")
        first_only = {key: kwargs.pop(key, None) for key in names}
        prompt: Any = inputs_embeds
        known = knowledge_of(prompt)
        if known is not None and first_only["visual_mask"] is None:
            first_only["visual_mask"] = known.visual_mask  # the host copies the embeddings
        positions: Any = kwargs.get("position_ids")
        host: Any = super()
        model_inputs = host.prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: take_cache({"past_key_values": past_key_values, "cache": cache})},
            **kwargs,
        )
        cached = kwargs.get("use_cache", True)
        if is_first_iteration:
            if first_only["counts"] is not None:  # beams of a sample stand next to each other
                first_only["counts"] = first_only["counts"].repeated(len(prompt) // len(first_only["counts"].tokens))
            model_inputs.update({key: value for key, value in first_only.items() if value is not None})
        elif not cached and prompt is not None:
            model_inputs.update(self._recompute_inputs(prompt, input_ids, first_only["visual_mask"]))
            later = first_only["next_position"]
            model_inputs["position_ids"] = (
                _positions(model_inputs["attention_mask"])
                if later is None
                else _continued(positions[:, : prompt.shape[1]], later, input_ids.shape[1])
            )
        return model_inputs

    def _recompute_inputs(self, prompt: Tensor, generated: Tensor, visual: Tensor | None) -> dict:
        """Inputs of a step without a cache: prompt and generated tokens, of which only the prompt may rank."""
        embeds = torch.cat([prompt, self.model.get_input_embeddings()(generated).to(prompt.dtype)], dim=1)
        new = generated.new_ones(generated.shape, dtype=torch.bool)
        old = new.new_zeros(prompt.shape[:2])
        inputs = {"input_ids": None, "inputs_embeds": embeds, "answer_mask": torch.cat([old, new], dim=1)}
        if visual is not None:
            inputs["visual_mask"] = torch.cat([visual, torch.zeros_like(new)], dim=1)
        return inputs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a LLaVA checkpoint, a llava-hf checkpoint, or a plain language model to put vision on.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            *model_args: As in `transformers`.
            **kwargs: As in `transformers`.

        Raises:
            ValueError: The checkpoint has missing or unexpected weights; they are named.
        """
        selftest.ensure()
        host: Any = super()
        return load_pretrained(cls, host.from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Take an absent vision tower out of the host's report: stock weights fill it right afterwards."""
        host: Any = super()
        host._adjust_missing_and_unexpected_keys(loading_info)
        absent = {key for key in loading_info.missing_keys if key.startswith(TOWER_PREFIX)}
        loading_info.missing_keys -= absent
        self._absent_tower_keys = absent

    def save_pretrained(self, save_directory, state_dict=None, **kwargs) -> None:
        """Write LLaVA's layout: safetensors with the old CLIP key names, config.json, and the tower's preprocessing.

        Args:
            save_directory: Folder.
            state_dict: Weights to write instead of the model's own, as the trainer passes them.
            **kwargs: As in `transformers`.
        """
        model: Any = self
        clean_generation_config(self.generation_config)
        mapped = getattr(self, "_hf_peft_config_loaded", False) or getattr(self, "hf_quantizer", None) is not None
        offloaded = {"cpu", "disk"} & {str(d) for d in (getattr(self, "hf_device_map", None) or {}).values()}
        if not mapped and not (offloaded and str(model.device) != "cpu"):
            state_dict = to_original_layout(model.state_dict() if state_dict is None else state_dict)
            kwargs["save_original_format"] = False
        host: Any = super()
        host.save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        tower = self.get_vision_tower()
        if tower is not None and kwargs.get("is_main_process", True) and os.path.isdir(save_directory):
            tower.image_processor.save_pretrained(save_directory)


def _refuse_unread(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse keyword arguments that would be lost, but for those that name what every model here is."""
    left = {name for name, value in kwargs.items() if value is not None} - WITHOUT_USE - {"modalities"}
    refuse_unknown(left, inspect.signature(type(model).forward).parameters, f"{type(model).__name__}.forward")


def _continued(prompt: Tensor, later: Tensor, new: int) -> Tensor:
    """Positions of a prompt and `new` tokens after it. Shapes: [B, L], [B] to [B, L + new]."""
    return torch.cat([prompt, later.unsqueeze(1) + torch.arange(new, device=later.device)], dim=1)


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
