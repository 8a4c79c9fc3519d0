"""LLaVA as a service of Cog (replicate.com): the place and interface of LLaVA's own predictor.

LLAVA_MODEL names the checkpoint (default: liuhaotian/llava-v1.5-13b, from the hub); one that was trained with DUET runs
with DUET. Template and pictures are prepared as the model's config says.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

from cog import BasePredictor, ConcatenateIterator, Input, Path
from transformers import TextIteratorStreamer

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.eval.generate import stop_string
from llava.eval.run_llava import answer, choose_template, generation_options, load_image, move_pixels, place_images
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model

__all__ = ["Predictor", "load_image"]

MODEL = "liuhaotian/llava-v1.5-13b"


class Predictor(BasePredictor):
    """One question about one picture at a time; the answer comes as it is generated."""

    def setup(self) -> None:
        """Load the model once.

        Raises:
            ValueError: it cannot look at pictures.
        """
        path = os.environ.get("LLAVA_MODEL", MODEL)
        self.name = get_model_name_from_path(path)
        self.tokenizer, self.model, self.image_processor, self.context_len = load_pretrained_model(
            path, model_base=None, model_name=self.name
        )
        if self.image_processor is None:
            raise ValueError(f"{path} is a plain language model; it cannot look at pictures")

    def predict(
        self,
        image: Path = Input(description="Picture"),  # noqa: B008 - how Cog declares inputs
        prompt: str = Input(description="Question about the picture"),
        top_p: float = Input(description="Sample from the likeliest tokens of this mass", ge=0.0, le=1.0, default=1.0),
        temperature: float = Input(description="0 is greedy; above 1 is wild", default=0.2, ge=0.0),
        max_tokens: int = Input(description="Length limit of the answer in tokens", default=1024, ge=1),
    ) -> ConcatenateIterator[str]:
        """Answer a question; yields text as it comes."""
        picture = load_image(str(image))
        conversation = conv_templates[choose_template(self.name, self.model.config)].copy()
        # A typed mark would ask for a picture that is not there.
        question = place_images(prompt.replace(DEFAULT_IMAGE_TOKEN, ""), 1, self.model.config)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        pixels = move_pixels(process_images([picture], self.image_processor, self.model.config), self.model)
        options = generation_options(temperature, top_p, 1, max_tokens)
        stop = stop_string(conversation, self.tokenizer)
        yield from until(stop, self._stream(conversation, pixels, [picture.size], options))

    def _stream(self, conversation: Any, pixels: Any, sizes: list, options: dict[str, Any]) -> Iterator[str]:
        """Generate in a thread, and hand out the text; what goes wrong there is raised here."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                answer(self.model, self.tokenizer, conversation, pixels, sizes, streamer, **options)
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]


def until(stop: str | None, texts: Iterator[str]) -> Iterator[str]:
    """Hand out texts up to a stop string; what may be its beginning is held back."""
    held, ended = "", False
    for text in texts:
        if ended:
            continue  # whoever generates wants to be heard to the end
        held += text
        if stop and stop in held:
            held, ended = held.split(stop)[0], True
            continue
        keep = next((n for n in range(len(stop) - 1, 0, -1) if held.endswith(stop[:n])), 0) if stop else 0
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held
