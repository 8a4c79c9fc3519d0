"""What a picture shows does not depend on the order in which its tokens stand (option order=score or order=raster)."""

from dataclasses import replace

import pytest
import qwen_models as qwen
import torch
from models import CASES

import duet
from duet import DuetConfig, draw
from duet.tracing import ImageRecord
from llava.eval.heat_maps import patch_scores

ALL = CASES | qwen.CASES
CONFIG = DuetConfig(dominant=4, contextual=3, cluster_width=3, schedule={})


def stands_for(image):
    """What each token is, whatever the order."""
    tokens = range(len(image.source))
    return sorted((image.source[t], image.kind[t], tuple(sorted(image.patches_of(t)))) for t in tokens)


def seen(family, order, across_frames=None):
    case = ALL[family]
    model = case.build()
    config = replace(CONFIG, options={"order": order}, across_frames=across_frames)
    with duet.attach(model, config), duet.trace() as record, torch.no_grad():
        model(**case.batch(model))
    return record.images


@pytest.mark.parametrize("family", sorted(ALL))
def test_tokens_stand_for_the_same_patches_in_either_order(family):
    by_score, in_raster = seen(family, "score"), seen(family, "raster")
    assert by_score and len(by_score) == len(in_raster)
    for first, second in zip(by_score, in_raster, strict=True):
        assert stands_for(first) == stands_for(second)
        scores = [patch_scores(one, range(len(one.source)), torch.ones(len(one.source))) for one in (first, second)]
        assert scores[0].equal(scores[1]) and int((scores[0] > 0).sum()) > 4
        fates = [draw.patch_fates(one) for one in (first, second)]
        assert ((fates[0] == -2) == (fates[1] == -2)).all() and ((fates[0] == -1) == (fates[1] == -1)).all()
        kept = [[text.startswith("dropped") for text in one.fate()] for one in (first, second)]
        assert kept[0] == kept[1] == (fates[0] == -2).tolist()


@pytest.mark.parametrize("family", ["video_llava", "llava_onevision"])
def test_frames_that_are_merged_know_their_patches_in_either_order(family):
    """Each average lists the patches of the tokens in it; which tokens those are is chosen by place."""
    images = seen(family, "raster", across_frames=0.6)
    for image in images:
        named = {patch for token in range(len(image.source)) for patch in image.patches_of(token)}
        assert named == set((draw.patch_fates(image) != -2).nonzero()[0].tolist())
        for token, kind in enumerate(image.kind):
            assert (kind == "contextual") == (len(image.averaged(token)) > 1)


def test_a_map_of_an_image_whose_averages_stand_in_between():
    record = ImageRecord((2, 3), [0, 2, 4], ["dominant", "contextual", "dominant"], [[], [2, 3, 5], []])
    assert patch_scores(record, [0, 1, 2], torch.tensor([0.5, 0.25, 0.75])).tolist() == [0.5, 0, 0.25, 0.25, 0.75, 0.25]
    assert draw.patch_fates(record).tolist() == [-1, -2, 0, 0, -1, 0]
    assert [text.split(" token")[0] for text in record.fate()] == [
        "kept as", "dropped in stage 1", "merged into", "merged into", "kept as", "merged into",
    ]  # fmt: skip


def test_what_the_decoder_averages_shows_on_all_patches_that_its_tokens_average():
    record = ImageRecord(
        (2, 3), [0, 2, 4], ["dominant", "contextual", "dominant"], [[], [2, 3], []], {3: [0, 1]}, {3: {2: 1, 1: 1}}
    )
    assert draw.patch_fates(record, 3).tolist() == [-1, -2, 1, 1, 1, -2]
