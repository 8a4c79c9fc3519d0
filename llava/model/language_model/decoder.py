"""The decoder inside a LLaVA model: transformers' own where nothing is reduced, DUET's loop where tokens are dropped.

Every caller passes here, those of `model.model(...)` too: the model around it pairs logits with labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from duet import DuetConfig, run_decoder, tracing
from duet.cache import DuetCache
from duet.decoder import record_whole_pass, reduces, without_trailing_padding
from duet.queries import answers_from_labels
from duet.tokens import Counts
from duet.versions import CACHE, CACHE_NAMES, build_output, refuse_unknown, take_cache
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.splice import knowledge_of

_ASKED = ("output_attentions", "output_hidden_states", "return_dict")


@dataclass
class LlavaDecoderOutput(BaseModelOutputWithPast):
    """What the inner decoder returns where a reduction is in force.

    Attributes:
        labels: [B, L'] that belong to `last_hidden_state`, where labels were given.
        attention_mask: [B, L'] bool; None where nothing is padding.
    """

    labels: Tensor | None = None
    attention_mask: Tensor | None = None


@dataclass
class LlavaCausalLMOutput(CausalLMOutputWithPast):
    """What the whole model returns.

    Attributes:
        labels: [B, L'] where labels were given: spliced and reduced like the logits, position by position.
    """

    labels: Tensor | None = None


def is_filled(cache: Any) -> bool:
    """Whether a cache holds positions, without asking the device for how many."""
    return any(layer.is_initialized for layer in getattr(cache, "layers", ()))


def goes_on_reduced(cache: Any) -> bool:
    """Whether a cache comes from a reduced prefill."""
    return isinstance(cache, DuetCache) and bool(cache.segments)


def cache_argument(forward: Any) -> str:
    """What a forward, perhaps one that another project put there, calls its key-value cache."""
    if torch.compiler.is_compiling():
        return CACHE
    names = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE)


def check_takes(decoder: Any, further: Mapping[str, Any]) -> None:
    """Refuse a decoder whose forward another project replaced by one that would go past the reduction.

    Raises:
        ValueError: It does not take what a reduced pass needs.
    """
    if torch.compiler.is_compiling():
        return
    names = inspect.signature(decoder.forward).parameters
    missing = sorted(set(further) - set(names))
    if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
        where = getattr(decoder.forward, "__module__", None) or "another project"
        raise ValueError(
            f"a DUET reduction is in force, but the forward of this {type(decoder).__name__} (of {where}) takes no "
            f"{missing[-1]!r} and would go past it: let it hand on what it gets to the forward that it replaced, or "
            "take the reduction off: model.set_reduction(None)"
        )


class LlavaDecoder:
    """Stands in front of a `transformers` decoder (`LlamaModel`, `MistralModel`, ...).

    Modifications to the host class:
        forward: drops visual tokens between layers where a reduction is in force, and is the host's own otherwise.
    """

    config: Any
    training: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        answer_mask: Tensor | None = None,
        query_indices: Tensor | None = None,
        next_position: Tensor | None = None,
        counts: Counts | None = None,
        reduction: DuetConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder.

        Args:
            input_ids: [B, T], text only.
            attention_mask: [B, L].
            position_ids: [B, L].
            cache: Key-value cache, under its older name `past_key_values` too.
            inputs_embeds: [B, L, D], spliced; what `prepare_inputs_labels_for_multimodal` made brings the rest along.
            use_cache: Default: the config's.
            visual_mask: [B, L] bool, positions that came from a picture; needed where tokens are dropped by layers and
                the embeddings come from elsewhere (all False for text).
            labels: [B, L]; shortened like the positions.
            answer_mask: See `LlavaCausalLM.forward`.
            query_indices: See there.
            next_position: See there.
            counts: See there.
            reduction: What the model around has read from the config; default: that is read here.
            **kwargs: What the host's forward takes.

        Returns:
            What the host returns; `LlavaDecoderOutput` where a reduction is in force.

        Raises:
            ValueError: Pictures were given; nobody says which positions are visual; or attention maps are asked for
                that the kernel does not make.
        """
        cache = take_cache({"cache": cache, "past_key_values": kwargs.pop("past_key_values", None)})
        if kwargs.pop("images", None) is not None:
            raise ValueError(
                "the decoder alone takes no pictures: call the whole model, or splice them with "
                "prepare_inputs_labels_for_multimodal and pass inputs_embeds; DUET reduces them there"
            )
        self._check_maps(kwargs)
        known = knowledge_of(inputs_embeds)
        if known is not None:
            visual_mask = known.visual_mask if visual_mask is None else visual_mask
            next_position = known.next_position if next_position is None else next_position
            if answer_mask is None and labels is None and known.labels is not None:
                answer_mask = answers_from_labels(known.labels)
        given = {
            "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache,
        }  # fmt: skip
        if reduction is None:
            reduction = DuetConfig.from_model_config(self.config)
        if not reduces(reduction) and not goes_on_reduced(cache):
            return self._run_whole(input_ids, inputs_embeds, cache, visual_mask, given | kwargs)
        if inputs_embeds is None:
            inputs_embeds = self._embed_text(input_ids)
        elif visual_mask is None and not is_filled(cache):
            _refuse_unknown_positions(inputs_embeds, reduction)
        asked = {name: kwargs.pop(name) for name in _ASKED if kwargs.get(name) is not None}
        refuse_unknown(
            [name for name, value in kwargs.items() if value is not None],
            inspect.signature(type(self).forward).parameters,
            f"{type(self).__name__}.forward",
        )
        further = {"visual_mask": visual_mask, "labels": labels, "answer_mask": answer_mask, "counts": counts}
        further |= {"query_indices": query_indices, "next_position": next_position}
        return self._run_reduced(reduction, inputs_embeds, cache, given | further, asked)

    def _check_maps(self, asked: Mapping[str, Any]) -> None:
        wanted = asked.get("output_attentions")
        wanted = getattr(self.config, "output_attentions", False) if wanted is None else wanted
        if wanted and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs eager attention, and this model runs {self.config._attn_implementation!r}, "
                "which makes no maps: load it with attn_implementation='eager', or call "
                "model.set_attn_implementation('eager') first; duet.trace shows what became of every patch without maps"
            )

    def _run_whole(
        self, input_ids: Tensor | None, embeds: Tensor | None, cache: Any, visual: Tensor | None, given: dict[str, Any]
    ) -> Any:
        """The host's own forward, which may be one that another project put there."""
        host: Any = super()
        forward = host.forward
        filled, mask = is_filled(cache), given["attention_mask"]
        if tracing.is_active() and not filled:
            batch, length = (input_ids if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]
            record_whole_pass(self.config.num_hidden_layers, (batch, length), mask, visual)
        # Another project's forward may read the mask; in the host's it only makes kernels slower.
        if self.training and cache is None and self.config._attn_implementation == "sdpa" and _is_transformers(forward):
            given["attention_mask"], _ = without_trailing_padding(mask, None)
        return forward(
            input_ids=input_ids, inputs_embeds=embeds, **({} if cache is None else {cache_argument(forward): cache}),
            **given,
        )  # fmt: skip

    def _run_reduced(
        self, reduction: DuetConfig | None, embeds: Tensor, cache: Any, given: dict[str, Any], asked: dict[str, Any]
    ) -> Any:
        host: Any = super()
        if not _is_transformers(host.forward):
            raise ValueError(
                f"a DUET reduction is in force and runs the layers itself, so the forward of {host.forward.__module__} "
                "that replaces transformers' own would never be called. Take it off, or the reduction: "
                "model.set_reduction(None)"
            )
        if given["use_cache"] is None:
            given["use_cache"] = bool(self.config.use_cache)
        asked["want_hidden"] = bool(
            asked.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        )
        asked["output_hidden_states"] = False  # collected by the loop, where lengths change
        return self._drop_tokens(run=given | {"config": reduction, "past_key_values": cache}, embeds=embeds, **asked)

    @capture_outputs  # collects attention maps where they are asked for, each of its layer's length
    def _drop_tokens(self, run: dict[str, Any], embeds: Tensor, want_hidden: bool, **_: Any) -> LlavaDecoderOutput:
        decoder: Any = self
        out = run_decoder(decoder, embeds, output_hidden_states=want_hidden, **run)
        return build_output(
            LlavaDecoderOutput,
            cache=out.past_key_values,
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            labels=out.labels,
            attention_mask=out.attention_mask,
        )

    def _embed_text(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if input_ids.shape[1] > 1 and bool((input_ids == IMAGE_TOKEN_INDEX).any()):
            raise ValueError(
                "input_ids hold <image> marks, and the decoder alone takes no pictures: splice them with "
                "prepare_inputs_labels_for_multimodal and pass inputs_embeds; DUET reduces them there"
            )
        host: Any = self
        return host.get_input_embeddings()(input_ids)


def _is_transformers(forward: Any) -> bool:
    return torch.compiler.is_compiling() or (getattr(forward, "__module__", None) or "").startswith("transformers.")


def _refuse_unknown_positions(embeds: Tensor, reduction: DuetConfig | None) -> None:
    """Refuse a prefill of embeddings of which nobody knows what is visual, where layers would drop that."""
    if reduction is None or not reduction.schedule or embeds.shape[1] == 1:
        return
    raise ValueError(
        "a DUET reduction that drops visual tokens in the language model is in force, and these inputs_embeds do not "
        "say which positions are visual: pass visual_mask=..., a bool tensor [batch, length] "
        "(prepare_inputs_labels_for_multimodal returns it as .visual_mask; all False for text). The tensor that it "
        "returned brings it along by itself as long as it is not copied, cut or joined"
    )
