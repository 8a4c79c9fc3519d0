"""The same reduction forced to eager attention maps: an honest stand-in for published implementations.

They switch tower and decoder to eager attention, so that every layer writes its maps to memory, and read the ranking
off a map. So does this. A CLIP tower is asked for all its states and maps (``output_attentions=True``), as the releases
of VisionZip and DUET-VLM do, and so runs blocks behind the features as well. Of Qwen's tower and of the decoder only
the map that ranks is held, where published code often keeps those of all layers, which flatters the stand-in. DUET
ranks with the next layer's weights: there that layer's attention makes its whole map before the drop; where published
code computes single rows of the next layer (PyramidDrop), the stand-in is slower than that. What a reducer then does
with the signals is the library's own code, so it keeps the same tokens.

Shapes: B batch, H heads, M tower tokens, N patches, R rows, L sequence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from duet import tracing
from duet.attach import attach
from duet.config import DuetConfig
from duet.families.llava import LlavaFamily
from duet.families.passes import UnitSignals, View
from duet.families.prompt import Encoded, Pictures
from duet.families.qwen2_5_vl import Qwen25VLFamily
from duet.signals import DecoderSignals, TowerSignals, rotate, spread
from duet.stage1 import VISION_REDUCERS, TowerOutput, in_raster_order, runs_tower_itself
from duet.stage2 import LANGUAGE_REDUCERS, Decision, Stage
from duet.versions import CACHE
from duet.vision import encode_vision, tower_output


class MapTowerSignals(TowerSignals):
    """Signals of a tower block, read off the attention map that the block made.

    Args:
        map_BHMM: the block's map, in the tower's own order of tokens.
        class_token: whether token 0 is a class token.
        place_M: where each token stands in the map; None where orders are the same.
        usual: signals that need no map, such as keys.
    """

    def __init__(self, map_BHMM: Tensor, class_token: bool, place_M: Tensor | None, usual: TowerSignals | None) -> None:
        self.class_token = class_token
        self._map = map_BHMM
        self._place = place_M
        self._usual = usual

    def _ordered(self, columns: Tensor) -> Tensor:
        return columns if self._place is None else columns[..., self._place]

    def class_row(self) -> Tensor:
        """Return the class token's row of the map, per head. Shapes: [B, H, N]."""
        return self._map[:, :, 0, 1:].float()

    def column_mass(self, readers: int = 0) -> Tensor:
        """Return the mean over heads and all patches, or so many, of the map's columns. Shapes: [B, N]."""
        first = int(self.class_token)
        asked = self._map[:, :, first:]
        if readers:
            places = spread(readers, asked.shape[2], asked.device)
            asked = asked[:, :, places if self._place is None else self._place[places]]
        return self._ordered(asked.float().mean(dim=(1, 2))[:, first:])

    def rows(self, patch_BR: Tensor, multiple: int = 1) -> Iterator[Tensor]:
        """Yield rows of the map, averaged over heads, all at once. Shapes: [B, R] -> [B, R, N]."""
        del multiple
        first = int(self.class_token)
        index = (patch_BR if self._place is None else self._place[patch_BR]) + first
        index = index[:, None, :, None].expand(-1, self._map.shape[1], -1, self._map.shape[-1])
        yield self._ordered(self._map.gather(2, index).float().mean(1)[..., first:])

    def joint_class_row(self) -> Tensor:
        """Return what the usual signals say. Shapes: [B, N]."""
        return self._without_map().joint_class_row()

    def joint_keys(self) -> Tensor:
        """Return what the usual signals say. Shapes: [B, N, D]."""
        return self._without_map().joint_keys()

    def key_metric(self) -> Tensor:
        """Return what the usual signals say. Shapes: [B, M, d]."""
        return self._without_map().key_metric()

    def _without_map(self) -> TowerSignals:
        if self._usual is None:
            raise ValueError("this vision reducer asks for keys, which the eager stand-in for Qwen does not hand out")
        return self._usual


class MapSignals(DecoderSignals):
    """Signals at the input of a decoder layer, read off the map that the layer's own eager attention makes."""

    def __init__(self, layer: Any, hidden_BLD: Tensor, rotary: Any, valid_BL: Tensor | None, map_BHLL: Tensor) -> None:
        super().__init__(layer, hidden_BLD, rotary, valid_BL)
        self._map = map_BHLL

    def received(self, index_BR: Tensor, counted_BR: Tensor, causal: bool = True) -> Tensor:
        """Return the mean over heads and chosen rows of the map. Shapes: [B, R] -> [B, L]."""
        rows = self._rows(index_BR, causal).mean(1) * counted_BR.unsqueeze(-1)
        return rows.sum(1) / counted_BR.sum(1, keepdim=True).clamp(min=1)

    def rows(
        self, index_BR: Tensor, counted_BR: Tensor, causal: bool = True
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield chosen rows of the map, all at once. Shapes: positions [B, R], counted [B, R], rows [B, H, R, L]."""
        yield index_BR, counted_BR.float(), self._rows(index_BR, causal)

    def _rows(self, index_BR: Tensor, causal: bool) -> Tensor:
        if not causal:
            raise ValueError("the eager stand-in ranks by causal maps only")
        index = index_BR[:, None, :, None].expand(-1, self._map.shape[1], -1, self._map.shape[-1])
        return self._map.gather(2, index).float()


@dataclass(frozen=True)
class MapStage(Stage):
    """A stage whose signals come from attention maps.

    Attributes:
        maps: those of layers that have run, by the layer's index, [B, H, L, L].
    """

    maps: dict[int, Tensor]

    @torch.no_grad()
    def _signals(self, layer: int, hidden: Tensor) -> DecoderSignals:
        decoder, state = self.decoder, self.state
        block = decoder.layers[layer]
        rotary = decoder.rotary_emb(hidden, state.positions)
        if layer not in self.maps:
            no_cache: dict[str, Any] = {CACHE: None}
            mask = create_causal_mask(
                config=decoder.config, inputs_embeds=hidden, attention_mask=state.valid, **no_cache
            )
            normed = block.input_layernorm(hidden)
            out = block.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            return MapSignals(block, hidden.detach(), rotary, state.valid, out[1])
        return MapSignals(block, hidden.detach(), rotary, state.valid, self.maps[layer].detach())


class MapReducer:
    """Asks a language reducer, with maps in place of rows.

    Args:
        config: whose stages to serve.
    """

    def __init__(self, config: DuetConfig) -> None:
        self._inner = LANGUAGE_REDUCERS.get(config.stage2)
        self._maps: dict[int, Tensor] = {}
        # Reducers that read the layer which has run find its map here; DUET's own reads the next layer.
        self._layers = [layer - 1 for layer in config.schedule] if config.stage2 != "text_guided" else []

    def __call__(self, stage: Stage, config: DuetConfig) -> Tensor | Decision:
        """Return the reducer's answer, and let go of the maps."""
        try:
            return self._inner(MapStage(**vars(stage), maps=self._maps), config)
        finally:
            self._maps.clear()

    def hooks(self, layers: Any) -> list[Any]:
        """Watch the layers whose maps are read; returns the hooks' handles."""
        return [layers[index].self_attn.register_forward_hook(self._keeper(index)) for index in self._layers]

    def _keeper(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, given: Any, out: Any) -> None:
            del module, given
            if out[1].shape[-2] > 1:  # a prefill, no decoding step
                self._maps[index] = out[1]

        return keep


class _RanksByMaps:
    """Hands the decoder loop a reducer that reads maps; stands in front of a family."""

    def __init__(self, reducer: MapReducer | None) -> None:
        self._reducer = reducer

    def decoder_arguments(self, encoded: Mapping[str, Encoded]) -> dict[str, Any]:
        """Return the reducer that reads maps."""
        del encoded
        return {} if self._reducer is None else {"reducer": self._reducer}


class EagerLlava(_RanksByMaps, LlavaFamily):
    """LLaVA-1.5, ranked by maps."""

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images, encoded with the tower's maps."""
        found = super().pictures(model, inputs)
        config = model._duet.config
        if config.stage1 == "none" or runs_tower_itself(config.stage1):
            return found  # nothing to read off a map
        reducer = VISION_REDUCERS.get(config.stage1)
        return [replace(one, encode=partial(_encode_llava, model, inputs["pixel_values"], reducer)) for one in found]


def _encode_llava(model: Any, pixels: Tensor, reducer: Any, question: Any) -> Encoded:
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    config, layer = model._duet.config, model.config.vision_feature_layer
    if config.keeps_every_patch(model._duet.facts.patches):
        kept = encode_vision(tower, pixels, select_layer=layer, config=config)
        return Encoded.join(kept.per_image(projector(kept.tokens)))
    out = tower(pixels.to(tower.dtype), output_hidden_states=True, output_attentions=True)
    output = tower_output(tower, layer, pixels, out.hidden_states)
    ranking = out.attentions[layer if layer < 0 else layer - 1]
    signals = MapTowerSignals(ranking, output.class_token, None, output.signals)
    reduction = reducer(replace(output, signals=signals, project=projector, question=question), config)
    reduction = replace(reduction, grid=output.grid)
    tracing.record_vision(reduction)
    return Encoded.join(reduction.per_image(projector(reduction.tokens)))


class _MappedBlock:
    """A packed tower block that also hands out its attention map; one picture at a time, as the block itself works."""

    def __init__(self, block: Any) -> None:
        self._block = block
        self.maps: list[Tensor] = []

    def __call__(self, hidden_PD: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
        block, attention = self._block, self._block.attn
        joint = attention.qkv(block.norm1(hidden_PD)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = joint.permute(1, 2, 0, 3).unbind(0)
        cos, sin = (table.float().unsqueeze(0) for table in position_embeddings)
        query, key = (rotate(x.float().unsqueeze(0), cos, sin)[0].to(value.dtype) for x in (query, key))
        outputs = []
        bounds = cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            weights = query[:, start:stop] @ key[:, start:stop].transpose(-1, -2) * attention.scaling
            weights = weights.softmax(-1, dtype=torch.float32).to(value.dtype)
            outputs.append(weights @ value[:, start:stop])
            self.maps.append(weights)
        mixed = torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)
        hidden_PD = hidden_PD + attention.proj(mixed)
        return hidden_PD + block.mlp(block.norm2(hidden_PD))


class EagerQwen(_RanksByMaps, Qwen25VLFamily):
    """Qwen2.5-VL, ranked by maps; images of one frame."""

    def _encode(self, model: Any, pixels: Tensor, grid: Tensor, question: Any) -> Encoded:
        tower, config = model.model.visual, model._duet.config
        if config.stage1 == "none":
            return super()._encode(model, pixels, grid, question)
        ranked = max(index for index in tower.fullatt_block_indexes if index < len(tower.blocks))
        mapped = _MappedBlock(tower.blocks[ranked])
        blocks = [mapped if index == ranked else block for index, block in enumerate(tower.blocks)]
        packed = self.run_tower(_with_blocks(tower, blocks), pixels.type(tower.dtype), grid)
        unit, start, kept = tower.spatial_merge_unit, 0, []
        order = _window_order(tower, grid, unit)
        for _, rows, columns in grid.tolist():
            side = (rows // tower.spatial_merge_size, columns // tower.spatial_merge_size)
            count = math.prod(side)
            place = torch.argsort(order[start * unit : (start + count) * unit] - start * unit)
            signals = MapTowerSignals(mapped.maps.pop(0).unsqueeze(0), False, place, None)
            view = View.pooled(torch.arange(count * unit).view(count, unit), side)
            output = TowerOutput(
                features=packed.levels[0][start : start + count].unsqueeze(0),
                signals=UnitSignals(signals, view, class_token=False),  # type: ignore[arg-type]
                class_token=False,
                grid=side,
                pixels=pixels[start * unit : (start + count) * unit].unsqueeze(0),
            )
            if config.keeps_every_patch(count) or config.entering_tokens(count) >= count:
                raise ValueError("the eager stand-in for Qwen needs a stage 1 that drops something of every image")
            reducer = VISION_REDUCERS.get(config.stage1)
            reduction = in_raster_order(reducer(output, config.for_patches(count)))
            tracing.record_vision(replace(reduction, grid=side))
            kept.append(reduction)
            start += count
        return Encoded(
            torch.cat([one.tokens[0] for one in kept]),
            [one.tokens.shape[1] for one in kept],
            torch.cat([one.source[0] for one in kept]),
        )


def _with_blocks(tower: Any, blocks: list[Any]) -> Any:
    """Return what ``run_tower`` reads of a tower, with other blocks."""
    names = (
        "config", "spatial_merge_size", "spatial_merge_unit", "window_size", "patch_size", "patch_embed",
        "rotary_pos_emb", "fullatt_block_indexes", "merger",
    )  # fmt: skip
    return SimpleNamespace(blocks=blocks, **{name: getattr(tower, name) for name in names})


def _window_order(tower: Any, grid: Tensor, unit: int) -> Tensor:
    """Return which patch stands at each place of the tower's own order. Shapes: [P]."""
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return (order.unsqueeze(1) * unit + torch.arange(unit, device=order.device)).flatten()


EAGER: dict[str, type[EagerLlava] | type[EagerQwen]] = {"llava": EagerLlava, "qwen2_5_vl": EagerQwen}


@contextlib.contextmanager
def eager_attached(model: nn.Module, config: DuetConfig) -> Iterator[None]:
    """Attach a configuration whose rankings read eager maps; everything is as before at the end of the block.

    Args:
        model: a LLaVA-1.5 or a Qwen2.5-VL of transformers.
        config: what to keep.
    """
    host: Any = model
    before = host.config._attn_implementation
    host.set_attn_implementation("eager")
    hooks: list[Any] = []
    try:
        with attach(model, config) as handle:
            reducer = MapReducer(handle.config) if handle.config.schedule else None
            family = EAGER[host.config.model_type](reducer)
            handle.family = family
            hooks = reducer.hooks(family.decoder(host).layers) if reducer else []
            yield
    finally:
        for hook in hooks:
            hook.remove()
        host.set_attn_implementation(before)
