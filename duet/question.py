"""What is asked about a picture, for vision reducers that listen to the question.

Shapes: B tower passes (or pictures), S samples, L sequence, N patches, D width of the language model, M chunks of text,
C width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from duet.stage1 import VISION_REDUCERS

if TYPE_CHECKING:
    from duet.config import DuetConfig
    from duet.stage1 import TowerOutput


class Question(Protocol):
    """A question per tower pass."""

    def select(self, index_B: Tensor) -> Question:
        """Return the questions with the given numbers, in their order; numbers may repeat."""
        ...

    def relevance(self, tower: TowerOutput) -> Tensor:
        """Return how much each patch has to do with the question, larger for more. Shapes: [B, N], equal for none."""
        ...


@dataclass(frozen=True)
class MeanQuestion:
    """The mean of a question's token embeddings in the language model; needs no further weights.

    Attributes:
        embedding: [B, D], zero where nothing is asked.
    """

    embedding: Tensor

    def select(self, index_B: Tensor) -> MeanQuestion:
        """Return the questions with the given numbers."""
        return MeanQuestion(self.embedding[index_B.to(self.embedding.device)])

    def relevance(self, tower: TowerOutput) -> Tensor:
        """Return the cosine of projected patches and question. Shapes: [B, N].

        Raises:
            ValueError: the projector is not known, so that patches and words live in different spaces.
        """
        if tower.project is None:
            raise ValueError("patches cannot be compared with the question without project=, the model's projector")
        patches = nn.functional.normalize(tower.embedded(), dim=-1)
        words = nn.functional.normalize(self.embedding.float(), dim=-1)
        return (patches @ words.to(patches.device).unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class ClipQuestion:
    """What CLIP's text tower says of a question that was cut into chunks.

    Attributes:
        text: [B, M, C] text embeddings, of unit length.
        counted: [B, M] bool, chunks that are real.
        embed_patches: tower features [B, N, D] to CLIP's joint space [B, N, C].
    """

    text: Tensor
    counted: Tensor
    embed_patches: Callable[[Tensor], Tensor]

    def select(self, index_B: Tensor) -> ClipQuestion:
        """Return the questions with the given numbers."""
        index = index_B.to(self.text.device)
        return ClipQuestion(self.text[index], self.counted[index], self.embed_patches)

    def relevance(self, tower: TowerOutput) -> Tensor:
        """Return the mean negative cosine of patches and chunks. Shapes: [B, N], zero where nothing is asked.

        Negative, because CLIP's patches are less alike to a text the more they show it. Source: CDPruner Sec. 3.2.
        """
        patches = nn.functional.normalize(self.embed_patches(tower.patches).float(), dim=-1)
        text = self.text.to(patches) * self.counted.to(patches).unsqueeze(-1)
        chunks = self.counted.sum(1).clamp(min=1).to(patches).unsqueeze(-1)
        return -(patches @ text.sum(1).unsqueeze(-1)).squeeze(-1) / chunks


class ClipText:
    """A CLIP model that reads questions: pass it as ``duet.attach(model, config, text_encoder=ClipText(...))``.

    Args:
        clip: ``transformers.CLIPModel`` with the vision tower that the language model was trained on.
        tokenizer: CLIP's tokenizer, called with a list of texts.
        decode: the language model's ``tokenizer.decode``, from token ids to text.
    """

    def __init__(self, clip: Any, tokenizer: Any, decode: Callable[..., str]) -> None:
        for part in ("text_model", "text_projection", "visual_projection"):
            if not hasattr(clip, part):
                raise ValueError(f"{type(clip).__name__} has no {part}; pass a CLIPModel, which has both towers' heads")
        self._clip, self._tokenizer, self._decode = clip, tokenizer, decode

    @torch.no_grad()
    def __call__(self, questions: Sequence[list[int]]) -> ClipQuestion:
        """Embed questions, given as token ids of the language model; a long one is cut into chunks."""
        rows = [self._chunks(self._decode(ids, skip_special_tokens=True)) for ids in questions]
        counted = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.bool, device=self._clip.device)
        for number, row in enumerate(rows):
            counted[number, : len(row)] = True
        text = torch.zeros(*counted.shape, self._clip.text_projection.out_features, device=counted.device)
        chunks = [chunk for row in rows for chunk in row]
        if chunks:
            text[counted] = self._embed(chunks)
        return ClipQuestion(text, counted, self._embed_patches)

    def _chunks(self, text: str) -> list[list[int]]:
        """Cut a text into pieces that fit CLIP's positions with a start and an end token each."""
        tokenizer, room = self._tokenizer, self._clip.config.text_config.max_position_embeddings - 2
        ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        return [start + ids[first : first + room] + end for first in range(0, len(ids), room)]

    def _embed(self, chunks: list[list[int]]) -> Tensor:
        length = max(map(len, chunks))
        ids = torch.tensor([chunk + [self._tokenizer.eos_token_id] * (length - len(chunk)) for chunk in chunks])
        mask = torch.tensor([[1] * len(chunk) + [0] * (length - len(chunk)) for chunk in chunks])
        device = self._clip.device
        pooled = self._clip.text_model(input_ids=ids.to(device), attention_mask=mask.to(device)).pooler_output
        return nn.functional.normalize(self._clip.text_projection(pooled).float(), dim=-1)

    def _embed_patches(self, features: Tensor) -> Tensor:
        weight = self._clip.visual_projection.weight
        normed = self._clip.vision_model.post_layernorm(features.detach().to(weight))
        return self._clip.visual_projection(normed)


def asked(valid_SL: Tensor | None, images_SL: Tensor, answers_SL: Tensor | None) -> Tensor:
    """Return the tokens that make up the question: text after the first image that is no answer.

    Shapes: valid (None: all), images and answers (None: none) [S, L] bool; returns [S, L] bool, possibly all False.
    """
    rows = ~images_SL & (images_SL.cumsum(1) > 0)
    for mask, wanted in ((valid_SL, True), (answers_SL, False)):
        if mask is not None:
            rows = rows & (mask.bool() if wanted else ~mask.bool())
    return rows


def is_read(config: DuetConfig | None) -> bool:
    """Return whether the vision reducer of a configuration listens to the question."""
    if config is None or config.stage1 == "none":
        return False
    return getattr(VISION_REDUCERS.get(config.stage1), "reads_question", False)


def read_question(ids_SL: Tensor | None, embeds_SLD: Tensor, asked_SL: Tensor, encode: ClipText | None) -> Question:
    """Return the question of each sample: as CLIP's text tower reads it, or its mean embedding without one.

    Shapes: ids and asked [S, L], embeds [S, L, D] of the language model.

    Raises:
        ValueError: there is a text tower, but ids are not known.
    """
    if encode is None:
        weights = asked_SL.to(embeds_SLD).unsqueeze(-1)
        return MeanQuestion(((embeds_SLD * weights).sum(1) / weights.sum(1).clamp(min=1)).detach())
    if ids_SL is None:
        raise ValueError("text_encoder reads token ids; pass input_ids in place of inputs_embeds")
    return encode([ids[mark].tolist() for ids, mark in zip(ids_SL, asked_SL, strict=True)])
