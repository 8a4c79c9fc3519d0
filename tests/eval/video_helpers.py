"""Small videos from real photographs, frames that carry their number, and the official layout of a video benchmark."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from playground.tiny.scenes import load_photos

WIDTH, HEIGHT = 128, 96
CODECS = {".mp4": "mpeg4", ".avi": "mpeg4", ".mov": "mpeg4", ".mkv": "mpeg4", ".webm": "libvpx"}


@functools.cache
def moving_photo(count, photo="chelsea.png"):
    """`count` frames that pan and zoom over a photograph; two grey squares in the corner spell the frame's number."""
    source = load_photos()[photo]
    frames = []
    for index in range(count):
        share = index / max(count - 1, 1)
        width = round(source.width * (0.6 - 0.2 * share))
        height = round(width * HEIGHT / WIDTH)
        left, top = round((source.width - width) * share), round((source.height - height) * share / 2)
        pixels = np.array(source.resize((WIDTH, HEIGHT), box=(left, top, left + width, top + height)))
        for place, digit in enumerate(divmod(index, 10)):
            pixels[0:16, 16 * place : 16 * place + 16] = 20 + 22 * digit
        frames.append(Image.fromarray(pixels))
    return tuple(frames)


def number_of(frame):
    """The number that `moving_photo` wrote into a frame."""
    pixels = np.asarray(frame, dtype=float)
    tens, ones = (round((pixels[4:12, 16 * place + 4 : 16 * place + 12].mean() - 20) / 22) for place in (0, 1))
    return 10 * tens + ones


def write_video(path, count, photo="chelsea.png", **options):
    """Write `moving_photo` in the container that the file's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(path.suffix, count, photo, tuple(options.items())))
    return path


@functools.cache
def _encoded(suffix, count, photo, options):
    frames = moving_photo(count, photo)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film{suffix}"
        if suffix == ".gif":
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
        else:
            _encode(path, frames, dict(options))
        return path.read_bytes()


def _encode(path, frames, options):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 1_500_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


# (question_id, video, question, answer, type); ids of both kinds, and answers in another order than the questions.
ROWS = [
    (0, "cat_1.5", "what is looking at the camera?", "cat", 0),
    (1, "cat_1.5", "how many cats are there?", "one", 1),
    ("v_2", "coffee", "what is on the saucer?", "coffee cup", 0),
    (3, "coffee", "what color is the cup?", "white", 2),
    (4, "rocket", "what is the rocket doing?", "standing", 4),
    (5, "rocket", "who is there?", "people", 4),
]


def write_benchmark(home, video_folder, rows=ROWS, suffix=".gif", frames=3):
    """Write test_q.json, test_a.json and the videos of `rows` as the published sets have them."""
    home.mkdir(parents=True, exist_ok=True)
    asked = [{"video_name": name, "question": text, "question_id": key} for key, name, text, _, _ in rows]
    answered = [{"answer": answer, "type": kind, "question_id": key} for key, _, _, answer, kind in reversed(rows)]
    (home / "test_q.json").write_text(json.dumps(asked), encoding="utf-8")
    (home / "test_a.json").write_text(json.dumps(answered), encoding="utf-8")
    photos = {"cat_1.5": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
    for name in {row[1] for row in rows}:
        write_video(home / video_folder / f"{name}{suffix}", frames, photos.get(name, "astronaut.png"))
