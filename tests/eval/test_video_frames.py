"""Frames of videos: which ones, from which containers, and what is said about files that cannot be read."""

import sys

import numpy as np
import pytest
from video_helpers import HEIGHT, WIDTH, moving_photo, number_of, write_video

from llava.eval.tasks.base import BadEvalData
from llava.eval.video import find_videos, frame_indices, read_frames

CONTAINERS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
THIRTY = [0, 4, 8, 12, 16, 20, 24, 29]  # 29/7 = 4.14.. rounded down


def needs_av(suffix=""):
    if suffix != ".gif":
        pytest.importorskip("av", reason="PyAV (extra video) is not installed")


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (30, 8, THIRTY),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (100, 8, [0, 14, 28, 42, 56, 70, 84, 99]),
        (3, 8, [0, 0, 0, 0, 1, 1, 1, 2]),
        (1, 8, [0] * 8),
        (5, 1, [0]),
        (10, 2, [0, 9]),
    ],
)
def test_frames_are_spread_evenly_from_the_first_to_the_last(total, count, expected):
    assert frame_indices(total, count) == expected


@pytest.mark.parametrize(("total", "count"), [(0, 8), (-1, 8), (5, 0)])
def test_no_frames_cannot_be_spread(total, count):
    with pytest.raises(ValueError, match="at least 1"):
        frame_indices(total, count)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container(tmp_path, suffix):
    needs_av(suffix)
    frames = read_frames(write_video(tmp_path / f"film{suffix}", 30))
    assert [number_of(frame) for frame in frames] == THIRTY
    assert all(frame.mode == "RGB" and frame.size == (WIDTH, HEIGHT) for frame in frames)


def test_frames_come_in_the_order_in_which_they_are_shown(tmp_path):
    needs_av()
    path = write_video(tmp_path / "b_frames.mp4", 30, bf="2")
    assert [number_of(frame) for frame in read_frames(path)] == THIRTY


def test_the_containers_count_is_used_and_not_needed(tmp_path):
    needs_av()
    import av

    declared = {}
    for suffix in (".mp4", ".mkv"):
        with av.open(str(write_video(tmp_path / f"film{suffix}", 30))) as container:
            declared[suffix] = container.streams.video[0].frames
    assert declared == {".mp4": 30, ".mkv": 0}, "this test wants one container that counts and one that does not"


def test_a_container_that_promises_too_many_frames(tmp_path):
    needs_av()
    import av

    path = write_video(tmp_path / "film.avi", 30)
    data = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # dwTotalFrames, dwLength
        place = data.index(tag) + offset
        assert int.from_bytes(data[place : place + 4], "little") == 30
        data[place : place + 4] = (90).to_bytes(4, "little")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 90
    assert [number_of(frame) for frame in read_frames(path)] == THIRTY


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_pictures_are_not_flipped_and_are_the_same_every_time(tmp_path, suffix):
    needs_av(suffix)
    path = write_video(tmp_path / f"film{suffix}", 30)
    first, again = read_frames(path), read_frames(path)
    for index, frame, repeated in zip(THIRTY, first, again, strict=True):
        original, read = np.asarray(moving_photo(30)[index], dtype=float), np.asarray(frame, dtype=float)
        assert np.array_equal(frame, repeated)
        assert abs(original - read).mean() < 8 < abs(original - read[:, ::-1]).mean()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_shorter_than_asked_repeats_frames(tmp_path, suffix):
    needs_av(suffix)
    path = write_video(tmp_path / f"short{suffix}", 3)
    assert [number_of(frame) for frame in read_frames(path)] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert [number_of(frame) for frame in read_frames(path, 2)] == [0, 2]


def test_a_still_gif_is_a_video_of_one_frame(tmp_path):
    path = write_video(tmp_path / "still.gif", 1)
    assert [number_of(frame) for frame in read_frames(path)] == [0] * 8


def says(path, *parts):
    with pytest.raises(BadEvalData) as caught:
        read_frames(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_absent_and_empty_files(tmp_path, suffix):
    path = tmp_path / f"film{suffix}"
    says(path, "does not exist")
    path.touch()
    says(path, "empty")


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_files_that_are_no_video(tmp_path, suffix):
    needs_av(suffix)
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>404 Not Found</html>" * 40)
    says(path, "fetch it again")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_file_that_is_cut_off(tmp_path, suffix):
    needs_av(suffix)
    path = write_video(tmp_path / f"film{suffix}", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    says(path, "fetch it again")


def test_sound_without_pictures(tmp_path):
    needs_av()
    import av

    path = tmp_path / "song.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        wave = (8000 * np.sin(np.arange(4000) / 3)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    says(path, "no video stream")


def test_without_pyav_gifs_work_and_the_rest_names_the_extra(tmp_path, monkeypatch):
    gif = write_video(tmp_path / "film.gif", 3)
    other = tmp_path / "film.mp4"
    other.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(read_frames(gif)) == 8
    with pytest.raises(ImportError, match=r"PyAV.*\.\[video\]"):
        read_frames(other)


def test_videos_are_found_by_name(tmp_path):
    for name in ("a.mkv", "a.mp4", "b.1.5.AVI", "c.txt", "c.gif", "d.webm", "d.mov"):
        (tmp_path / name).touch()
    found = {name: path.name for name, path in find_videos(tmp_path).items()}
    assert found == {"a": "a.mp4", "b.1.5": "b.1.5.AVI", "c": "c.gif", "d": "d.mov"}
    assert find_videos(tmp_path / "absent") == {}
