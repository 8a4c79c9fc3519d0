"""Batches: padding, the mask from lengths, one image per slot."""

import pytest
import torch
from data_helpers import short_tokenizer, tokenizer

from llava.train.collator import DataCollatorForSupervisedDataset

COLLATE = DataCollatorForSupervisedDataset(tokenizer=tokenizer())


def sample(ids, **fields):
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), **fields}


def picture(value, *shape):
    return torch.full(shape or (3, 4, 4), float(value))


def test_padding_and_mask():
    batch = COLLATE([sample([1, 5, 0, 7]), sample([1, 5])])
    assert batch["input_ids"].tolist() == [[1, 5, 0, 7], [1, 5, 0, 0]]
    assert batch["labels"].tolist() == [[1, 5, 0, 7], [1, 5, -100, -100]]
    # The token 0 inside the first sample is real although it equals the padding token.
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert "images" not in batch


def test_one_image_for_every_slot_and_one_for_a_text():
    batch = COLLATE(
        [
            sample([1, -200, 5], image=picture(1), image_size=(8, 6)),
            sample([1, 5], image=picture(2), image_size=(4, 4)),
            sample([1, -200, -200], image=[picture(3), picture(4)], image_size=[(1, 2), (3, 4)]),
        ]
    )
    assert batch["images"].shape == (4, 3, 4, 4)
    assert batch["images"][:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert batch["image_sizes"] == [(8, 6), (4, 4), (1, 2), (3, 4)]


def test_different_shapes_stay_a_list():
    batch = COLLATE([sample([-200], image=picture(1, 2, 3, 4, 4)), sample([-200], image=picture(2, 5, 3, 4, 4))])
    assert [tuple(image.shape) for image in batch["images"]] == [(2, 3, 4, 4), (5, 3, 4, 4)]
    same = COLLATE([sample([-200], image=picture(1, 2, 3, 4, 4)), sample([-200], image=picture(2, 2, 3, 4, 4))])
    assert same["images"].shape == (2, 2, 3, 4, 4)


@pytest.mark.parametrize(
    "bad",
    [
        sample([1, -200], image=[picture(1), picture(2)]),
        sample([1, -200, -200], image=picture(1)),
        sample([1, 5], image=[picture(1), picture(2)]),
        sample([1, -200]),
        sample([1, 5]),
    ],
)
def test_images_that_do_not_match_their_slots(bad):
    with pytest.raises(ValueError, match="sample 1 of the batch has"):
        COLLATE([sample([1, -200], image=picture(1)), bad])


def test_context_limit():
    collate = DataCollatorForSupervisedDataset(tokenizer=short_tokenizer(3))
    batch = collate([sample([1, -200, 5, 6, 7], image=picture(1))])
    assert batch["input_ids"].tolist() == [[1, -200, 5]] == batch["labels"].tolist()
    with pytest.raises(ValueError, match="after token 3"):
        collate([sample([1, 5, 6, -200], image=picture(1))])
