"""What stands in front of a Hugging Face model while DUET is attached. Shared by all families.

A family says how many placeholders every image has and how pixels become tokens (``HostFamily.pictures``); the rest
is here. Shapes: B batch, L sequence, D width, I images.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duet import tracing
from duet.cache import DuetCache, masks_for_generate
from duet.decoder import DecoderOutput, run_decoder
from duet.families import Family
from duet.families.prompt import (
    Encoded,
    Pictures,
    Prompt,
    first_places,
    insert,
    look,
    owners,
    placeholders,
    shrunk_counts,
)
from duet.loss import causal_lm_loss
from duet.queries import answers_from_labels
from duet.question import Question, asked, is_read, read_question
from duet.versions import CACHE, WITHOUT_USE, build_output, refuse_unknown, take_cache


class ReducedModel:
    """Stands in front of a ``...ForConditionalGeneration`` class while DUET is attached.

    Modifications:
        forward: the vision tower stops early and is reduced (stage 1), placeholders shrink to match, the decoder drops
            visual tokens between layers (stage 2), labels shrink in lockstep. Logits have the reduced length.
        generate: remembers the prompt length, so that generated tokens never rank, with or without a cache; beams of a
            sample with several images keep them in order.
    """

    create_masks_for_generate = staticmethod(masks_for_generate)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any):
        """Generate as the host class does; the prompt alone decides which visual tokens stay."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[CACHE] = cache
        elif ids is not None:
            kwargs.setdefault("prompt_length", ids.shape[1])
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ):
        expanded: dict[str, Tensor] = {}
        if expand_size > 1:
            ids_or_embeds = kwargs["inputs_embeds"] if input_ids is None else input_ids
            expanded = _repeat_pictures(self, ids_or_embeds, kwargs, expand_size)
        rest = {name: value for name, value in kwargs.items() if name not in expanded}
        ids, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **rest
        )
        return ids, rest | expanded

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        prompt_length: int | None = None,
        query_indices: Tensor | None = None,
        skip_logits: bool = False,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ):
        """Run the reduced model.

        Args beyond the host's:
            prompt_length: positions of ``input_ids`` from this one on are answers and never rank.
            query_indices: [B, R] positions (after stage 1) of the rows that rank, padded with -1.
            skip_logits: with ``labels``: run the head on supervised positions only and return no logits. The loss is
                the same; a large vocabulary costs most of its memory and time otherwise.

        Raises:
            TypeError: a keyword argument that nothing reads.
            ValueError: the placeholders of a sample do not match the images, or an option cannot work reduced.
        """
        model: Any = self
        cache = take_cache(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.pop("mm_encoder_outputs", None):
            raise ValueError("mm_encoder_outputs holds unreduced features; pass pixels instead while DUET is attached")
        family, config = model._duet.family, model._duet.config
        inputs = {name: kwargs.pop(name) for name in family.inputs if name in kwargs}
        maps = kwargs.pop("output_attentions", None)
        kwargs = _loss_arguments(model, kwargs)
        ids_or_embeds: Any = inputs_embeds if input_ids is None else input_ids
        embed = None if input_ids is None else model.get_input_embeddings()
        prompt = Prompt(ids_or_embeds, attention_mask, position_ids, labels=labels, embed=embed)
        prompt, encoded = _read_pictures(model, prompt, ids_or_embeds, inputs, cache, prompt_length)
        decoder = family.decoder(model)
        if use_cache is None:
            use_cache = bool(decoder.config.use_cache) and not _checkpoints(decoder)
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
            output_attentions=maps,
            **family.decoder_arguments(encoded),
        )
        result = _output(model, out, encoded, None if skip_logits and labels is not None else logits_to_keep, kwargs)
        return result.to_tuple() if return_dict is False else result


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

    def decoder(self, model: Any) -> Any:
        """Return the language model without its head."""
        return model.model.language_model

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


def _read_pictures(
    model: Any, prompt: Prompt, ids_or_embeds: Tensor, inputs: dict, cache: Any, prompt_length: int | None
) -> tuple[Prompt, dict[str, Encoded]]:
    """Encode the images of a batch and put their tokens in the place of their placeholders."""
    family = model._duet.family
    prompt = family.place(model, ids_or_embeds, prompt, inputs, cache)
    found = [(p, placeholders(model, ids_or_embeds, p.token_id)) for p in family.pictures(model, inputs)]
    if found and isinstance(cache, DuetCache) and cache.segments:
        raise ValueError(
            "a reduced cache cannot take new pictures, because nothing is ranked after the prefill; pass the whole "
            "conversation without a cache"
        )
    if prompt_length is not None:
        for _, marks in found:
            marks[:, prompt_length:] = False  # an answer may name a placeholder, but brings no picture
    if not found:
        return prompt.embedded(), {}
    question = _question(model, prompt, ids_or_embeds, [marks for _, marks in found], prompt_length)
    by_kind, counts = look([marks for _, marks in found], prompt.attention_mask)
    rows = [owners(held, pictures) for held, (pictures, _) in zip(by_kind, found, strict=True)]
    kinds = []
    for (pictures, marks), owner in zip(found, rows, strict=True):
        asked_of = None if question is None else question.select(torch.tensor(owner))
        kinds.append((pictures, marks, pictures.encode(asked_of)))
    prompt = replace(prompt, counts=shrunk_counts(counts, kinds, rows))
    if len(kinds) > 1 and tracing.is_active():
        places = [place for pictures, marks, _ in kinds for place in first_places(marks, pictures)]
        sizes = [count for _, _, encoded in kinds for count in encoded.counts]
        tracing.reorder_pictures(sizes, sorted(range(len(places)), key=places.__getitem__))
    return insert(prompt, kinds, prompt_length), {pictures.kind: encoded for pictures, _, encoded in kinds}


def _question(
    model: Any, prompt: Prompt, ids_or_embeds: Tensor, marks: list[Tensor], prompt_length: int | None
) -> Question | None:
    """Return what each sample asks, or None where the vision reducer does not listen."""
    if not marks or not is_read(model._duet.config):
        return None
    answers = answers_from_labels(prompt.labels)
    if prompt_length is not None:
        answers = (torch.arange(ids_or_embeds.shape[1], device=marks[0].device) >= prompt_length).expand_as(marks[0])
    text = asked(prompt.attention_mask, torch.stack(marks).any(0), answers)
    ids = ids_or_embeds if ids_or_embeds.dim() == 2 else None
    return read_question(ids, prompt.embedded().inputs_embeds, text, model._duet.text_encoder)


def _repeat_pictures(model: Any, ids_or_embeds: Tensor, inputs: Mapping[str, Any], times: int) -> dict[str, Tensor]:
    """Repeat the pictures of each sample as a group, as beams and sampled sequences of that sample need them."""
    family = model._duet.family
    given = {name: inputs[name] for name in family.inputs if inputs.get(name) is not None}
    repeated = {}
    for pictures in family.pictures(model, given):
        held = placeholders(model, ids_or_embeds, pictures.token_id).sum(1).tolist()
        owner = torch.tensor(owners(held, pictures))
        for name, rows in pictures.rows.items():
            if name not in given:
                continue
            row_owner = owner if rows is None else owner.repeat_interleave(torch.tensor(rows))
            value = given[name]
            row_owner = row_owner.to(value.device)
            groups = [value[row_owner == sample] for sample in row_owner.unique()]
            repeated[name] = torch.cat([g.repeat(times, *[1] * (g.dim() - 1)) for g in groups])
    return repeated


def _output(
    model: Any, out: DecoderOutput, encoded: Mapping[str, Encoded], logits_to_keep: int | Tensor | None, kwargs: dict
) -> Any:
    """Return what the host class returns, without logits where ``logits_to_keep`` is None."""
    hidden = out.last_hidden_state
    logits = loss = None
    if logits_to_keep is not None:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = model.lm_head(hidden[:, keep, :])
    if out.labels is not None and logits is None:
        loss = causal_lm_loss(hidden, out.labels, model.lm_head, kwargs.get("num_items_in_batch"))
    elif out.labels is not None:
        loss = model.loss_function(
            logits=logits, labels=out.labels, vocab_size=model.config.text_config.vocab_size, **kwargs
        )
    return build_output(
        model._duet.family.output,
        cache=out.past_key_values,
        pictures={name: entry.tokens for name, entry in encoded.items()},
        loss=loss,
        logits=logits,
        hidden_states=out.hidden_states,
    )


def _loss_arguments(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what the loss reads of the arguments that are left over, and refuse what nothing reads."""
    left = {name: value for name, value in kwargs.items() if value is not None and name not in WITHOUT_USE}
    known = set(inspect.signature(type(model).forward).parameters)
    refuse_unknown(left.keys() - {"num_items_in_batch"}, known - left.keys(), f"{type(model).__name__}.forward")
    return left


def _checkpoints(decoder: Any) -> bool:
    return decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers)
