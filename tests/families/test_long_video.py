"""256 frames of Video-LLaVA in the memory that 16 unreduced ones take, and in time linear in the frames.

`python -m duet.long_video_bench` measures the same at any size; docs/results has its table.
"""

import time

import pytest

from duet import DuetConfig, long_video_bench

SIZES = (
    "--device cpu --image_size 224 --tower_width 256 --tower_layers 4 --width 256 --layers 8 --frames_full 16 "
    "--frames 64 256 --rounds 2"
)


def processor_seconds(run, device):
    """Seconds that the processors worked, which other programs do not change."""
    del device
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.slow
def test_memory_and_time_of_long_videos(monkeypatch):
    monkeypatch.setattr(long_video_bench, "seconds_of", processor_seconds)
    args = long_video_bench.parser().parse_args(SIZES.split())
    model = long_video_bench.build(args)
    whole = long_video_bench.measure(model, "all tokens", DuetConfig.none(), args.frames_full, 1)
    assert whole.tokens == 16 * 257
    keep = DuetConfig.preset("video-llava-7b-per-picture", 960)
    short, long = (long_video_bench.measure(model, "reduced", keep, frames, args.rounds) for frames in args.frames)
    assert (short.tokens, long.tokens) == (1536, 1536)
    assert long.peak <= 1.1 * whole.peak
    assert min(long.encode) <= 1.25 * 4 * min(short.encode)
