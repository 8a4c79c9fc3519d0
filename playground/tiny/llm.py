"""Trains the tiny Llama on the frozen tower's features through a throw-away projector.

The features of some thousands of scenes are computed once. Every sample then shows the language model a random part
of the visual tokens (all that lie on digits, and some of the rest), which is cheap, and all 576 at the end. The
questions of one image share its prefix: each is a branch that sees the prefix and itself, which equals one sample per
question.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from playground.tiny.parallel import Clock, average_gradients, rank, world
from playground.tiny.questions import CHANCE, KINDS, Turn, ask, caption, place_turn, text_turn
from playground.tiny.scenes import BACKBONE_MAX_DIGITS, PlacedDigit, make_scene
from playground.tiny.tokenizer import SYSTEM_PROMPT, build_tokenizer
from playground.tiny.tower import BACKBONE_SEED, NONE_CLASS, SELECT_LAYER, normalise, patch_targets

logger = logging.getLogger(__name__)
IGNORE = -100
VISUAL = -200


@dataclass(frozen=True)
class LlmRecipe:
    """Sizes and schedule of the language model's training."""

    layers: int = 12
    width: int = 128
    intermediate: int = 384
    heads: int = 4
    scenes: int = 5000
    batch: int = 40
    learning_rate: float = 1.5e-3
    minutes: float = 43.0
    questions: int = 9
    # (share of the time at which a phase ends, visual tokens, samples per batch as a share of `batch`)
    phases: tuple[tuple[float, int, float], ...] = ((0.45, 64, 1.0), (0.55, 200, 0.6), (2.0, 576, 0.4))
    mix: dict[str, float] = field(
        default_factory=lambda: {
            "exists": 2.0,
            "count": 0.8,
            "corner": 1.2,
            "extreme": 1.2,
            "relation": 2.2,
            "choice": 1.5,
            "order": 1.0,
            "place": 1.5,
        }
    )


def llm_config(recipe: LlmRecipe, vocab: int) -> LlamaConfig:
    """The Llama configuration of the tiny language model."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=recipe.width,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


@dataclass
class FeatureBank:
    """Tower features of many scenes: features [S, 576, D] bf16, on-digit mask [S, 576], the digits."""

    features: torch.Tensor
    on_digit: torch.Tensor
    digits: list[tuple[PlacedDigit, ...]]


@torch.no_grad()
def build_bank(tower: CLIPVisionModel, split: str, seed: int, scenes: int, batch: int = 24) -> FeatureBank:
    """Render scenes and run the tower on them."""
    width = tower.config.hidden_size
    features = torch.empty(scenes, 576, width, dtype=torch.bfloat16)
    on_digit = torch.empty(scenes, 576, dtype=torch.bool)
    digits: list[tuple[PlacedDigit, ...]] = []
    tower.eval()
    for start in range(0, scenes, batch):
        drawn = [make_scene(split, seed, i, most=BACKBONE_MAX_DIGITS) for i in range(start, min(start + batch, scenes))]
        pixels = torch.from_numpy(np.stack([s.pixels for s in drawn]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = tower(normalise(pixels), output_hidden_states=True).hidden_states[SELECT_LAYER]
        features[start : start + len(drawn)] = hidden[:, 1:].to(torch.bfloat16)
        for offset, scene in enumerate(drawn):
            classes, _ = patch_targets(scene.digits)
            on_digit[start + offset] = torch.from_numpy(classes != NONE_CLASS)
            digits.append(scene.digits)
    return FeatureBank(features, on_digit, digits)


class Writer:
    """Turns questions into token ids the way LLaVA's vicuna_v1 and plain templates do."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.prefix = tokenizer(f"{SYSTEM_PROMPT} USER: ").input_ids
        self.mark = tokenizer.convert_tokens_to_ids("▁ASSISTANT:")

    def ids(self, text: str) -> list[int]:
        """Ids of a piece of text without BOS."""
        if text not in self.cache:
            found = self.tokenizer(text).input_ids
            self.cache[text] = found[1:] if found[:1] == [self.tokenizer.bos_token_id] else found
        return self.cache[text]

    def labelled(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and labels of text with turns; what follows ASSISTANT: up to and with </s> is labelled."""
        ids, labels, answering = self.ids(text), [], False
        for token in ids:
            labels.append(token if answering else IGNORE)
            if token == self.mark:
                answering = True
            elif token == self.tokenizer.eos_token_id:
                answering = False
        return ids, labels


@dataclass
class Sample:
    """One training sequence; VISUAL in `ids` marks where the visual tokens go."""

    ids: list[int]
    labels: list[int]
    branch: list[int]


def questions_sample(
    writer: Writer, digits: tuple[PlacedDigit, ...], rng: np.random.Generator, recipe: LlmRecipe
) -> Sample:
    """Several questions on one image, as parallel branches or (one time in five) as turns of one conversation."""
    weights = np.array(list(recipe.mix.values()))
    kinds = rng.choice(list(recipe.mix), size=recipe.questions, p=weights / weights.sum())
    turns = [turn for kind in kinds if (turn := _turn(str(kind), digits, rng))]
    ids = [*writer.prefix, VISUAL]
    labels, branch = [IGNORE] * len(ids), [0] * len(ids)
    if rng.random() < 0.2:
        parts = [
            f"\n{q} ASSISTANT: {a}</s>" if i == 0 else f"USER: {q} ASSISTANT: {a}</s>" for i, (q, a) in enumerate(turns)
        ]
        new_ids, new_labels = writer.labelled("".join(parts))
        return Sample(ids + new_ids, labels + new_labels, branch + [0] * len(new_ids))
    for number, (question, answer) in enumerate(turns, start=1):
        new_ids, new_labels = writer.labelled(f"\n{question} ASSISTANT: {answer}</s>")
        ids, labels, branch = ids + new_ids, labels + new_labels, branch + [number] * len(new_ids)
    return Sample(ids, labels, branch)


def _turn(kind: str, digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn | None:
    return place_turn(digits, rng) if kind == "place" else ask(kind, digits, rng)


def caption_sample(writer: Writer, digits: tuple[PlacedDigit, ...]) -> Sample:
    """BOS, image, caption and a line end, as in LLaVA's plain template."""
    text = writer.ids(caption(digits) + "\n")
    return Sample([writer.tokenizer.bos_token_id, VISUAL, *text], [IGNORE, IGNORE, *text], [0] * (len(text) + 2))


def text_sample(writer: Writer, rng: np.random.Generator) -> Sample:
    """A conversation without an image."""
    turns = [text_turn(rng) for _ in range(4)]
    text = "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns)
    ids, labels = writer.labelled(f"{SYSTEM_PROMPT} {text}")
    ids, labels = [writer.tokenizer.bos_token_id, *ids], [IGNORE, *labels]
    return Sample(ids, labels, [0] * len(ids))


class Reader(nn.Module):
    """The language model with a projector in front: what LLaVA is, without LLaVA."""

    def __init__(self, llm: LlamaForCausalLM, vision_width: int):
        super().__init__()
        width = llm.config.hidden_size
        self.llm = llm
        self.projector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, samples: list[Sample], visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at labelled positions [M, V] and their labels [M]; visual is [B, N, vision_width]."""
        embeds, labels, branch, positions = self.assemble(samples, visual)
        length = embeds.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        mask = torch.zeros(same.shape).masked_fill(~(causal & same), torch.finfo(torch.float32).min)[:, None]
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
        target = labels[:, 1:]
        wanted = target != IGNORE
        return self.llm.lm_head(hidden[:, :-1][wanted]).float(), target[wanted]

    def assemble(self, samples: list[Sample], visual: torch.Tensor):
        """Splice the visual tokens in and pad on the right: embeds [B, L, D], labels, branch, positions [B, L]."""
        projected = self.projector(visual.float())
        count = projected.shape[1]
        rows, labels, branches, positions = [], [], [], []
        for row, sample in enumerate(samples):
            at = sample.ids.index(VISUAL) if VISUAL in sample.ids else None
            ids = torch.tensor([max(i, 0) for i in sample.ids])
            text = self.llm.model.embed_tokens(ids)
            label, branch = torch.tensor(sample.labels), torch.tensor(sample.branch)
            if at is not None:
                text = torch.cat([text[:at], projected[row].to(text.dtype), text[at + 1 :]])
                label = torch.cat([label[:at], torch.full((count,), IGNORE), label[at + 1 :]])
                branch = torch.cat([branch[:at], torch.zeros(count, dtype=torch.long), branch[at + 1 :]])
            rows.append(text)
            labels.append(label)
            branches.append(branch)
            positions.append(branch_positions(branch))
        pad = nn.utils.rnn.pad_sequence
        return (
            pad(rows, True),
            pad(labels, True, IGNORE),
            pad(branches, True, 0),
            pad(positions, True, 0),
        )


def branch_positions(branch: torch.Tensor) -> torch.Tensor:
    """Position ids [L]: every branch continues the common prefix."""
    position = torch.arange(len(branch))
    if not bool((branch > 0).any()):
        return position
    prefix = int((branch == 0).sum())
    starts = torch.zeros(int(branch.max()) + 1, dtype=torch.long)
    for number in range(1, len(starts)):
        starts[number] = int(position[branch == number][0])
    shifted = prefix + position - starts[branch]
    return torch.where(branch == 0, position, shifted)


def pick_tokens(bank: FeatureBank, scenes: np.ndarray, count: int, generator: torch.Generator) -> torch.Tensor:
    """Features [B, count, D] of a random part of the patches, digits first, in raster order."""
    if count >= 576:
        return bank.features[scenes]
    score = torch.rand(len(scenes), 576, generator=generator) + bank.on_digit[scenes].float()
    keep = score.topk(count, dim=1).indices.sort(1).values
    return bank.features[torch.as_tensor(scenes)[:, None], keep]


@torch.no_grad()
def evaluate_reader(reader: Reader, writer: Writer, bank: FeatureBank, count: int, scenes: int) -> dict[str, float]:
    """Share of held-out questions of which every answer token (and the end mark) is the most likely one."""
    reader.eval()
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    generator = torch.Generator().manual_seed(0)
    for start in range(0, scenes, 20):
        numbers = np.arange(start, min(start + 20, scenes))
        samples, marks = [], []
        for number in numbers:
            rng = np.random.default_rng([7, int(number)])
            ids = [*writer.prefix, VISUAL]
            labels, branch, kinds = [IGNORE] * len(ids), [0] * len(ids), []
            for kind in KINDS:
                turn = ask(kind, bank.digits[number], rng)
                if turn is None:
                    continue
                new_ids, new_labels = writer.labelled(f"\n{turn[0]} ASSISTANT: {turn[1]}</s>")
                kinds.append((kind, sum(label != IGNORE for label in new_labels)))
                ids, labels = ids + new_ids, labels + new_labels
                branch = branch + [len(kinds)] * len(new_ids)
            samples.append(Sample(ids, labels, branch))
            marks += kinds
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, labels = reader(samples, pick_tokens(bank, numbers, count, generator))
        good, at = (logits.argmax(-1) == labels).tolist(), 0
        for kind, size in marks:
            right[kind].append(all(good[at : at + size]))
            at += size
    reader.train()
    result = {kind: float(np.mean(values)) for kind, values in right.items()}
    return result | {"mean": float(np.mean(list(result.values())))}


def phase_at(recipe: LlmRecipe, progress: float) -> tuple[int, int]:
    """Visual tokens and batch size at a share of the training time."""
    for end, tokens, share in recipe.phases:
        if progress < end:
            return tokens, max(1, round(recipe.batch * share))
    _, tokens, share = recipe.phases[-1]
    return tokens, max(1, round(recipe.batch * share))


def draw_batch(writer: Writer, bank: FeatureBank, rng: np.random.Generator, recipe: LlmRecipe, size: int):
    """A batch of one form (branches, captions or text only are mixed); returns samples and scene numbers."""
    scenes = rng.integers(0, len(bank.digits), size)
    samples = []
    for scene in scenes:
        form = rng.random()
        if form < 0.03:
            samples.append(text_sample(writer, rng))
        elif form < 0.2:
            samples.append(caption_sample(writer, bank.digits[scene]))
        else:
            samples.append(questions_sample(writer, bank.digits[scene], rng, recipe))
    return samples, scenes


def train_llm(out: str, tower_path: str, recipe: LlmRecipe, state_path: str) -> None:
    """Train the language model for `recipe.minutes` and write it with its tokenizer to `out`; resumable."""
    torch.manual_seed(BACKBONE_SEED)
    tokenizer = build_tokenizer()
    writer = Writer(tokenizer)
    tower = CLIPVisionModel.from_pretrained(tower_path, dtype=torch.float32)
    begin = time.time()
    held = build_bank(tower, "heldout", BACKBONE_SEED, 120 if rank() == 0 else 1)
    bank = build_bank(tower, "train", BACKBONE_SEED + 1 + rank(), recipe.scenes // world())
    logger.info("llm: features of %d scenes in %.0f s", recipe.scenes, time.time() - begin)
    reader = Reader(LlamaForCausalLM(llm_config(recipe, len(tokenizer))), tower.config.hidden_size)
    groups = [
        {"params": [p for p in reader.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in reader.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    step, clock = 0, Clock(0.0)
    if os.path.exists(state_path):
        state = torch.load(state_path, weights_only=True)
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock = state["step"], Clock(state["spent"])
    rng = np.random.default_rng([BACKBONE_SEED, step, rank()])
    generator = torch.Generator().manual_seed(step * world() + rank())
    budget, last_save, running = recipe.minutes * 60, clock.spent, 0.0
    while clock.spent < budget:
        progress = clock.spent / budget
        rate = min(1.0, (step + 1) / 150) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        tokens, size = phase_at(recipe, progress)
        reader.llm.set_attn_implementation("eager" if tokens < 300 else "sdpa")
        samples, scenes = draw_batch(writer, bank, rng, recipe, max(1, size // world()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, labels = reader(samples, pick_tokens(bank, scenes, tokens, generator))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(reader.parameters(), clock)
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        step += 1
        if rank() == 0 and step % 25 == 0:
            logger.info("llm %d %.0fs tokens %d loss %.3f", step, clock.spent, tokens, running)
        if rank() == 0 and clock.spent - last_save > 180:
            save_state(state_path, reader, optimizer, step, clock.spent)
            logger.info("llm %d held-out %s", step, _short(evaluate_reader(reader, writer, held, tokens, 40)))
            last_save = clock.spent
    if rank() == 0:
        save_state(state_path, reader, optimizer, step, clock.spent)
        result = evaluate_reader(reader, writer, held, 576, 120)
        logger.info("llm done after %d steps, %.0f s, held-out at 576 tokens %s", step, clock.spent, _short(result))
        record = {"steps": step, "seconds": round(clock.spent), "heldout": result, "chance": CHANCE}
        write_llm(out, reader, tokenizer, record)


def write_llm(out: str, reader: Reader, tokenizer: PreTrainedTokenizerBase, record: dict) -> None:
    """Write the language model (bf16), the tokenizer and the record of the training; the projector is thrown away."""
    reader.llm.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    with open(os.path.join(out, "training.json"), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)


def save_state(path: str, reader: Reader, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
    """Write the resumable state in one rename."""
    state = {"reader": reader.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, path + ".part")
    os.replace(path + ".part", path)


def _short(figures: dict) -> str:
    return " ".join(f"{k} {v:.2f}" for k, v in figures.items())
