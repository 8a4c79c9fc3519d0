"""Trains the tiny CLIP tower with a dense objective: which digit covers this patch, and where it is.

The heads read `hidden_states[-2]`, the layer that LLaVA reads. The class token learns which digits the image holds and
how many, and a small term asks the attention of that layer to look at the digits, so that the attention that stage 1
ranks by means something.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from playground.tiny.parallel import Clock, average_gradients, rank, world
from playground.tiny.scenes import IMAGE_SIZE, PlacedDigit, make_scene, make_window

logger = logging.getLogger(__name__)
PATCH = 14
GRID = IMAGE_SIZE // PATCH
NONE_CLASS = 10
WINDOW = 12  # patches per side of a small training window
MAX_COUNT = 11
SELECT_LAYER = -2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
BACKBONE_SEED = 1  # the data sets that `build` writes use other seeds


@dataclass(frozen=True)
class TowerRecipe:
    """Sizes and schedule of the tower's training."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    batch: int = 16
    learning_rate: float = 1.5e-3
    minutes: float = 18.0
    crowded_share: float = 0.6
    window_share: float = 0.8  # share of the time spent on small windows
    windows: int = 64  # windows per step


def tower_config(recipe: TowerRecipe) -> CLIPVisionConfig:
    """The CLIP configuration of the tiny tower."""
    return CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=recipe.width,
    )


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's preprocessing at 336 px."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 336, 336, 3] to CLIP's normalised float [B, 3, 336, 336]."""
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return ((pixels.float() / 255.0 - mean) / std).permute(0, 3, 1, 2).contiguous()


def patch_targets(digits: tuple[PlacedDigit, ...], grid: int = GRID) -> tuple[np.ndarray, np.ndarray]:
    """What every patch should know.

    Returns:
        class [576] (0..9, or 10 for no digit under the patch's centre) and offset [576, 2] from the patch's centre to
        the digit's centre in units of the digit's side (0 where there is no digit).
    """
    centre = (np.arange(grid) + 0.5) * PATCH
    ys, xs = np.meshgrid(centre, centre, indexing="ij")
    classes = np.full((grid, grid), NONE_CLASS, dtype=np.int64)
    offsets = np.zeros((grid, grid, 2), dtype=np.float32)
    for digit in digits:
        inside = (np.abs(xs - digit.x) <= digit.size / 2) & (np.abs(ys - digit.y) <= digit.size / 2)
        classes[inside] = digit.value
        offsets[inside, 0] = (digit.x - xs[inside]) / digit.size
        offsets[inside, 1] = (digit.y - ys[inside]) / digit.size
    return classes.reshape(-1), offsets.reshape(-1, 2)


class DenseHeads(nn.Module):
    """Throw-away heads on the tower's features."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.Linear(width, 11)
        self.early = nn.Linear(width, 11)
        self.offsets = nn.Linear(width, 2)
        self.place = nn.Linear(width, 2)
        self.present = nn.Linear(width, 10)
        self.count = nn.Linear(width, MAX_COUNT)
        self.pooled = nn.Linear(width, 10)


def digit_attention(tower: nn.Module, hidden: torch.Tensor, digit: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Mean over heads of the attention mass that some query rows of the feature layer put on digit patches.

    Args:
        tower: CLIPVisionModel.
        hidden: input of the feature layer, [B, 577, D].
        digit: bool [B, 576], True where a patch lies on a digit.
        queries: indices of the query rows, [Q].

    Returns:
        mass [B, Q].
    """
    layer = encoder_layers(tower)[SELECT_LAYER]
    attention = layer.self_attn
    batch = hidden.shape[0]
    normed = layer.layer_norm1(hidden)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, -1, attention.num_heads, attention.head_dim).transpose(1, 2)

    q, k = split(attention.q_proj(normed[:, queries])), split(attention.k_proj(normed))
    weights = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5).float().softmax(-1)
    return (weights[..., 1:] * digit[:, None, None].float()).sum(-1).mean(1)


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The encoder's layers, wherever this version of transformers keeps them."""
    return getattr(tower, "vision_model", tower).encoder.layers


def run_tower(tower: nn.Module, pixels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
    """The tower on windows of an image: like CLIPVisionModel, with the position rows of the window's patches.

    Args:
        tower: CLIPVisionModel.
        pixels: normalised windows, [B, 3, 14 R, 14 C].
        rows: patch rows of each window in the whole image, [B, R].
        columns: patch columns, [B, C].

    Returns:
        hidden states: the embeddings and every layer's output, each [B, 1 + R C, D].
    """
    model = getattr(tower, "vision_model", tower)
    embeddings = model.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    index = 1 + (rows[:, :, None] * GRID + columns[:, None, :]).flatten(1)
    patches = patches + embeddings.position_embedding(index)
    cls = embeddings.class_embedding + embeddings.position_embedding.weight[0]
    hidden = model.pre_layrnorm(torch.cat([cls.expand(len(patches), 1, -1), patches], 1))
    states = [hidden]
    for layer in model.encoder.layers:
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden)
    return states


def full_batch(seed: int, start: int, count: int, crowded_share: float, split: str = "train") -> dict:
    """Whole scenes `start` .. `start + count` of a stream in which a fixed share is crowded."""
    numbers = range(start, start + count)
    drawn = [make_scene(split, seed, i, (i * 0.6180339887) % 1.0 < crowded_share) for i in numbers]
    batch = _collate([(scene.pixels, scene.digits) for scene in drawn], GRID)
    axis = torch.arange(GRID).expand(count, -1)
    return batch | {"rows": axis, "columns": axis}


def window_batch(seed: int, start: int, count: int) -> dict:
    """Small crowded scenes at random places of the tower's position table."""
    drawn = [make_window("train", seed, i, WINDOW * PATCH) for i in range(start, start + count)]
    origin = np.random.default_rng([seed, start]).integers(0, GRID - WINDOW + 1, (2, count, 1))
    rows, columns = torch.from_numpy(origin + np.arange(WINDOW))
    return _collate(drawn, WINDOW) | {"rows": rows, "columns": columns}


def _collate(drawn: list[tuple[np.ndarray, tuple[PlacedDigit, ...]]], grid: int) -> dict:
    targets = [patch_targets(digits, grid) for _, digits in drawn]
    present = torch.zeros(len(drawn), 10)
    for row, (_, digits) in zip(present, drawn, strict=True):
        row[[d.value for d in digits]] = 1.0
    return {
        "pixels": torch.from_numpy(np.stack([pixels for pixels, _ in drawn])),
        "classes": torch.from_numpy(np.stack([classes for classes, _ in targets])),
        "offsets": torch.from_numpy(np.stack([offsets for _, offsets in targets])),
        "present": present,
        "count": torch.tensor([len(digits) for _, digits in drawn]),
    }


def dense_loss(tower: nn.Module, heads: DenseHeads, batch: dict) -> tuple[torch.Tensor, dict]:
    """The tower's training loss and a few figures, on what `full_batch` or `window_batch` returns."""
    states = run_tower(tower, normalise(batch["pixels"]), batch["rows"], batch["columns"])
    feature_input, features = states[SELECT_LAYER - 1], states[SELECT_LAYER]
    patches, cls = features[:, 1:], features[:, 0]
    classes = batch["classes"]
    on_digit = classes != NONE_CLASS
    logits = heads.classes(patches).float()
    each = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
    loss_class = each[on_digit].mean() + each[~on_digit].mean()
    offset_error = (heads.offsets(patches).float() - batch["offsets"]) ** 2
    loss_offset = offset_error[on_digit].mean() + 0.1 * offset_error[~on_digit].mean()
    place = _place_targets(batch["rows"], batch["columns"])
    loss_place = F.mse_loss(heads.place(patches).float(), place)
    loss_cls = F.binary_cross_entropy_with_logits(heads.present(cls).float(), batch["present"])
    loss_cls = loss_cls + 0.3 * F.cross_entropy(heads.count(cls).float(), batch["count"])
    pooled = getattr(tower, "vision_model", tower).post_layernorm(states[-1][:, 0])
    loss_pool = F.binary_cross_entropy_with_logits(heads.pooled(pooled).float(), batch["present"])
    queries = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(1, features.shape[1], (24,))])
    mass = digit_attention(tower, feature_input, on_digit, queries)[on_digit.any(1)]
    loss_cls_mass = -mass[:, 0].clamp(1e-4, 0.6).log().mean()
    loss_column_mass = -mass[:, 1:].mean(1).clamp(1e-4, 0.4).log().mean()
    loss = loss_class + 2.0 * loss_offset + loss_place + loss_cls + 0.3 * loss_pool
    early = heads.early(states[SELECT_LAYER - 2][:, 1:]).float()
    loss = loss + 0.5 * F.cross_entropy(early[on_digit], classes[on_digit])
    loss = loss + 0.1 * loss_cls_mass + 0.05 * loss_column_mass
    guess = logits.argmax(-1)
    figures = {
        "digit_acc": (guess == classes)[on_digit].float().mean().item(),
        "none_acc": (guess == classes)[~on_digit].float().mean().item(),
        "offset": offset_error[on_digit].mean().item(),
        "place": loss_place.item(),
        "present_acc": ((heads.present(cls) > 0) == (batch["present"] > 0.5)).float().mean().item(),
        "count_acc": (heads.count(cls).argmax(-1) == batch["count"]).float().mean().item(),
        "cls_mass": mass[:, 0].mean().item(),
        "column_mass": mass[:, 1:].mean().item(),
    }
    return loss, figures


def _place_targets(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    x = columns[:, None, :].expand(-1, rows.shape[1], -1).flatten(1)
    y = rows[:, :, None].expand(-1, -1, columns.shape[1]).flatten(1)
    return torch.stack([x, y], -1).float() * (2.0 / (GRID - 1)) - 1.0


@torch.no_grad()
def evaluate_tower(tower: nn.Module, heads: DenseHeads, scenes: int = 96, batch: int = 12) -> dict:
    """Figures of the dense objective on held-out scenes with 2 to 5 digits."""
    tower.eval()
    totals: dict[str, float] = {}
    for start in range(0, scenes, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, figures = dense_loss(tower, heads, full_batch(BACKBONE_SEED, start, batch, 0.0, "heldout"))
        for key, value in figures.items():
            totals[key] = totals.get(key, 0.0) + value * batch / scenes
    tower.train()
    return totals


def start_positions(tower: nn.Module) -> None:
    """Start the position table at sines and cosines of the patch's column and row; it stays trainable.

    From CLIP's random start the patches would first have to learn where they are before they can look around.
    """
    table = getattr(tower, "vision_model", tower).embeddings.position_embedding.weight
    quarter = table.shape[1] // 4
    frequency = 20.0 ** (-torch.arange(quarter) / quarter)
    angle = torch.arange(GRID)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1)
    x, y = waves.repeat(GRID, 1), waves.repeat_interleave(GRID, 0)
    with torch.no_grad():
        table[1:] = 0.4 * torch.cat([x, y], 1)


def train_tower(out: str, recipe: TowerRecipe, state_path: str) -> None:
    """Train the tower for `recipe.minutes` and write it to `out`; resumes from `state_path` when that exists.

    Runs on every rank; each rank draws its own scenes.
    """
    torch.manual_seed(BACKBONE_SEED)
    tower, heads = CLIPVisionModel(tower_config(recipe)), DenseHeads(recipe.width)
    start_positions(tower)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    step, clock = 0, Clock(0.0)
    if os.path.exists(state_path):
        state = torch.load(state_path, weights_only=True)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock = state["step"], Clock(state["spent"])
    torch.manual_seed(BACKBONE_SEED + rank())
    budget, last_save = recipe.minutes * 60, clock.spent
    while clock.spent < budget:
        progress = clock.spent / budget
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        small = progress < recipe.window_share
        # on a CPU the fused attention is the slower one for short sequences and the faster one for long ones
        tower.set_attn_implementation("eager" if small else "sdpa")
        size = max(1, (recipe.windows if small else recipe.batch) // world())
        first = (step * world() + rank()) * size
        if small:
            batch = window_batch(BACKBONE_SEED, first, size)
        else:
            batch = full_batch(BACKBONE_SEED, first, size, recipe.crowded_share)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, figures = dense_loss(tower, heads, batch)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters, clock)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if rank() == 0 and step % 25 == 0:
            logger.info("tower %d %.0fs loss %.3f %s", step, clock.spent, loss.item(), _short(figures))
        if rank() == 0 and clock.spent - last_save > 120:
            logger.info("tower %d held-out %s", step, _short(evaluate_tower(tower, heads, 24)))
            _save_state(state_path, tower, heads, optimizer, step, clock.spent)
            last_save = clock.spent
    if rank() == 0:
        held = evaluate_tower(tower, heads, 192)
        logger.info("tower done after %d steps, %.0f s, held-out %s", step, clock.spent, _short(held))
        _save_state(state_path, tower, heads, optimizer, step, clock.spent)
        tower.to(torch.bfloat16).save_pretrained(out)
        image_processor().save_pretrained(out)
        with open(f"{out}/training.json", "w", encoding="utf-8") as file:
            json.dump(
                {"steps": step, "batch": recipe.batch, "seconds": round(clock.spent), "heldout": held}, file, indent=1
            )


def _save_state(path: str, tower: nn.Module, heads: nn.Module, optimizer, step: int, spent: float) -> None:
    state = {"tower": tower.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step, "spent": spent}, path + ".part")
    os.replace(path + ".part", path)


def _short(figures: dict) -> str:
    return " ".join(f"{k} {v:.3f}" for k, v in figures.items())
