"""One loop for every Hugging Face decoder that has ``layers``, ``norm`` and ``rotary_emb`` (stage 2).

A drop splits the decoder into segments; each segment owns one (valid mask, positions, rotary tables) triple. "No
reduction" is the same loop with one segment. What decoding needs later lives in the cache object.

Shapes: B batch, L sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from duet import tracing
from duet.budget import kept_tokens
from duet.cache import CachedSegment, DuetCache, check_prefill_cache
from duet.config import DuetConfig
from duet.queries import answers_from_labels, query_rows, surviving_rows
from duet.stage2 import LANGUAGE_REDUCERS, Decision, LanguageReducer, Stage, keep_best
from duet.tokens import Counts, TokenState, compact_positions, gather_tokens
from duet.versions import CACHE, check_layer


@dataclass
class DecoderOutput:
    """What ``run_decoder`` returns.

    Attributes:
        last_hidden_state: [B, L', D] after the final norm; L' is shorter than L where tokens were dropped.
        labels: [B, L'] or None.
        attention_mask: [B, L'] bool, or None when nothing is padding.
        past_key_values: the cache to go on with; it replaces the one that was passed in.
        hidden_states: the input of every layer and the last output, if asked for; their lengths differ after drops.
        origin: [B, L'] which of the given positions each one is, -1 for padding; None where all of them stayed.
    """

    last_hidden_state: Tensor
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    origin: Tensor | None = None


def run_decoder(
    decoder: nn.Module,
    inputs_embeds: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    visual_mask: Tensor | None = None,
    labels: Tensor | None = None,
    answer_mask: Tensor | None = None,
    query_indices: Tensor | None = None,
    next_position: Tensor | None = None,
    additions: Sequence[Tensor] = (),
    past_key_values: Cache | None = None,
    use_cache: bool = False,
    config: DuetConfig | None = None,
    fed_length: int | None = None,
    output_hidden_states: bool = False,
    reducer: LanguageReducer | None = None,
    counts: Counts | None = None,
    **layer_kwargs: Any,
) -> DecoderOutput:
    """Run a decoder and drop visual tokens after the layers that ``config.schedule`` names.

    Args:
        decoder: the model without its head (``LlamaModel``, ``MistralModel``, ``Qwen2Model``, ...).
        inputs_embeds: [B, L, D]; on a decoding step only the new positions.
        attention_mask: [B, L], left or right padding; ignored on a decoding step of a reduced cache, except for its
            last columns when several positions are fed at once.
        position_ids: [B, L], or [A, B, L] for multi-axis rotary positions (a fourth axis in front counts tokens and is
            for masks only); None counts the tokens of each sample from 0.
        visual_mask: [B, L] bool, positions that came from an image; None means none did.
        labels: [B, L], -100 where nothing is predicted; gathered with the tokens.
        answer_mask: [B, L] bool, positions that must not rank; default: where labels supervise.
        query_indices: [B, R] positions of the rows that rank, padded with -1; overrides ``config.queries``.
        next_position: [B], the rotary position (on every axis) of the token that follows each sample; None is one
            after its largest.
        additions: [B, L, D] each, added to the outputs of the first layers (DeepStack); gathered with the tokens.
        past_key_values: a cache from an earlier call, or an empty one. An empty ``StaticCache`` says that decoding
            is to have static shapes: its length less what is fed is the room that every layer gets after the prefill.
        use_cache: fill a cache and return it.
        config: None, or a configuration without stages, is the decoder's own forward to the bit.
        fed_length: the length that the caller counts for this input, if stage 1 shortened it.
        output_hidden_states: also return the input of every layer.
        reducer: what decides at the stages, in place of the one that ``config.stage2`` names.
        counts: how many tokens and visual tokens each sample has, where the caller knows; with ``queries="last"`` a
            prefill then waits for nothing from the device. None: they are read from the masks, once.
        **layer_kwargs: passed to every layer.

    Raises:
        ValueError: attention maps are asked for, or the cache cannot hold a reduction.
    Source: DUET-VLM Sec. 3.2.
    """
    if layer_kwargs.pop("output_attentions", False):
        raise ValueError(
            "output_attentions is not available: no attention map is ever computed; use duet.trace instead"
        )
    if isinstance(past_key_values, DuetCache) and past_key_values.segments:
        out = _continue(decoder, inputs_embeds, attention_mask, past_key_values, output_hidden_states, layer_kwargs)
        return replace(out, labels=labels)
    if use_cache:
        check_layer(decoder.layers[0])  # type: ignore[index, arg-type]
    config = None if config is None else DuetConfig.require(config)
    if not reduces(config):
        return _plain(
            decoder, inputs_embeds, attention_mask, position_ids, labels, past_key_values, use_cache,
            visual_mask, additions, output_hidden_states, layer_kwargs,
        )  # fmt: skip
    assert config is not None
    check_prefill_cache(past_key_values)
    cache = DuetCache(config=decoder.config) if use_cache else None
    state = _initial_state(inputs_embeds, attention_mask, _rotary_axes(position_ids), visual_mask, labels)
    answers = answers_from_labels(labels) if answer_mask is None else answer_mask
    state = replace(
        state,
        text=query_rows(state.valid, state.visual, answers, "all"),
        queries=_queries(state, answers, query_indices, config),
    )
    one_row = config.queries == "last" and answers is None and query_indices is None
    state, counts = _counted(state, counts, one_row)
    if query_indices is not None:
        config = replace(config, queries="all")
    config = config.for_depth(len(decoder.layers))  # type: ignore[arg-type]
    reducer = reducer or (LANGUAGE_REDUCERS.get(config.stage2) if config.schedule else None)
    pass_ = _ReducedPass(decoder, config, reducer, cache, next_position, additions, output_hidden_states, layer_kwargs)
    state = pass_.run(state, counts)
    if cache is not None:
        cache.fed = inputs_embeds.shape[1] if fed_length is None else fed_length
        if isinstance(past_key_values, StaticCache):
            cache.make_static(past_key_values.layers[0].max_cache_len - cache.fed)  # type: ignore[attr-defined]
    hidden = decoder.norm(state.hidden)  # type: ignore[operator]
    return DecoderOutput(hidden, state.labels, state.valid, cache, pass_.all_hidden(hidden), pass_.origin(state))


def reduces(config: DuetConfig | None) -> bool:
    """Return whether a configuration takes anything away, or may."""
    return config is not None and (config.stage1 != "none" or bool(config.schedule))


def _rotary_axes(position_ids: Tensor | None) -> Tensor | None:
    """Return the positions without the axis in front that only counts tokens."""
    counts = position_ids is not None and position_ids.dim() == 3 and len(position_ids) == 4
    return position_ids[1:] if counts else position_ids  # type: ignore[index]


def _mask_positions(position_ids: Tensor) -> Tensor | None:
    """Return the positions that tell packed sequences apart, [B, L]; several rotary axes alone do not."""
    if position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def _plain(
    decoder, inputs_embeds, attention_mask, position_ids, labels, cache, use_cache, visual, additions, want_hidden,
    layer_kwargs,
) -> DecoderOutput:  # fmt: skip
    """The decoder's own forward, layer by layer: one segment, nothing dropped."""
    if use_cache and cache is None:
        cache = DynamicCache(config=decoder.config)
    if position_ids is None:
        seen = cache.get_seq_length() if cache is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
    if tracing.is_active() and (cache is None or cache.get_seq_length() == 0):
        record_whole_pass(len(decoder.layers), tuple(inputs_embeds.shape[:2]), attention_mask, visual)
    seen_states: list[Tensor] | None = [] if want_hidden else None
    hidden, _ = _run_layers(
        decoder, inputs_embeds, 0, len(decoder.layers), attention_mask, _rotary_axes(position_ids), cache, layer_kwargs,
        use_cache=use_cache, mask_positions=_mask_positions(position_ids), seen_states=seen_states,
        additions=additions,
    )  # fmt: skip
    hidden = decoder.norm(hidden)
    states = None if seen_states is None else (*seen_states, hidden)
    return DecoderOutput(hidden, labels, attention_mask, cache, states)


def record_whole_pass(
    layers: int, shape: tuple[int, int], attention_mask: Tensor | None, visual: Tensor | None
) -> None:
    """Tell every active trace of a prefill that drops nothing.

    Args:
        layers: how many the decoder has.
        shape: (batch, length).
        attention_mask: [B, L], or anything else for no padding.
        visual: [B, L] bool, or None for none.
    """
    batch, length = shape
    tokens = [length] * batch if attention_mask is None or attention_mask.dim() != 2 else attention_mask.sum(1).tolist()
    images = [0] * batch if visual is None else visual.sum(1).tolist()
    if visual is not None:
        tracing.DropRecorder(visual)
    tracing.record_pass([tracing.LayerCount(0, layers, images, tokens, length)])


def _run_layers(
    decoder, hidden, start, stop, attention_mask, position_ids, cache, layer_kwargs,
    use_cache=False, mask_positions=None, seen_states=None, additions=(),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run layers ``start`` to ``stop - 1`` with one mask and one rotary table.

    Returns the output and the input of the last layer; ``seen_states`` collects the input of every layer.
    """
    masks = _masks(decoder, hidden, attention_mask, cache, mask_positions, start)
    rotary = decoder.rotary_emb(hidden, position_ids)
    previous = hidden
    for index in range(start, stop):
        previous = hidden
        if seen_states is not None:
            seen_states.append(hidden)
        layer = decoder.layers[index]
        out = layer(
            hidden,
            attention_mask=masks[_layer_type(decoder.config, index)],
            position_embeddings=rotary,
            position_ids=mask_positions,
            use_cache=use_cache,
            **{CACHE: cache},
            **layer_kwargs,
        )
        hidden = out if isinstance(out, Tensor) else out[0]
        if index < len(additions):
            hidden = hidden + additions[index].to(hidden.device, hidden.dtype)
    return hidden, previous


def _layer_type(config: Any, index: int) -> str:
    types = getattr(config, "layer_types", None)
    if types:
        return types[index]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def _masks(decoder, hidden, attention_mask, cache, position_ids, layer: int) -> dict[str, Any]:
    """Return one mask per attention type that the decoder has."""
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    needed = {_layer_type(decoder.config, index) for index in range(len(decoder.layers))}
    if needed - set(makers):
        raise ValueError(f"attention types {sorted(needed - set(makers))} are not supported; known: {sorted(makers)}")
    if decoder.training and cache is None and decoder.config._attn_implementation == "sdpa":
        attention_mask, position_ids = without_trailing_padding(attention_mask, position_ids)
    arguments: dict[str, Any] = {
        "config": decoder.config,
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        CACHE: cache,
        "position_ids": position_ids,
    }
    if cache is not None:
        arguments["layer_idx"] = layer
    return {kind: makers[kind](**arguments) for kind in needed}


def without_trailing_padding(mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return no mask where all padding stands behind the tokens.

    No token sees what comes after it, so the causal kernels, which compute half as much, give the tokens the same
    output. What padding computes is read by nothing. Shapes: mask [B, L] or None.
    """
    if mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None, None
    return mask, position_ids


def _initial_state(inputs_embeds, attention_mask, position_ids, visual_mask, labels) -> TokenState:
    batch, length, _ = inputs_embeds.shape
    device = inputs_embeds.device
    valid = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be [batch, length] with DUET, got shape {tuple(attention_mask.shape)}"
            )
        valid = attention_mask.to(device=device, dtype=torch.bool)
    index = torch.arange(length, device=device).expand(batch, -1)
    visual = torch.zeros_like(index, dtype=torch.bool) if visual_mask is None else visual_mask.to(device)
    if position_ids is None:
        position_ids = compact_positions(valid, batch, length, device)
    return TokenState(
        hidden=inputs_embeds,
        valid=valid,
        visual=visual if valid is None else visual & valid,
        text=torch.zeros_like(visual),
        queries=torch.zeros_like(visual),
        origin=index,
        positions=position_ids,
        labels=labels,
        left_padded=False,
    )


def _counted(state: TokenState, counts: Counts | None, one_row: bool) -> tuple[TokenState, Counts]:
    """Return the state without a mask where nothing is padding, and the numbers of the batch.

    The one synchronisation of a pass, and none where the caller knows the counts and each sample has one row.
    """
    if counts is None or not (one_row or counts.rows):
        known = counts
        counts = Counts.read(state.valid, state.visual, None if one_row else state.queries)
        counts = counts if known is None else replace(known, rows=counts.rows)
    whole = min(counts.tokens) == state.visual.shape[1]
    rows = 1 if one_row else counts.rows
    valid = None if whole else state.valid
    return replace(state, valid=valid, left_padded=counts.left_padded and not whole, rows=rows), counts


def _queries(state: TokenState, answers, query_indices, config: DuetConfig) -> Tensor:
    if query_indices is not None:
        given = query_indices.to(state.visual.device)
        marks = torch.zeros_like(state.visual, dtype=torch.int32)
        marks.scatter_add_(1, given.clamp(min=0), (given >= 0).int())
        return marks > 0
    return query_rows(state.valid, state.visual, answers, config.queries)


class _ReducedPass:
    """One prefill or training forward with drops between segments of layers."""

    def __init__(
        self,
        decoder: Any,
        config: DuetConfig,
        reducer: LanguageReducer | None,
        cache: DuetCache | None,
        next_position: Tensor | None,
        additions: Sequence[Tensor],
        want_hidden: bool,
        layer_kwargs: dict,
    ):
        self._decoder = decoder
        self._config = config
        self._reducer: Any = reducer
        self._cache = cache
        self._next = next_position
        self._additions = additions
        self._kwargs = layer_kwargs
        self._states: list[Tensor] | None = [] if want_hidden else None
        self._depth = len(decoder.layers)
        self._multi_axis = self._dropped = False
        self._previous: Tensor = torch.empty(0)

    def all_hidden(self, last: Tensor) -> tuple[Tensor, ...] | None:
        """Return the input of every layer and the normed output, if asked for."""
        return None if self._states is None else (*self._states, last)

    def origin(self, state: TokenState) -> Tensor | None:
        """Return where the positions of the last state came from, [B, L'], -1 for padding; None if none was dropped."""
        if not self._dropped:
            return None
        return state.origin if state.valid is None else state.origin.masked_fill(~state.valid, -1)

    def run(self, state: TokenState, known: Counts) -> TokenState:
        """Run all layers and return the state after the last one."""
        self._multi_axis = state.positions.dim() == 3
        self._entered = state
        self._recorder = tracing.DropRecorder(state.visual)
        entering, lengths = known.visual, known.tokens
        visual, counts = list(entering), []
        edges = [*self._config.schedule, self._depth]
        start = 0
        for stop in edges:
            counts.append(tracing.LayerCount(start, stop, list(visual), list(lengths), state.hidden.shape[1]))
            state = self._segment(state, start, stop)
            if stop == self._depth:
                break
            ratio, before = self._config.schedule[stop], visual
            if self._decoder.training or (ratio < 1.0 and any(before)):
                most = [min(now, kept_tokens(n, ratio)) for now, n in zip(before, entering, strict=True)]
                decision = self._decide(state, stop, before, most)
                visual = decision.kept
                lengths = [length - old + new for length, old, new in zip(lengths, before, visual, strict=True)]
                if visual != before:
                    self._recorder.record_merges(stop, state, decision.merged_into)
                    state = self._drop(state, decision, lengths)
            start = stop
            self._recorder.record(stop, state)
        tracing.record_pass(counts)
        return state

    def _segment(self, state: TokenState, start: int, stop: int) -> TokenState:
        additions = [gather_tokens(x, state.origin) for x in self._additions] if start < len(self._additions) else ()
        hidden, self._previous = _run_layers(
            self._decoder, state.hidden, start, stop, state.valid, state.positions, self._cache, self._kwargs,
            use_cache=self._cache is not None, seen_states=self._states, additions=additions,
        )  # fmt: skip
        if self._cache is not None:
            self._cache.segments.append(CachedSegment(start, stop, state.valid, self._next_position(state)))
        return replace(state, hidden=hidden)

    def _decide(self, state: TokenState, layer: int, before: list[int], most: list[int]) -> Decision:
        """Ask the reducer which visual tokens stay; where none may, there is nothing to ask."""
        # Every rank must run the same modules under ZeRO-3, so in training the ranking runs without images, too.
        if not any(most) and not (self._decoder.training and self._config.schedule[layer] > 0):
            return Decision(torch.zeros_like(state.visual), most)
        stage = Stage(self._decoder, layer, state, self._entered, self._previous, before, most)
        answer = self._reducer(stage, self._config)
        return answer if isinstance(answer, Decision) else Decision(keep_best(answer, state.visual, most), most)

    def _drop(self, state: TokenState, decision: Decision, lengths: list[int]) -> TokenState:
        """Gather the state down to what stays, ``lengths[b]`` positions of each sample."""
        self._dropped = True
        tokens = torch.ones_like(state.visual) if state.valid is None else state.valid
        if decision.hidden is not None:
            state = replace(state, hidden=decision.hidden)
        length = max(lengths)
        left = state.keep((tokens & ~state.visual) | decision.keep, length, padded=min(lengths) < length)
        text, queries = (
            surviving_rows(rows, state.origin, still, left.origin, left.valid)
            for rows, still in ((state.text, left.text), (state.queries, left.queries))
        )
        state = replace(left, text=text, queries=queries)
        if self._config.positions in ("original", "patch") or (self._config.positions == "auto" and self._multi_axis):
            return state
        positions = compact_positions(state.valid, len(lengths), length, state.hidden.device)
        self._next = None
        return replace(state, positions=positions.expand(*state.positions.shape[:-2], -1, -1))

    def _next_position(self, state: TokenState) -> Tensor:
        """Return the rotary position after the last token of each sample. Shapes: [B], or [A, B] for several axes."""
        if self._next is not None:
            return self._next.to(state.hidden.device).expand(*state.positions.shape[:-2], -1)
        positions = state.positions if state.valid is None else state.positions.masked_fill(~state.valid, -1)
        return positions.max(dim=-1).values.expand(*positions.shape[:-2], state.hidden.shape[0]) + 1


def _continue(
    decoder: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: DuetCache,
    want_hidden: bool,
    kwargs: dict,
) -> DecoderOutput:
    """Run new positions through a decoder whose layers hold different lengths. Nothing is ranked any more."""
    batch, new, _ = inputs_embeds.shape
    fresh = None
    if new > 1 and attention_mask is not None and attention_mask.dim() == 2:
        fresh = attention_mask[:, -new:].bool()
        fresh = None if bool(fresh.all()) else fresh
    steps = (
        torch.arange(new, device=inputs_embeds.device) if fresh is None else (fresh.long().cumsum(1) - 1).clamp(min=0)
    )
    hidden, states = inputs_embeds, [] if want_hidden else None
    for segment in cache.segments:
        positions = segment.next_position.unsqueeze(-1) + steps
        segment.valid = _extend(segment.valid, fresh, batch, new, cache, segment.start)
        hidden, _ = _run_layers(
            decoder, hidden, segment.start, segment.stop, segment.valid, positions, cache, kwargs,
            use_cache=True, seen_states=states,
        )  # fmt: skip
        passed = new if fresh is None else fresh.sum(1)
        if cache.is_static:
            segment.next_position.add_(passed)
        else:
            segment.next_position = segment.next_position + passed
    cache.advance(new)
    hidden = decoder.norm(hidden)
    return DecoderOutput(hidden, None, None, cache, None if states is None else (*states, hidden))


def _extend(
    valid: Tensor | None, fresh: Tensor | None, batch: int, new: int, cache: DuetCache, layer: int
) -> Tensor | None:
    """Return the mask of a segment's keys with ``new`` positions more. Shapes: fresh [B, new]; returns [B, n] or None.

    A static mask is as wide as the layers already and says that what comes is valid.
    """
    if fresh is None and (valid is None or cache.is_static):
        return valid
    device = cache.segments[0].next_position.device
    held: Any = cache.get_seq_length(layer)
    added = torch.ones(batch, new, dtype=torch.bool, device=device) if fresh is None else fresh
    if not cache.is_static:
        old = torch.ones(batch, held, dtype=torch.bool, device=device) if valid is None else valid
        return torch.cat((old, added), dim=1)
    width = cache.layers[layer].max_cache_len  # type: ignore[attr-defined]
    whole = torch.ones(batch, width, dtype=torch.bool, device=device) if valid is None else valid
    return whole.index_copy(1, torch.arange(new, device=device) + held, added)
