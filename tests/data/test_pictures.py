"""One reader for pictures: any mode, upright, within limits, and errors that name the picture."""

import base64
import io
import os
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
from data_helpers import GOLDEN, data_args, image_processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from duet import draw
from duet.pictures import to_rgb
from llava import large_pictures, mm_utils, pictures
from llava.conversation import conv_templates
from llava.large_pictures import pad_and_resize, prepare, resize_and_crop
from llava.mm_utils import expand2square, process_images
from llava.pictures import PictureError, picture_size, read_picture

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 31, 3), dtype=np.uint8))
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
MODES += ["I;16", "I;16B", "I;16L"]


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def values(image):
    return np.asarray(image)[..., 0].ravel().tolist()


# --- modes


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_without_a_warning(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = to_rgb(Image.new(mode, (7, 5)))
    assert picture.mode == "RGB" and picture.size == (7, 5) and picture.info == {}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (np.array([[0, 256, 32768, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 1, 255]], np.uint16), [0, 1, 255]),
        (np.array([[-5, 0, 65535]], np.int32), [0, 0, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1, np.nan, -1]], np.float32), [0, 127, 255, 0, 0]),
        (np.array([[0, 100.6, 255]], np.float32), [0, 100, 255]),
        (np.array([[0, 32768, 65535]], np.float32), [0, 128, 255]),
        (np.array([[0, np.inf, -np.inf]], np.float32), [0, 255, 0]),
        (np.array([[0, 1e30]], np.float32), [0, 255]),
    ],
)
def test_deep_grey_is_scaled_and_never_clipped_to_white(numbers, expected):
    assert values(to_rgb(Image.fromarray(numbers))) == expected


def test_deep_grey_is_scaled_alike_in_all_parts(monkeypatch):
    numbers = Image.fromarray(np.random.default_rng(1).integers(0, 65535, (50, 30)).astype(np.uint16))
    whole = to_rgb(numbers)
    monkeypatch.setattr("duet.pictures._STRIP", 100)
    assert to_rgb(numbers).tobytes() == whole.tobytes()


def test_transparency_is_left_out_not_blended():
    assert to_rgb(Image.new("RGBA", (1, 1), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
    palette = Image.new("P", (16, 16))
    palette.putdata(list(range(256)))
    palette.putpalette([(7 * number) % 256 for number in range(768)])
    read = read_picture(encoded(palette, "PNG", transparency=bytes(range(256))))
    assert read.tobytes() == palette.convert("RGB").tobytes()


def test_drawings_take_pictures_of_any_mode():
    deep = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    shades = np.asarray(draw.heat_map(deep, np.zeros(4), (2, 2)))
    assert shades.std() > 10 and (shades == 255).mean() < 0.2


# --- orientation


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("number", range(10))
def test_pictures_are_upright_as_in_transformers(form, number):
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(NOISE, form, exif=exif)
    opened = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(opened).convert("RGB")
    read = read_picture(data)
    assert read.size == upright.size == picture_size(data) and read.tobytes() == upright.tobytes()
    assert read_picture(read).tobytes() == upright.tobytes(), "turned twice"
    stored = read_picture(data, "stored")
    llava = Image.open(io.BytesIO(data)).convert("RGB")
    assert stored.tobytes() == llava.tobytes() and stored.size == picture_size(data, "stored") == llava.size


def test_a_damaged_exif_block_counts_as_none():
    data = encoded(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert read_picture(data).size == picture_size(data) == NOISE.size


def test_an_unknown_orientation_is_refused():
    with pytest.raises(ValueError, match=r"'camera'.*exif, stored"):
        read_picture(encoded(NOISE, "PNG"), "camera")


# --- what cannot be read


def chunky(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "A" * (2 << 20), zip=True)
    NOISE.save(path, pnginfo=info)


BAD = {
    "text.png": lambda path: path.write_text("no picture"),
    "empty.png": lambda path: path.touch(),
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": os.mkfifo,
    "cut.png": lambda path: path.write_bytes(encoded(NOISE, "PNG")[:-900]),
    "cut.jpg": lambda path: path.write_bytes(encoded(NOISE, "JPEG")[:-300]),
    "cut.gif": lambda path: path.write_bytes(encoded(NOISE, "GIF")[:-300]),
    "bomb.png": lambda path: Image.new("1", (20000, 10000)).save(path),
    "long.png": lambda path: Image.new("1", (70000, 1)).save(path),
    "chunk.png": chunky,
    "program.eps": lambda path: NOISE.save(path, "EPS"),
    "absent.png": lambda path: None,
    "line\nbreak.png": lambda path: path.write_text("no picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_file_in_one_line(tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(PictureError) as caught:
        read_picture(tmp_path / name)
    message = str(caught.value)
    assert repr(name)[1:-1] in message and "\n" not in message and len(message) < 600


def test_limits_hold_where_pillows_are_switched_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = encoded(Image.new("1", (20000, 10000)), "PNG")
    for read in (read_picture, picture_size):
        with pytest.raises(PictureError, match="20000 x 10000 pixels are too many"):
            read(data)


def test_the_first_frame_of_several_is_read():
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (200, 0, 0)]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert read_picture(data).getpixel((0, 0))[0] > 190


def test_open_files_are_read_up_to_a_limit(monkeypatch):
    data = encoded(NOISE, "PNG")
    assert read_picture(io.BytesIO(data)).tobytes() == NOISE.tobytes()
    monkeypatch.setattr(pictures, "MAX_STREAM_BYTES", 100)
    with pytest.raises(PictureError, match="more than 100 bytes"):
        read_picture(io.BytesIO(data))
    with pytest.raises(PictureError, match="reading bytes"):
        read_picture(io.StringIO("text"))


def test_base64_is_read_by_the_same_reader():
    code = base64.b64encode(encoded(Image.new("I;16", (3, 2), 65535), "PNG")).decode()
    assert mm_utils.load_image_from_base64(code).getpixel((0, 0)) == (255, 255, 255)
    for wrong in ("%%%", "aGVsbG8="):
        with pytest.raises(ValueError):
            mm_utils.load_image_from_base64(wrong)


SEEDS = [encoded(NOISE.resize((9, 7)), form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA")]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_give_a_picture_or_an_error_by_name(data):
    """Whatever is overwritten, cut off or put in: never another exception."""
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        end = place + data.draw(st.integers(0, 8))
        content[place:end] = data.draw(st.binary(max_size=8))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = read_picture(bytes(content))
            assert picture.mode == "RGB" and min(picture.size) > 0 and picture_size(bytes(content)) == picture.size
    except PictureError as error:
        assert "\n" not in str(error)


# --- large and thin pictures


@pytest.mark.parametrize(
    ("width", "height", "levels"),
    [
        (301, 7, 0),
        (7, 301, 1),
        (1, 500, 1),
        (500, 1, 0),
        (200, 200, 0),
        (40, 31, 0),
        (31, 84, 0),
        (60, 400, 0),
        (9, 80, 0),
    ],
)
@pytest.mark.parametrize("strip", [1, 1000, 1 << 22])
def test_padding_in_strips_is_padding(monkeypatch, width, height, levels, strip):
    """To the bit, but for tall pictures, where a channel may differ by a level."""
    monkeypatch.setattr(large_pictures, "_STRIP", strip)
    picture = NOISE.resize((width, height))
    colour = mm_utils.CLIP_MEAN_COLOUR
    expected = np.asarray(expand2square(picture, colour).resize((84, 84), Image.Resampling.BICUBIC)).astype(int)
    padded = np.asarray(pad_and_resize(picture, colour, (84, 84), Image.Resampling.BICUBIC))
    assert np.abs(padded - expected).max() <= levels


@pytest.mark.parametrize(("width", "height"), [(301, 7), (7, 301), (1, 500), (500, 1), (200, 200), (333, 222)])
def test_cutting_out_what_is_seen_gives_the_middle_of_the_scaled_picture(monkeypatch, width, height):
    picture = NOISE.resize((width, height))
    whole = resize_and_crop(picture, 84, (84, 84), Image.Resampling.BICUBIC)
    middle = image_processor_of(84)(picture)
    assert whole.tobytes() == middle.tobytes()
    monkeypatch.setattr(large_pictures, "LARGE", 0)
    part = resize_and_crop(picture, 84, (84, 84), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(part).astype(int) - np.asarray(whole)).max() <= 1


def image_processor_of(edge):
    """The stock processor's scaling and cutting, as a picture."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, do_normalize=False, do_rescale=False
    )

    def process(picture):
        pixels = processor(picture, return_tensors="np")["pixel_values"][0]
        return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))

    return process


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_large_pictures_give_the_pixels_of_the_plain_way(monkeypatch, aspect):
    picture = NOISE.resize((700, 400))
    arguments = image_processor(), data_args(image_aspect_ratio=aspect)
    plain = process_images([picture], *arguments)
    monkeypatch.setattr(large_pictures, "LARGE", 1000)
    assert prepare(picture, image_processor(), None).size == (336, 336)
    assert (process_images([picture], *arguments) - plain).abs().max() < 0.02


THIN = """
import resource, sys
from types import SimpleNamespace
from PIL import Image
from transformers import AutoImageProcessor
from llava.conversation import conv_templates
from llava.mm_utils import process_images
from llava.pictures import read_picture
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29),) * 2)
for size in ((30000, 1), (1, 30000), (65535, 1), (11000, 9000)):
    Image.new("L", size, 9).save(sys.argv[2], compress_level=1)
    picture = read_picture(sys.argv[2])
    for ratio in ("pad", "square", "anyres"):
        config = SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints=[(672, 672)])
        assert process_images([picture], processor, config).shape[-1] == processor.crop_size["height"]
    for mode in ("Pad", "Default"):
        conv_templates["v1"].process_image(picture, mode, return_pil=True)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="limits memory as Linux does")
def test_large_and_thin_pictures_fit_into_memory(tmp_path):
    """1.5 GiB above what the process has when it starts."""
    program = [sys.executable, "-c", THIN, str(GOLDEN / "clip_tiny"), str(tmp_path / "thin.png")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_square_that_would_not_fit_is_refused():
    with pytest.raises(ValueError, match="30000 x 1 pixels on a square"):
        expand2square(Image.new("RGB", (30000, 1)), 0)


def test_pictures_of_a_chat_keep_a_pixel_of_their_short_side():
    chat = conv_templates["v1"]
    assert chat.process_image(Image.new("RGB", (30000, 1)), "Default", return_pil=True).size == (1344, 1)
    large = NOISE.resize((1400, 1000))
    padded = expand2square(large, mm_utils.CLIP_MEAN_COLOUR).resize((672, 672))
    assert chat.process_image(large, "Pad", return_pil=True).tobytes() == padded.tobytes()
