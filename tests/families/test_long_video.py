"""256 frames of Video-LLaVA in the memory that 16 unreduced ones take, and in time linear in the frames.

Run with ``pytest -m slow -s tests/families/test_long_video.py`` to see the numbers (docs/models.md has some).
"""

import json
import subprocess
import sys

import pytest

RUN = """
import json, resource, sys, time
import torch, transformers as hf
import duet
from duet import DuetConfig

frames, reduced = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
vision = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, image_size=224,
              patch_size=14)
text = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000,
            max_position_embeddings=100000)
config = hf.VideoLlavaConfig(vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**text),
                             image_token_index=998, video_token_index=999)
model = hf.VideoLlavaForConditionalGeneration(config).eval()
inputs = {
    "input_ids": torch.cat((torch.arange(1, 6), torch.full((frames * 257,), 999), torch.arange(6, 20)))[None],
    "pixel_values_videos": torch.randn(1, frames, 3, 224, 224),
}
keep = DuetConfig.preset("video-llava-7b-per-picture", 960) if reduced else DuetConfig.none()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad(), duet.attach(model, keep), duet.trace(images=False) as record:
    before, start = peak(), time.perf_counter()
    model(**inputs, logits_to_keep=1)
print(json.dumps([record.passes[0][0].visual[0], peak() - before, time.perf_counter() - start]))
"""


def measure(frames, reduced):
    """Visual tokens that enter the decoder, MiB above what model and pixels take, and seconds."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, json.dumps([frames, reduced])], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    tokens, memory, seconds = json.loads(run.stdout)
    print(f"{frames:4d} frames {'reduced' if reduced else 'full':8}{tokens:6d} tokens{memory:6.0f} MiB{seconds:6.1f} s")
    return tokens, memory, seconds


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_and_time_of_long_videos():
    tokens, memory, _ = measure(16, False)
    assert tokens == 16 * 257
    found = {frames: measure(frames, True) for frames in (64, 256)}
    assert {tokens for tokens, _, _ in found.values()} == {1536}
    assert found[256][1] <= 1.4 * memory
    assert found[256][2] <= 1.5 * 4 * found[64][2]  # linear, with room for a busy machine
