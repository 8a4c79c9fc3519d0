"""What stands in front of a Hugging Face model while DUET is attached. Shared by all families.

A family says how many placeholders every image has and how pixels become tokens (``HostFamily.pictures``); the rest
is here. Shapes: B batch, L sequence, D width, I images.
"""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duet import tracing
from duet.cache import DuetCache, check_prefill_cache, masks_for_generate
from duet.config import DuetConfig
from duet.decoder import reduces, run_decoder
from duet.families import Family
from duet.families.calls import Generation, called, caller_of
from duet.families.places import Places
from duet.families.prompt import Encoded, Pictures, Prompt
from duet.families.reading import read_pictures, repeat_pictures
from duet.loss import causal_lm_loss
from duet.versions import (
    CACHE,
    WITHOUT_USE,
    build_output,
    cache_of,
    declared_output,
    pictures_of,
    refuse_unknown,
    take_cache,
)

logger = logging.getLogger(__name__)


class ReducedModel:
    """Stands in front of a ``...ForConditionalGeneration`` class while DUET is attached.

    Modifications:
        forward: pairs logits with labels on top of the inner model, which reduces.
        generate: remembers the prompt length, so that generated tokens never rank, with or without a cache; beams of a
            sample with several images keep them in order.
    """

    create_masks_for_generate = staticmethod(masks_for_generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Let the inner model know what it is called for, where a ``forward`` that somebody put on does not say so."""
        if "forward" not in vars(self):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with called(self, labels=kwargs.get("labels"), foreign=True):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any):
        """Generate as the host class does; the prompt alone decides which visual tokens stay."""
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[CACHE] = cache
        with called(self, labels=None, generation=Generation() if cache is None else None):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ):
        expanded: dict[str, Tensor] = {}
        if expand_size > 1:
            ids_or_embeds = kwargs["inputs_embeds"] if input_ids is None else input_ids
            expanded = repeat_pictures(self, ids_or_embeds, kwargs, expand_size)
        rest = {name: value for name, value in kwargs.items() if name not in expanded}
        ids, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **rest
        )
        return ids, rest | expanded

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        prompt_length: int | None = None,
        query_indices: Tensor | None = None,
        visual_mask: Tensor | None = None,
        skip_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ):
        """Run the reduced model.

        Args beyond the host's:
            prompt_length: positions of ``input_ids`` from this one on are answers and never rank.
            query_indices: [B, R] positions (after stage 1) of the rows that rank, padded with -1.
            visual_mask: [B, L] bool, with ``inputs_embeds`` into which pictures have been spliced: where.
            skip_logits: with ``labels``: run the head on supervised positions only and return no logits. The loss is
                the same; a large vocabulary costs most of its memory and time otherwise.

        Returns:
            What the host returns. Of a pass that fills a cache, logits are those of the tokens that stayed; of every
            other pass, and with labels, they stand at the caller's positions, where a token that was dropped is
            answered by the last one before it that stayed. ``logits_to_keep`` always counts the caller's positions.
            Two attributes say more: ``labels``, which pair with ``logits``, and ``kept_positions``, [B, K], the
            caller's position of every token that stayed (-1 for padding, None where all did).

        Raises:
            TypeError: a keyword argument that nothing reads.
            ValueError: the placeholders of a sample do not match the images, or an option cannot work reduced.
        """
        model: Any = self
        cache = take_cache(kwargs)
        family: Any = model._duet.family
        loss_arguments = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        _refuse_unknown(model, kwargs, (*family.inputs, *_PASSED_ON))
        if use_cache is None:
            use_cache = _fills_cache(model, family.decoder(model))
        further = kwargs | {CACHE: cache, "use_cache": use_cache, "every_position": False}
        further |= {"prompt_length": prompt_length, "query_indices": query_indices, "visual_mask": visual_mask}
        with called(model, labels=labels):
            body = family.body(model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                **further,
            )
        given: Any = inputs_embeds if input_ids is None else input_ids
        places = Places(body.kept_positions, given.shape[1])
        scored = labels is not None or not use_cache
        keep = None if skip_logits and labels is not None else logits_to_keep
        loss, logits = _pair(model, body, places, keep, scored, attention_mask, loss_arguments)
        result = build_output(
            family.output,
            cache=cache_of(body),
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            **pictures_of(body),
        )
        result.kept_positions = body.kept_positions
        result.labels = body.labels if keep is None else _picked_labels(places.spread_labels(body.labels), keep)
        return result.to_tuple() if return_dict is False else result


def _pair(
    model: Any,
    body: Any,
    places: Places,
    keep: int | Tensor | None,
    scored: bool,
    attention_mask: Tensor | None,
    loss_arguments: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the loss, if there are labels, and the logits that ``keep`` names; none of them where it is None."""
    hidden, logits = body.last_hidden_state, None
    whole = isinstance(keep, int) and keep == 0
    if whole:
        logits = model.lm_head(hidden)
    elif keep is not None:
        logits = model.lm_head(places.pick(hidden, keep, attention_mask))  # type: ignore[arg-type]
    loss = None
    if body.labels is not None and whole:
        given = {name: value for name, value in loss_arguments.items() if value is not None}
        size = model.config.text_config.vocab_size
        loss = model.loss_function(logits=logits, labels=body.labels, vocab_size=size, **given)
    elif body.labels is not None:
        loss = causal_lm_loss(hidden, body.labels, model.lm_head, **loss_arguments)
    return loss, places.spread(logits) if whole and scored else logits  # type: ignore[arg-type]


def _picked_labels(labels: Tensor | None, keep: int | Tensor) -> Tensor | None:
    """Return the labels that pair with picked logits."""
    if labels is None or (isinstance(keep, int) and keep == 0):
        return labels
    return Places(None, labels.shape[1]).pick(labels.unsqueeze(-1), keep, None).squeeze(-1)


class ReducedBody:
    """Stands in front of a model without its head while DUET is attached: what ``model.model`` and ``base_model`` name.

    Modifications:
        forward: the vision tower stops early and is reduced (stage 1), placeholders shrink to match, the decoder drops
            visual tokens between layers (stage 2), labels shrink in lockstep.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._duet_output = declared_output(cls._duet_host)  # type: ignore[attr-defined]

    @tracing.recorded
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_length: int | None = None,
        query_indices: Tensor | None = None,
        visual_mask: Tensor | None = None,
        every_position: bool | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ):
        """Run the reduced model without its head.

        Args beyond the host's and those of ``ReducedModel``:
            labels: [B, L], -100 where nothing is predicted; what they supervise never ranks.
            every_position: hidden states at all L of the caller's positions (as ``ReducedModel`` says of logits), or
                those of the tokens that stayed; default: the former, unless a cache is filled and there are no labels.

        Returns:
            What the host returns, with ``labels`` and ``kept_positions`` as ``ReducedModel`` says.

        Raises:
            TypeError: a keyword argument that nothing reads.
            ValueError: as for ``ReducedModel``.
        """
        call = caller_of(self)
        model = call.model
        cache = take_cache(kwargs)
        _check_call(model, input_ids, inputs_embeds, cache, kwargs)
        family, config = model._duet.family, model._duet.config
        inputs = {name: kwargs.pop(name) for name in family.inputs if name in kwargs}
        _refuse_unknown(self, kwargs, ())
        ids_or_embeds: Any = inputs_embeds if input_ids is None else input_ids
        if labels is None and call.labels is not None and call.labels.shape == ids_or_embeds.shape[:2]:
            labels = call.labels
        if prompt_length is None and call.generation is not None:
            prompt_length = call.generation.prompt_length = call.generation.prompt_length or ids_or_embeds.shape[1]
        embed = None if input_ids is None else model.get_input_embeddings()
        prompt = Prompt(ids_or_embeds, attention_mask, position_ids, visual_mask, labels, embed=embed)
        prompt, encoded = read_pictures(model, prompt, ids_or_embeds, inputs, cache, prompt_length)
        if inputs_embeds is not None and visual_mask is None and not encoded:
            _refuse_unknown_origin(config, cache)
        decoder = family.decoder(model)
        if use_cache is None:
            use_cache = _fills_cache(model, decoder)
        if encoded and decoder.training and labels is prompt_length is query_indices is None and config.schedule:
            _warn_of_unknown_answers()
        out = run_decoder(
            decoder,
            prompt.inputs_embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            visual_mask=prompt.visual_mask,
            labels=prompt.labels,
            answer_mask=prompt.answer_mask,
            query_indices=query_indices,
            next_position=prompt.next_position,
            additions=prompt.additions,
            past_key_values=cache,
            use_cache=use_cache,
            config=config,
            fed_length=ids_or_embeds.shape[1],
            counts=prompt.counts,
            output_hidden_states=bool(output_hidden_states),
            output_attentions=output_attentions,
            **family.decoder_arguments(encoded),
        )
        places = Places.of(prompt.origin, out, ids_or_embeds.shape[1])
        hidden, kept_labels = out.last_hidden_state, out.labels
        if every_position is None:
            every_position = call.foreign or labels is not None or not use_cache
        if every_position:
            hidden, kept_labels = places.spread(hidden), places.spread_labels(kept_labels)
        result = build_output(
            type(self)._duet_output,  # type: ignore[attr-defined]
            cache=out.past_key_values,
            pictures={name: entry.tokens for name, entry in encoded.items()},
            last_hidden_state=hidden,
            hidden_states=out.hidden_states,
        )
        result.kept_positions, result.labels = places.kept, kept_labels
        return result.to_tuple() if return_dict is False else result


class ReducedDecoder:
    """Stands in front of the decoder while DUET is attached: embeddings may hold pictures, so who calls must say where.

    Modifications:
        forward: drops visual tokens between layers (stage 2).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._duet_output = declared_output(cls._duet_host)  # type: ignore[attr-defined]

    @tracing.recorded
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ):
        """Run the decoder with stage 2.

        Args beyond the host's:
            visual_mask: [B, L] bool, which of ``inputs_embeds`` came from a picture; all False for text. Needed with
                embeddings, and for nothing else.
            labels: [B, L]; what they supervise never ranks.

        Raises:
            TypeError: a keyword argument that nothing reads.
            ValueError: embeddings without ``visual_mask``.
        """
        model = caller_of(self).model
        cache = take_cache(kwargs)
        config = model._duet.config
        if inputs_embeds is not None and visual_mask is None:
            _refuse_unknown_origin(config, cache)
        further = {name: kwargs.pop(name) for name in ("position_ids", "output_attentions") if name in kwargs}
        states = bool(kwargs.pop("output_hidden_states", None))
        _refuse_unknown(self, kwargs, ())
        refuse_unknown(kwargs, (), f"{type(self).__name__}.forward while DUET is attached")
        embeds: Any = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        out = run_decoder(
            self,  # type: ignore[arg-type]
            embeds,
            attention_mask=attention_mask,
            visual_mask=visual_mask,
            labels=labels,
            past_key_values=cache,
            use_cache=_fills_cache(model, self) if use_cache is None else use_cache,
            config=config,
            output_hidden_states=states,
            **further,
        )
        result = build_output(
            type(self)._duet_output,  # type: ignore[attr-defined]
            cache=out.past_key_values,
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
        )
        result.kept_positions, result.labels = out.origin, out.labels
        return result.to_tuple() if return_dict is False else result


def _refuse_unknown_origin(config: DuetConfig, cache: Any) -> None:
    """Refuse embeddings that may hold pictures, where nobody says which they are."""
    goes_on = isinstance(cache, DuetCache) and bool(cache.segments)
    if reduces(config) and not goes_on:
        raise ValueError(
            "while DUET is attached, inputs_embeds without pixels need visual_mask, [B, L] bool, which says which of "
            "them came from a picture (all False for text): otherwise pictures would run unreduced. With input_ids and "
            "pixels the whole model, and model.model, find pictures by themselves"
        )


def _check_call(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, kwargs: dict) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if kwargs.pop("mm_encoder_outputs", None):
        raise ValueError("mm_encoder_outputs holds unreduced features; pass pixels instead while DUET is attached")
    if reduces(model._duet.config) and not (isinstance(cache, DuetCache) and cache.segments):
        check_prefill_cache(cache)
    if getattr(torch.compiler, "is_exporting", lambda: False)():
        raise ValueError(
            "torch.export cannot take an attached model: how many tokens stay decides the shapes of a pass, and is "
            "known only while it runs. Detach DUET and export the plain model, or use model.compile()"
        )


@lru_cache(maxsize=1)
def _warn_of_unknown_answers() -> None:
    logger.warning(
        "a training pass with pictures came without labels, so DUET cannot tell answers from questions, and the last "
        "token of each sample ranks the visual tokens. (Label smoothing and compute_loss_func of transformers' Trainer "
        "take the labels away, and so does PEFT under TRL.) Pass labels, prompt_length or query_indices where you can"
    )


def _fills_cache(model: Any, decoder: Any) -> bool:
    """Return whether a pass fills a cache where the caller does not say so; in training it never does."""
    return not decoder.training and all(getattr(part.config, "use_cache", True) for part in (model, decoder))


_PASSED_ON = ("position_ids", "output_attentions", "output_hidden_states", "mm_encoder_outputs")


def _refuse_unknown(module: Any, kwargs: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse what nothing reads of the arguments that are left over, and take out what has no use."""
    for name in [name for name, value in kwargs.items() if value is None or name in WITHOUT_USE - {*known}]:
        del kwargs[name]
    taken = set(inspect.signature(type(module).forward).parameters)
    refuse_unknown(kwargs.keys() - taken - {*known}, taken - kwargs.keys(), f"{type(module).__name__}.forward")


class HostFamily(Family):
    """A family whose model class is transformers' own.

    Attributes:
        host: the model class, head included.
        output: what its forward returns.
        inputs: the arguments of its forward that belong to pictures.
    """

    mixin = ReducedModel
    host: ClassVar[type]
    output: ClassVar[type]
    inputs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images and the videos of a batch, one entry per kind that ``inputs`` holds."""

    @property
    def takes_videos(self) -> bool:
        """Whether the model has an input for videos."""
        return "pixel_values_videos" in self.inputs

    def body(self, model: Any) -> Any:
        """Return the model without its head: tower, projector and decoder."""
        return model.model

    def decoder(self, model: Any) -> Any:
        """Return the language model without its head."""
        return model.model.language_model

    def parts(self, model: Any) -> list[tuple[nn.Module, type]]:
        """Return the whole model, the one without its head and the decoder; every caller passes one of them."""
        return [(model, ReducedModel), (self.body(model), ReducedBody), (self.decoder(model), ReducedDecoder)]

    def place(self, model: Any, ids_or_embeds: Tensor, prompt: Prompt, inputs: Mapping[str, Any], cache: Any) -> Prompt:
        """Return the unreduced prompt with its rotary positions; multi-axis families compute theirs here."""
        del model, ids_or_embeds, inputs, cache
        return prompt

    def decoder_arguments(self, encoded: Mapping[str, Encoded]) -> dict[str, Any]:
        """Return further arguments of ``run_decoder``."""
        del encoded
        return {}

    def check(self, model: nn.Module) -> None:
        """Accept the host class and its subclasses only."""
        if not isinstance(model, self.host):
            raise ValueError(
                f"{type(model).__name__} has model_type {model.config.model_type!r} but is no {self.host.__name__}; "  # type: ignore[union-attr]
                "attach to the full model, head included"
            )
