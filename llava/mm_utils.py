"""Pictures to tensors, prompts to ids: the helpers that LLaVA clients import.

Picture sizes are (width, height) in pixels everywhere, as in PIL.
"""

from __future__ import annotations

import ast
import base64
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.large_pictures import prepare
from llava.pictures import MAX_PIXELS, read_picture

Size = tuple[int, int]

CLIP_MEAN_COLOUR = (122, 116, 104)
"""CLIP's mean colour as 8-bit RGB, truncated; the padding that LLaVA-1.5 was trained with."""


_PINPOINTS_EXAMPLE = "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """Pick the grid that shows most pixels of the picture, then the one that wastes least area.

    Args:
        original_size: (width, height) of the picture.
        possible_resolutions: Candidates; the first of equal ones wins.
    """
    width, height = original_size

    def fit(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - candidate[0] * candidate[1]

    if not possible_resolutions:
        raise ValueError(f"no candidate resolution: set image_grid_pinpoints, e.g. {_PINPOINTS_EXAMPLE}")
    best = max(possible_resolutions, key=fit)
    return (best[0], best[1])


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale the picture into the target, aspect kept, and centre it on black."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        new_size = (target_width, min(math.ceil(height * scale_width), target_height))
    else:
        new_size = (min(math.ceil(width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(new_size), ((target_width - new_size[0]) // 2, (target_height - new_size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut the picture into square tiles of ``patch_size`` pixels, row by row."""
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def read_pinpoints(grid_pinpoints: str | Sequence[Size] | None, tile: int | None = None) -> list[Size]:
    """Read the anyres candidates, which a config may hold as text.

    Args:
        grid_pinpoints: (width, height) pairs in pixels, or their text.
        tile: Pixels along one side of a tile, when that is known.

    Raises:
        ValueError: There are none, they are no pairs of whole numbers, or tiles do not fill one of them.
    """
    wanted = f"image_grid_pinpoints must be a list of (width, height) pairs in pixels, such as {_PINPOINTS_EXAMPLE}"
    try:
        points = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{wanted}; {grid_pinpoints!r} cannot be read") from error
    pairs = isinstance(points, (list, tuple)) and all(
        isinstance(point, (list, tuple)) and len(point) == 2 and all(_is_whole(side) for side in point)
        for point in points
    )
    if not pairs or not points:
        raise ValueError(f"{wanted}, got {grid_pinpoints!r}")
    for width, height in points:
        if tile and (width % tile or height % tile):
            raise ValueError(
                f"image_grid_pinpoints has {width} x {height}, which tiles of {tile} x {tile} pixels (the vision "
                f"tower's) do not fill; use multiples of {tile}"
            )
    return [(int(width), int(height)) for width, height in points]


def _is_whole(side: Any) -> bool:
    return isinstance(side, (int, float)) and not isinstance(side, bool) and side > 0 and int(side) == side


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: str | Sequence[Size], patch_size: int
) -> tuple[int, int]:
    """Return how many tiles (across, down) of ``patch_size`` pixels a picture of this size is cut into.

    Raises:
        ValueError: See ``read_pinpoints``.
    """
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[Size] | None
) -> torch.Tensor:
    """Cut a picture into tiles next to a small view of the whole.

    Args:
        image: RGB picture.
        processor: CLIP image processor.
        grid_pinpoints: Candidate (width, height) grids, as a list or its text.

    Returns:
        [1 + tiles, 3, H, W]; index 0 is the whole picture, squeezed to a square.

    Raises:
        ValueError: See ``read_pinpoints``.
    """
    tile = processor.crop_size["height"]
    resolution = select_best_resolution(image.size, read_pinpoints(grid_pinpoints, tile))
    tiles = divide_to_patches(resize_and_pad_image(image, resolution), tile)
    edge = processor.size["shortest_edge"]
    views = [image.resize((edge, edge)), *tiles]
    return torch.stack([_pixel_values(view, processor) for view in views])


def load_image_from_base64(image: str) -> Image.Image:
    """Decode a base64 string into an RGB picture.

    Raises:
        ValueError: It is no picture; see `llava.pictures.read_picture`.
    """
    return read_picture(base64.b64decode(image))


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """Centre the picture on a square of the background colour; a square picture is returned as it is.

    Raises:
        ValueError: The square would have more than `llava.pictures.MAX_PIXELS`.
    """
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} pixels on a square has {side * side:,}, more than {MAX_PIXELS:,}; "
            "process_images does without the square"
        )
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def _pixel_values(image: Image.Image, processor: Any) -> torch.Tensor:
    """Run the processor on one picture: [3, H, W]."""
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def process_images(images: list[Image.Image], image_processor: Any, model_cfg: Any) -> Any:
    """Turn pictures into the tensor that the model takes.

    Args:
        images: B pictures. A picture that is not RGB must be converted first.
        image_processor: CLIP image processor.
        model_cfg: Object with ``image_aspect_ratio`` ("pad", "anyres", anything else: the processor's own resize and
            centre crop) and, for anyres, ``image_grid_pinpoints``.

    Returns:
        [B, 3, H, W]; for anyres [B, T, 3, H, W] or, when tile counts differ, a list of [T_i, 3, H, W].

    Raises:
        ValueError: Another kind of anyres is asked for, or ``image_grid_pinpoints`` cannot be used.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect_ratio == "pad":
        # Truncated, not rounded: the checkpoints were trained with these colours.
        colour = tuple(int(channel * 255) for channel in image_processor.image_mean)
        squares = (expand2square(prepare(image, image_processor, colour), colour) for image in images)
        pixels = [_pixel_values(square, image_processor) for square in squares]
    elif aspect_ratio == "anyres":
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        pixels = [process_anyres_image(image, image_processor, pinpoints) for image in images]
    elif str(aspect_ratio).startswith("anyres"):
        raise ValueError(f"image_aspect_ratio {aspect_ratio!r} is not supported; use 'anyres', 'pad' or 'square'")
    else:
        fitted = [prepare(image, image_processor, None) for image in images]
        return image_processor(fitted, return_tensors="pt")["pixel_values"]
    if len({tensor.shape for tensor in pixels}) == 1:
        return torch.stack(pixels)
    return pixels


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> Any:
    """Tokenise a prompt, with one ``image_token_index`` in place of every ``<image>``.

    The texts between the marks are tokenised one by one, as in LLaVA's training.

    Returns:
        A list of ids, or a LongTensor [T] for ``return_tensors="pt"``.

    Raises:
        ValueError: If ``return_tensors`` is another string.
    """
    ids: list[int] = []
    for index, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        piece_ids = tokenizer(piece).input_ids
        if index:
            ids.append(image_token_index)
            if piece_ids and piece_ids[0] == tokenizer.bos_token_id:
                piece_ids = piece_ids[1:]
        ids.extend(piece_ids)
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt' or None")


def get_model_name_from_path(model_path: str) -> str:
    """Return the last part of the path; a ``checkpoint-N`` folder gets its parent's name in front."""
    parts = model_path.strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return parts[-2] + "_" + parts[-1]
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop when every row has just said one of the keywords.

    Works for outputs that begin with the prompt and for outputs that hold new tokens only.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.input_ids = input_ids
        self.keyword_ids = [self._without_bos(tokenizer(keyword).input_ids) for keyword in self.keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def _without_bos(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids)

    def _row_is_done(self, new_ids: torch.Tensor) -> bool:
        for keyword in self.keyword_ids:
            tail = new_ids[-len(keyword) :]
            if len(keyword) and torch.equal(tail, keyword.to(tail.device)):
                return True
        tail = new_ids[max(0, len(new_ids) - self.max_keyword_len) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

    def call_for_batch(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> bool:
        """Return whether the first row of ``output_ids`` [B, L] ends in a keyword."""
        return bool(self(output_ids[:1], scores, **kwargs))

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> Any:
        """Return True when all rows of ``output_ids`` [B, L] end in a keyword."""
        head = output_ids[:, : self.start_len]
        holds_prompt = head.shape == self.input_ids.shape and torch.equal(head, self.input_ids.to(head.device))
        new_ids = output_ids[:, self.start_len :] if holds_prompt else output_ids
        return all(self._row_is_done(row) for row in new_ids)
