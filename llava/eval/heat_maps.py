"""Figures 4 and 6: where salient text tokens look at one layer of the decoder, drawn over the picture.

    duet ablate fig4 --model-path MODEL --image FILE --question TEXT

The reduction is DUET-VLM (C+S) at a third of the patches unless flags say otherwise. A token that averages patches
shows on all of them; a patch that is not there any more has no attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import duet
from duet import DuetConfig
from duet.draw import heat_map, image_from_pixels
from duet.methods import solve
from duet.signals import DecoderSignals
from duet.stage2.text_guided import salient_rows
from duet.tracing import ImageRecord
from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.generate import Answerer, preprocess, template_for
from llava.eval.plans import DEPTH, Geometry, read_geometry
from llava.eval.run_llava import move_pixels
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pictures import add_arguments as add_picture_arguments
from llava.pictures import read_picture
from llava.reduction import ReductionArguments

LAYERS = {"fig4": 9, "fig6": 24}  # counted from 1, of 32
FIGURES = {name: f"heat maps of salient text tokens at layer {layer} of 32" for name, layer in LAYERS.items()}
_PANEL, _GAP, _CAPTION = 224, 8, 18


@dataclass(frozen=True)
class SalientMap:
    """Attention of one text token to the patches.

    Attributes:
        position: of the token among those after the picture.
        scores: [N], averaged over heads.
    """

    position: int
    scores: Tensor


def make_parser(name: str) -> argparse.ArgumentParser:
    """The command line of one figure."""
    parser = argparse.ArgumentParser(
        prog=f"duet ablate {name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", default=None, help="base model of a LoRA or projector folder")
    parser.add_argument("--image", type=Path, required=True, help="picture")
    parser.add_argument("--question", required=True)
    parser.add_argument("--layer", type=int, default=None, help=f"counted from 1 (default: {LAYERS[name]} of {DEPTH})")
    parser.add_argument("--out", type=Path, default=Path(f"results/eval/{name}.png"))
    parser.add_argument("--conv-mode", default=None, help="template (default: the model's own, else vicuna_v1)")
    parser.add_argument("--device", default="cuda", help="cuda (NVIDIA and AMD) or cpu")
    parser.add_argument("--dtype", default=None)
    add_picture_arguments(parser)
    ReductionArguments.add_arguments(parser)
    return parser


def choose_reduction(args: argparse.Namespace, geometry: Geometry) -> DuetConfig:
    """The flags' reduction, or DUET-VLM (C+S) at a third of the patches.

    Raises:
        ValueError: it does not fit the model, or is none.
    """
    given = ReductionArguments.from_namespace(args)
    if given.given():
        config = given.to_config(geometry.reduction, geometry.preset)
    else:
        config = solve("duet-salient", geometry.patches / 3, geometry.patches, geometry.layers)
    if config is None:
        raise ValueError("--duet_tokens 0 leaves nothing to look at in a reduced model; leave it out")
    config.validate(geometry.patches, geometry.layers)
    return config


def choose_layer(wanted: int | None, name: str, layers: int) -> int:
    """The layer, counted from 1.

    Raises:
        ValueError: the model has no such layer.
    """
    layer = max(1, round(LAYERS[name] * layers / DEPTH)) if wanted is None else wanted
    if not 1 <= layer <= layers:
        raise ValueError(f"--layer {layer}: the model has layers 1 to {layers}")
    return layer


def patch_scores(record: ImageRecord, kept: Sequence[int], scores: Tensor) -> Tensor:
    """Spread the scores of kept tokens over their patches.

    Shapes: scores [K], of the tokens `kept`; returns [N], zero where nothing is left, the highest of several.
    """
    out = torch.zeros(record.grid[0] * record.grid[1])
    for token, score in zip(kept, scores.tolist(), strict=True):
        for patch in record.patches_of(token):
            out[patch] = max(float(out[patch]), score)
    return out


@torch.inference_mode()
def salient_maps(model: Any, ids: Sequence[int], pixels: Tensor, layer: int) -> tuple[list[SalientMap], ImageRecord]:
    """Attention of the salient text tokens at the input of a layer, with the model's reduction in force.

    Args:
        model: a LLaVA model with a reduction.
        ids: a prompt with one picture.
        pixels: [3, H, W].
        layer: counted from 1.

    Raises:
        ValueError: no visual token is left there, or the prompt has no text after the picture.
    """
    config, decoder = model.reduction, model.get_model()
    with duet.trace() as trace:
        spliced = model.prepare_inputs_labels_for_multimodal(
            torch.tensor([list(ids)], device=model.device), None, None, None, None, pixels.unsqueeze(0)
        )
        entered, embeds, visual = spliced[1], spliced[4], spliced.visual_mask
        output = duet.run_decoder(
            decoder, embeds, position_ids=entered, visual_mask=visual, config=config, output_hidden_states=True
        )
    (record,) = trace.images
    stages = [stage for stage in record.kept_after if stage < layer]
    kept = record.kept_after[max(stages)] if stages else list(range(len(record.source)))
    if not kept:
        raise ValueError(f"no visual token is left at layer {layer}; ask for one up to {max(stages)}")
    assert output.hidden_states is not None
    hidden = output.hidden_states[layer - 1]
    start = int(visual[0].int().argmax())
    text = start + len(kept)
    if hidden.shape[1] == text:
        raise ValueError("the prompt has no text after the picture that could look at it")
    origin = [*range(start), *(start + token for token in kept), *range(start + len(record.source), embeds.shape[1])]
    positions = torch.arange(embeds.shape[1], device=hidden.device)[None] if entered is None else entered
    kept_positions = config.positions in ("original", "patch")
    positions = positions[:, origin] if kept_positions else positions[:, : hidden.shape[1]]
    signals = DecoderSignals(decoder.layers[layer - 1], hidden, decoder.rotary_emb(hidden, positions), None)
    rows = torch.arange(text, hidden.shape[1], device=hidden.device).unsqueeze(0)
    rows, _ = salient_rows(signals, rows, torch.ones_like(rows, dtype=torch.bool), config.salient_tokens)
    maps = []
    for row in rows[0]:
        seen = signals.received(row.view(1, 1), torch.ones(1, 1, dtype=torch.bool, device=row.device))[0, start:text]
        maps.append(SalientMap(int(row) - text, patch_scores(record, kept, seen)))
    return maps, record


def sheet(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures side by side, each with its caption."""
    width = len(panels) * (_PANEL + _GAP) + _GAP
    out = Image.new("RGB", (width, _PANEL + 2 * _GAP + _CAPTION), (250, 250, 250))
    pen, font = ImageDraw.Draw(out), ImageFont.load_default()
    for number, (caption, picture) in enumerate(panels):
        left = _GAP + number * (_PANEL + _GAP)
        out.paste(picture.resize((_PANEL, _PANEL)), (left, _GAP))
        shown = caption.encode("latin-1", "replace").decode("latin-1")
        pen.text((left, _PANEL + _GAP + 3), shown, fill=(30, 30, 30), font=font)
    return out


def draw(args: argparse.Namespace, name: str) -> list[str]:
    """Write the figure; returns the salient tokens.

    Raises:
        ValueError: a wrong request.
        OSError: the picture or the model is not there.
    """
    geometry = read_geometry(args.model_path, args.model_base)
    config = choose_reduction(args, geometry)
    layer = choose_layer(args.layer, name, geometry.layers)
    picture = read_picture(args.image, args.image_orientation)
    model_name = get_model_name_from_path(args.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, model_name, device=args.device, dtype=args.dtype, duet_config=config
    )
    answerer = Answerer(model, tokenizer, processor, template_for(model_name, model.config, args.conv_mode))
    ids = answerer.prompt_ids(args.question, 1)
    pixels = preprocess([picture], processor, model.config)[0]
    if pixels.dim() != 3:
        raise ValueError("heat maps need a model that looks at a picture in one tower pass, not in tiles")
    maps, record = salient_maps(model, ids, move_pixels(pixels, model), layer)
    after = ids[ids.index(IMAGE_TOKEN_INDEX) + 1 :]
    words = [tokenizer.decode([after[one.position]]).strip() or "(newline)" for one in maps]
    seen = image_from_pixels(pixels, processor.image_mean, processor.image_std)
    mean = torch.stack([one.scores for one in maps]).mean(0)
    panels = [("input", seen), (f"layer {layer}, mean", heat_map(seen, mean, record.grid))]
    panels += [(word, heat_map(seen, one.scores, record.grid)) for word, one in zip(words, maps, strict=True)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(panels).save(args.out)
    return words
