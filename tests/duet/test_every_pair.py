"""Any vision reducer with any language reducer: one mixed batch each, with the counts that both promise."""

import pytest
import small
import torch
from dense import TOKENS, model, vision_config

from duet import attach, trace
from duet.budget import kept_tokens
from duet.config import DuetConfig
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS

SCHEDULE = {2: 0.5, 4: 0.25}


@pytest.mark.parametrize("language", LANGUAGE_REDUCERS.names())
@pytest.mark.parametrize("vision", VISION_REDUCERS.names())
@torch.no_grad()
def test_a_batch_runs_through_both(vision, language):
    values = vision_config(vision).to_dict() | {"stage2": language, "schedule": SCHEDULE}
    config = DuetConfig.from_dict(values)
    with attach(model(), config), trace() as seen:
        logits = model()(**small.mixed_batch("left")).logits
    assert logits.isfinite().all()
    entering = [len(image.source) for image in seen.images]
    assert config.adaptive or entering == [TOKENS] * 3
    first, second = entering[0], entering[1] + entering[2]  # the last two pictures are of one sample
    counts = [[first, 0, second]] + [[kept_tokens(n, r) for n in (first, 0, second)] for r in SCHEDULE.values()]
    assert [segment.visual for segment in seen.passes[0]] == counts
    for layer, wanted in zip(SCHEDULE, counts[1:], strict=True):
        kept = [len(image.kept_after[layer]) for image in seen.images]
        assert [kept[0], kept[1] + kept[2]] == [wanted[0], wanted[2]]
    text = [sum(token != small.IMAGE_TOKEN for token in ids) for ids in small.MIXED]
    assert logits.shape[1] == max(words + visual for words, visual in zip(text, counts[-1], strict=True))
